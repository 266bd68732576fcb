#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

namespace microbatch {

/// Where in a safetensors file a tensor is.
struct SafetensorsEntry {
    std::string name;
    std::string dtype;  ///< as the format names it: "F32"
    std::vector<std::int64_t> shape;
    std::vector<std::int64_t> strides;  ///< in elements, as it lay in memory; of no meaning in the file
    std::uint64_t begin = 0, end = 0;   ///< bytes, from the end of the header
};

/// Bytes of an element; 0 for a dtype that is not known.
std::int64_t safetensors_element_size(std::string_view dtype);

/// The strides of a tensor that lies in row-major order.
std::vector<std::int64_t> row_major_strides(const std::vector<std::int64_t>& shape);

/// The header of a file with these tensors, its length and all: what comes before their bytes. Strides that are not
/// those of row-major order, and the order of tensors without elements, are in its metadata, which other readers pass
/// over.
/// Requires: begin and end are right, names are given once.
std::string make_safetensors_header(const std::vector<SafetensorsEntry>& entries);

/// Bytes of the length that a file begins with.
inline constexpr std::uint64_t safetensors_length_bytes = 8;

/// How long the header is that follows these 8 bytes, in a file of so many bytes.
/// Errors: ErrorKind::bad_data if the file cannot hold it, or it is beyond the format's limit of 100 MB; `file` is the
///         name for the message.
std::uint64_t safetensors_header_length(std::string_view first_bytes, std::uint64_t file_bytes,
                                        const std::string& file);

/// The entries of a header, in the order of their bytes. It is not trusted: shapes, offsets and the `data_bytes` that
/// follow it are held against each other.
///
/// Memory: some ten times the header's text.
/// Errors: ErrorKind::bad_data, saying what is wrong, if it is not as the format has it: no JSON, a dtype that is not
///         known, offsets that overlap, leave holes, do not fit the shape or do not end with the data.
std::vector<SafetensorsEntry> parse_safetensors_header(std::string_view header, std::uint64_t data_bytes,
                                                       const std::string& file);

}  // namespace microbatch
