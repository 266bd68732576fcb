// The header of a safetensors file, which says where in the file each tensor is.
#include <algorithm>
#include <cstring>
#include <string>

#include "fuzz/fuzz.h"
#include "microbatch/io/safetensors_header.h"

namespace microbatch {
namespace {

using fuzz::require;

bool same(const SafetensorsEntry& one, const SafetensorsEntry& other) {
    return one.name == other.name && one.dtype == other.dtype && one.shape == other.shape &&
           one.strides == other.strides && one.begin == other.begin && one.end == other.end;
}

/// The position of the last element, in elements; -1 if there is none.
std::int64_t last_place(const SafetensorsEntry& entry) {
    std::int64_t last = 0;
    for (std::size_t i = 0; i < entry.shape.size(); ++i) {
        if (entry.shape[i] == 0) return -1;
        last += (entry.shape[i] - 1) * entry.strides[i];
    }
    return last;
}

void check(const std::vector<SafetensorsEntry>& entries, std::uint64_t data_bytes) {
    std::uint64_t at = 0;
    for (const SafetensorsEntry& entry : entries) {
        const std::int64_t size = safetensors_element_size(entry.dtype);
        require(size > 0, "a dtype is known");
        require(entry.begin == at && entry.begin <= entry.end, "tensors follow one another");
        require(entry.strides.size() == entry.shape.size(), "each dimension has a stride");
        const std::int64_t elements = static_cast<std::int64_t>(entry.end - entry.begin) / size;
        require(last_place(entry) == elements - 1, "the elements fill the bytes, and none is beyond them");
        at = entry.end;
    }
    require(at == data_bytes, "the tensors are the data");
}

std::optional<std::vector<SafetensorsEntry>> parse(std::string_view header, std::uint64_t data_bytes) {
    return fuzz::accepted(ErrorKind::bad_data, [&] { return parse_safetensors_header(header, data_bytes, "file"); });
}

void parse_and_write_again(std::string_view header, std::uint64_t data_bytes) {
    const auto entries = parse(header, data_bytes);
    if (!entries) return;
    check(*entries, data_bytes);
    const std::string written = make_safetensors_header(*entries);
    const auto length = safetensors_header_length(written, written.size() + data_bytes, "file");
    require(length == written.size() - safetensors_length_bytes, "a header that is written is as long as it says");
    const auto again = parse(std::string_view(written).substr(safetensors_length_bytes), data_bytes);
    require(again && std::equal(entries->begin(), entries->end(), again->begin(), again->end(), same),
            "what is written reads back");
}

}  // namespace
}  // namespace microbatch

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
    using namespace microbatch;
    const std::string_view input = fuzz::characters(data, size);
    const auto length =
        fuzz::accepted(ErrorKind::bad_data, [&] { return safetensors_header_length(input, input.size(), "file"); });
    if (length) {
        const std::string_view rest = input.substr(safetensors_length_bytes);
        parse_and_write_again(rest.substr(0, *length), rest.size() - *length);
    }
    // As a header alone, of a file as large as the first bytes say: so that offsets need not fit a small input.
    std::uint64_t data_bytes = 0;
    if (size < sizeof data_bytes) return 0;
    std::memcpy(&data_bytes, data, sizeof data_bytes);
    parse_and_write_again(input.substr(sizeof data_bytes), data_bytes);
    return 0;
}
