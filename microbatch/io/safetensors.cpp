#include "microbatch/io/safetensors.h"

#include <ATen/core/grad_mode.h>
#include <ATen/ops/empty.h>

#include <algorithm>
#include <bit>
#include <cstdint>
#include <fstream>
#include <nlohmann/json.hpp>
#include <optional>
#include <stdexcept>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

#include "microbatch/core/error.h"
#include "microbatch/core/text.h"

namespace microbatch {
namespace {

static_assert(std::endian::native == std::endian::little, "tensors are written as they lie in memory");

struct NamedType {
    const char* name;
    at::ScalarType type;
};

constexpr NamedType types[] = {{"F64", at::kDouble}, {"F32", at::kFloat}, {"F16", at::kHalf},  {"BF16", at::kBFloat16},
                               {"I64", at::kLong},   {"I32", at::kInt},   {"I16", at::kShort}, {"I8", at::kChar},
                               {"U8", at::kByte},    {"BOOL", at::kBool}};

const char* dtype_name(const Parameter& tensor) {
    for (const auto& [name, type] : types) {
        if (type == tensor.tensor.scalar_type()) return name;
    }
    throw Error(ErrorKind::usage,
                text(tensor.name, " is ", tensor.tensor.scalar_type(), ", which safetensors cannot hold"));
}

std::string make_header(const Parameters& tensors) {
    nlohmann::ordered_json header = nlohmann::ordered_json::object();
    std::int64_t offset = 0;
    for (const Parameter& tensor : tensors) {
        if (header.contains(tensor.name)) throw Error(ErrorKind::usage, text("two tensors are named ", tensor.name));
        const auto bytes = static_cast<std::int64_t>(tensor.tensor.nbytes());
        header[tensor.name] = {{"dtype", dtype_name(tensor)},
                               {"shape", tensor.tensor.sizes().vec()},
                               {"data_offsets", {offset, offset + bytes}}};
        offset += bytes;
    }
    std::string text = header.dump();
    // The data begins at a multiple of 8 bytes, as the format's own writer has it.
    text.append((8 - text.size() % 8) % 8, ' ');
    return text;
}

void write_all(const std::filesystem::path& path, const std::string& header, const Parameters& tensors) {
    std::ofstream file(path, std::ios::binary | std::ios::trunc);
    const std::uint64_t length = header.size();
    file.write(reinterpret_cast<const char*>(&length), sizeof(length));
    file << header;
    for (const Parameter& tensor : tensors) {
        const at::Tensor data = tensor.tensor.detach().cpu().contiguous();
        file.write(static_cast<const char*>(data.const_data_ptr()), static_cast<std::streamsize>(data.nbytes()));
    }
    file.close();
    if (!file) {
        throw Error(ErrorKind::usage,
                    text("cannot write ", path.string(), ": is the folder there and the disk not full?"));
    }
}

// The format's own limit.
constexpr std::uint64_t most_header = 100'000'000;

[[noreturn]] void refuse(const std::filesystem::path& path, const std::string& why) {
    throw Error(ErrorKind::bad_data, text(path.string(), " is not a sound safetensors file: ", why));
}

/// Where in the data a tensor is.
struct Entry {
    std::string name;
    at::ScalarType type;
    std::vector<std::int64_t> shape;
    std::uint64_t begin, end;
};

// Of the shape; none where it leaves 63 bits.
std::optional<std::uint64_t> bytes_of(const Entry& entry) {
    std::int64_t count = static_cast<std::int64_t>(c10::elementSize(entry.type));
    for (const std::int64_t size : entry.shape) {
        if (size < 0 || __builtin_mul_overflow(count, size, &count)) return std::nullopt;
    }
    return static_cast<std::uint64_t>(count);
}

Entry read_entry(const std::string& name, const nlohmann::json& json) {
    const std::string dtype = json.at("dtype");
    const auto* const known =
        std::find_if(std::begin(types), std::end(types), [&](const NamedType& one) { return dtype == one.name; });
    if (known == std::end(types)) throw std::invalid_argument("its dtype is " + dtype);
    const auto offsets = json.at("data_offsets").get<std::vector<std::uint64_t>>();
    if (offsets.size() != 2 || offsets[0] > offsets[1]) throw std::invalid_argument("its offsets are no stretch");
    for (const auto& number : json.at("data_offsets")) {
        if (!number.is_number_unsigned()) throw std::invalid_argument("its offsets are no stretch");
    }
    for (const auto& number : json.at("shape")) {
        if (!number.is_number_unsigned()) throw std::invalid_argument("its shape is none");
    }
    Entry entry{name, known->type, json.at("shape").get<std::vector<std::int64_t>>(), offsets[0], offsets[1]};
    if (entry.shape.size() > 64) throw std::invalid_argument("its shape has too many dimensions");
    if (bytes_of(entry) != entry.end - entry.begin) throw std::invalid_argument("its shape and its bytes differ");
    return entry;
}

// In the order of their bytes, which have no holes and end with the file.
std::vector<Entry> read_entries(const std::filesystem::path& path, const std::string& header, std::uint64_t data) {
    std::vector<Entry> entries;
    nlohmann::json json;
    try {
        json = nlohmann::json::parse(header);
    } catch (const nlohmann::json::exception&) {
        refuse(path, "its header is no JSON");
    }
    if (!json.is_object()) refuse(path, "its header is no JSON object");
    for (const auto& [name, value] : json.items()) {
        if (name == "__metadata__") continue;
        try {
            entries.push_back(read_entry(name, value));
        } catch (const nlohmann::json::exception&) {
            refuse(path, text("the entry of ", name, " is not as the format has it"));
        } catch (const std::invalid_argument& error) {
            refuse(path, text(name, ": ", error.what()));
        }
    }
    std::sort(entries.begin(), entries.end(), [](const Entry& one, const Entry& other) {
        return std::pair(one.begin, one.end) < std::pair(other.begin, other.end);
    });
    std::uint64_t at = 0;
    for (const Entry& entry : entries) {
        if (entry.begin != at) refuse(path, text("the bytes of ", entry.name, " do not follow those before them"));
        at = entry.end;
    }
    if (at != data) refuse(path, text("its tensors take ", at, " bytes, and it has ", data));
    return entries;
}

}  // namespace

Parameters read_safetensors(const std::filesystem::path& path) {
    std::error_code failure;
    const std::uint64_t size = std::filesystem::file_size(path, failure);
    std::ifstream file(path, std::ios::binary);
    if (failure || !file) throw Error(ErrorKind::bad_data, text("cannot read ", path.string()));
    std::uint64_t length = 0;
    file.read(reinterpret_cast<char*>(&length), sizeof(length));
    if (!file || length > size - sizeof(length) || length > most_header)
        refuse(path, "it is cut short, or none at all");
    std::string header(length, ' ');
    file.read(header.data(), static_cast<std::streamsize>(length));
    Parameters tensors;
    for (const Entry& entry : read_entries(path, header, size - sizeof(length) - length)) {
        const at::Tensor tensor = at::empty(entry.shape, entry.type);
        file.read(static_cast<char*>(tensor.mutable_data_ptr()), static_cast<std::streamsize>(tensor.nbytes()));
        if (!file) refuse(path, text("the bytes of ", entry.name, " cannot be read"));
        tensors.push_back({entry.name, tensor});
    }
    return tensors;
}

void copy_by_name(const Parameters& from, const Parameters& to, const std::string& what) {
    const auto refuse_tensor = [&](const auto&... words) {
        throw Error(ErrorKind::bad_data, text(what, ": ", words...));
    };
    std::unordered_map<std::string, at::Tensor> found;
    for (const Parameter& one : from) found.emplace(one.name, one.tensor);
    for (const Parameter& one : to) {
        const auto at = found.find(one.name);
        if (at == found.end()) refuse_tensor("there is no ", one.name);
        if (at->second.sizes() != one.tensor.sizes() || at->second.scalar_type() != one.tensor.scalar_type()) {
            refuse_tensor(one.name, " is ", at->second.scalar_type(), " of shape ", at->second.sizes(), ", not ",
                          one.tensor.scalar_type(), " of shape ", one.tensor.sizes());
        }
    }
    if (found.size() > to.size()) refuse_tensor("there are ", found.size(), " tensors for ", to.size());
    const at::NoGradGuard no_grad;
    for (const Parameter& one : to) at::Tensor(one.tensor).copy_(found.at(one.name));
}

void write_safetensors(const std::filesystem::path& path, const Parameters& tensors) {
    const std::string header = make_header(tensors);
    const std::filesystem::path temporary = path.string() + ".part";
    try {
        write_all(temporary, header, tensors);
        std::filesystem::rename(temporary, path);
    } catch (const std::exception& error) {
        std::error_code ignored;
        std::filesystem::remove(temporary, ignored);
        if (dynamic_cast<const std::filesystem::filesystem_error*>(&error) == nullptr) throw;
        throw Error(ErrorKind::usage, text("cannot write ", path.string(), ": ", error.what()));
    }
}

}  // namespace microbatch
