#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

namespace microbatch {

/// The position of a tensor in a safetensors file.
struct SafetensorsEntry {
    std::string name;
    std::string dtype;  ///< the format's name: "F32"
    std::vector<std::int64_t> shape;
    std::vector<std::int64_t> strides;  ///< in elements, as in memory; not used for the layout in the file
    std::uint64_t begin = 0, end = 0;   ///< bytes, from the end of the header
};

/// Bytes per element; 0 for an unknown dtype.
std::int64_t safetensors_element_size(std::string_view dtype);

/// The strides of a tensor in row-major order.
std::vector<std::int64_t> row_major_strides(const std::vector<std::int64_t>& shape);

/// The header of a file with these tensors, including its length: everything before their bytes. Strides that are not
/// row-major, and the order of tensors without elements, are in its metadata, which other readers ignore.
/// Requires: begin and end are correct, and names are unique.
std::string make_safetensors_header(const std::vector<SafetensorsEntry>& entries);

/// The number of bytes of the length at the start of a file.
inline constexpr std::uint64_t safetensors_length_bytes = 8;

/// The length of the header that follows these 8 bytes, in a file of this size.
/// Errors: ErrorKind::bad_data if the file is too small for it, or it exceeds the format's limit of 100 MB; `file` is
///         the name for the message.
std::uint64_t safetensors_header_length(std::string_view first_bytes, std::uint64_t file_bytes,
                                        const std::string& file);

/// The entries of a header, in the order of their bytes. The text is not trusted: shapes, offsets and `data_bytes` are
/// checked against each other.
///
/// Memory: about ten times the header's text.
/// Errors: ErrorKind::bad_data, saying what is wrong, if it is invalid: not JSON, an unknown dtype, offsets that
///         overlap, leave gaps, do not match the shape or do not end with the data.
std::vector<SafetensorsEntry> parse_safetensors_header(std::string_view header, std::uint64_t data_bytes,
                                                       const std::string& file);

}  // namespace microbatch
