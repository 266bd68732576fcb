#pragma once

#include <cstdint>
#include <filesystem>
#include <vector>

namespace microbatch {

/// An array of bytes in row-major order.
struct IdxArray {
    std::vector<std::int64_t> shape;
    std::vector<std::uint8_t> bytes;
};

/// The content of an IDX file of unsigned bytes (the format of MNIST and related datasets). Gzip is detected from the
/// content.
///
/// dimensions: the number of dimensions that the file must have: 3 for images, 1 for labels.
/// most_bytes: the most memory that the array may take.
/// Errors: ErrorKind::usage if dimensions is not in [1, 255]; ErrorKind::bad_data if the file cannot be opened (see
///         InputFile), is empty, has another magic number, element type or number of dimensions, a dimension of 0, a
///         header that claims more than `most_bytes` (before any data is read), fewer or more bytes than its header
///         claims, or a corrupted gzip stream.
/// Cost:   memory for the content of the file, not for what its header claims, and half a MiB to decompress it.
IdxArray read_idx(const std::filesystem::path& path, int dimensions, std::uint64_t most_bytes);

}  // namespace microbatch
