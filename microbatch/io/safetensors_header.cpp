#include "microbatch/io/safetensors_header.h"

#include <algorithm>
#include <cstring>
#include <nlohmann/json.hpp>
#include <numeric>
#include <optional>
#include <stdexcept>
#include <tuple>
#include <unordered_map>
#include <utility>

#include "microbatch/core/error.h"
#include "microbatch/io/json.h"

namespace microbatch {
namespace {

using Json = nlohmann::json;

struct Type {
    const char* name;
    std::int64_t bytes;
};

constexpr Type types[] = {{"F64", 8}, {"F32", 4}, {"F16", 2}, {"BF16", 2}, {"I64", 8},
                          {"I32", 4}, {"I16", 2}, {"I8", 1},  {"U8", 1},   {"BOOL", 1}};

// The format's own limit.
constexpr std::uint64_t most_header = 100'000'000;
constexpr std::size_t most_values = 4'000'000;
constexpr std::size_t most_dimensions = 64;
constexpr const char* metadata = "__metadata__";
constexpr const char* strides_key = "microbatch.strides";
constexpr const char* empty_key = "microbatch.empty";

template <class... Parts>
[[noreturn]] void refuse(const std::string& file, const Parts&... why) {
    throw Error(ErrorKind::bad_data, file, " is not a valid safetensors file: ", why...);
}

// The size of the shape; empty if it exceeds 63 bits.
std::optional<std::uint64_t> bytes_of(const SafetensorsEntry& entry) {
    std::int64_t count = safetensors_element_size(entry.dtype);
    for (const std::int64_t size : entry.shape) {
        if (size < 0 || __builtin_mul_overflow(count, size, &count)) return std::nullopt;
    }
    return static_cast<std::uint64_t>(count);
}

void require_counts(const Json& numbers, const char* what) {
    const bool sound = numbers.is_array() && std::all_of(numbers.begin(), numbers.end(), [](const Json& number) {
                           return number.is_number_unsigned();
                       });
    if (!sound) throw std::invalid_argument(what);
}

SafetensorsEntry read_entry(const std::string& name, const Json& json) {
    SafetensorsEntry entry{.name = name, .dtype = json.at("dtype").get<std::string>(), .shape = {}, .strides = {}};
    if (safetensors_element_size(entry.dtype) == 0) throw std::invalid_argument("its dtype is " + entry.dtype);
    require_counts(json.at("data_offsets"), "its offsets are invalid");
    require_counts(json.at("shape"), "its shape is invalid");
    const auto offsets = json.at("data_offsets").get<std::vector<std::uint64_t>>();
    if (offsets.size() != 2 || offsets[0] > offsets[1]) throw std::invalid_argument("its offsets are invalid");
    entry.begin = offsets[0];
    entry.end = offsets[1];
    if (json.at("shape").size() > most_dimensions) throw std::invalid_argument("its shape has too many dimensions");
    entry.shape = json.at("shape").get<std::vector<std::int64_t>>();
    if (bytes_of(entry) != entry.end - entry.begin) throw std::invalid_argument("its shape and its size differ");
    entry.strides = row_major_strides(entry.shape);
    return entry;
}

// True if every element of the shape has its own position and there are no gaps.
bool is_dense(const std::vector<std::int64_t>& shape, const std::vector<std::int64_t>& strides) {
    if (shape.size() != strides.size()) return false;
    std::vector<std::size_t> order(shape.size());
    std::iota(order.begin(), order.end(), std::size_t{0});
    std::sort(order.begin(), order.end(), [&](std::size_t a, std::size_t b) {
        return std::pair(strides[a], shape[a]) < std::pair(strides[b], shape[b]);
    });
    std::int64_t expected = 1;
    for (const std::size_t i : order) {
        if (strides[i] < 0) return false;
        if (shape[i] == 1) continue;
        if (strides[i] != expected || __builtin_mul_overflow(expected, shape[i], &expected)) return false;
    }
    return true;
}

// The metadata is not needed to read the numbers: invalid entries are ignored.
void read_strides(const Json& header, std::vector<SafetensorsEntry>& entries) {
    try {
        const Json all = parse_bounded(header.at(metadata).at(strides_key).get_ref<const std::string&>(), most_values);
        for (SafetensorsEntry& entry : entries) {
            const auto found = all.find(entry.name);
            if (found == all.end()) continue;
            require_counts(*found, "strides");
            const auto strides = found->get<std::vector<std::int64_t>>();
            if (is_dense(entry.shape, strides)) entry.strides = strides;
        }
    } catch (const Json::exception&) {
    } catch (const std::invalid_argument&) {
    }
}

// The names of tensors without elements, in order, which their offsets do not determine.
std::unordered_map<std::string, std::size_t> read_order(const Json& header) {
    std::unordered_map<std::string, std::size_t> order;
    try {
        for (const Json& name :
             parse_bounded(header.at(metadata).at(empty_key).get_ref<const std::string&>(), most_values)) {
            order.emplace(name.get<std::string>(), order.size());
        }
    } catch (const Json::exception&) {
    } catch (const std::invalid_argument&) {
    }
    return order;
}

Json parse(std::string_view header, const std::string& file) {
    try {
        Json json = parse_bounded(header, most_values);
        if (!json.is_object()) refuse(file, "its header is not a JSON object");
        return json;
    } catch (const std::invalid_argument& error) {
        refuse(file, "its header: ", error.what());
    }
}

}  // namespace

std::int64_t safetensors_element_size(std::string_view dtype) {
    for (const auto& [name, bytes] : types) {
        if (dtype == name) return bytes;
    }
    return 0;
}

std::vector<std::int64_t> row_major_strides(const std::vector<std::int64_t>& shape) {
    std::vector<std::int64_t> strides(shape.size());
    std::int64_t stride = 1;
    for (std::size_t i = shape.size(); i-- > 0;) {
        strides[i] = stride;
        // A tensor without elements may have sizes whose product is meaningless.
        if (__builtin_mul_overflow(stride, std::max<std::int64_t>(shape[i], 1), &stride)) stride = 1;
    }
    return strides;
}

std::string make_safetensors_header(const std::vector<SafetensorsEntry>& entries) {
    nlohmann::ordered_json header = nlohmann::ordered_json::object();
    Json strides = Json::object();
    for (const SafetensorsEntry& entry : entries) {
        if (entry.strides != row_major_strides(entry.shape)) strides[entry.name] = entry.strides;
    }
    Json empty = Json::array();
    for (const SafetensorsEntry& entry : entries) {
        if (entry.begin == entry.end) empty.push_back(entry.name);
    }
    if (!strides.empty()) header[metadata][strides_key] = strides.dump();
    if (!empty.empty()) header[metadata][empty_key] = empty.dump();
    for (const SafetensorsEntry& entry : entries) {
        header[entry.name] = {
            {"dtype", entry.dtype}, {"shape", entry.shape}, {"data_offsets", {entry.begin, entry.end}}};
    }
    std::string text = header.dump();
    // The data begins at a multiple of 8 bytes, as in the format's reference writer.
    text.append((8 - text.size() % 8) % 8, ' ');
    const std::uint64_t length = text.size();
    std::string result(safetensors_length_bytes, '\0');
    std::memcpy(result.data(), &length, sizeof(length));
    return result + text;
}

std::uint64_t safetensors_header_length(std::string_view first_bytes, std::uint64_t file_bytes,
                                        const std::string& file) {
    std::uint64_t length = 0;
    if (first_bytes.size() < sizeof(length) || file_bytes < sizeof(length)) refuse(file, "it is truncated");
    std::memcpy(&length, first_bytes.data(), sizeof(length));
    if (length > file_bytes - sizeof(length) || length > most_header) refuse(file, "it is truncated");
    return length;
}

std::vector<SafetensorsEntry> parse_safetensors_header(std::string_view header, std::uint64_t data_bytes,
                                                       const std::string& file) {
    const Json json = parse(header, file);
    std::vector<SafetensorsEntry> entries;
    for (const auto& [name, value] : json.items()) {
        if (name == metadata) continue;
        try {
            entries.push_back(read_entry(name, value));
        } catch (const Json::exception&) {
            refuse(file, "the entry of ", name, " is invalid");
        } catch (const std::invalid_argument& error) {
            refuse(file, name, ": ", error.what());
        }
    }
    const auto order = read_order(json);
    const auto key = [&order](const SafetensorsEntry& entry) {
        const auto found = order.find(entry.name);
        return std::tuple(entry.begin, entry.end, found == order.end() ? order.size() : found->second);
    };
    std::stable_sort(
        entries.begin(), entries.end(),
        [&key](const SafetensorsEntry& one, const SafetensorsEntry& other) { return key(one) < key(other); });
    std::uint64_t at = 0;
    for (const SafetensorsEntry& entry : entries) {
        if (entry.begin != at) refuse(file, "the bytes of ", entry.name, " do not follow the previous tensor");
        at = entry.end;
    }
    if (at != data_bytes) refuse(file, "its tensors take ", at, " bytes, and it has ", data_bytes);
    read_strides(json, entries);
    return entries;
}

}  // namespace microbatch
