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

/// The content of an IDX file of unsigned bytes (the format of MNIST and its kin), gzipped or not: told by the content.
///
/// dimensions: how many the file must have: 3 for images, 1 for labels.
/// most_bytes: what the array may take of memory.
/// Errors: ErrorKind::usage if dimensions is not in [1, 255]; ErrorKind::bad_data if the file cannot be opened (see
///         InputFile), is empty, has another magic number, element type or number of dimensions, a dimension of 0,
///         a header that announces more than `most_bytes` (before any of it is read), fewer or more bytes than its
///         header announces, or a damaged gzip stream.
/// Cost:   memory for what the file holds, not for what its header claims, and half a MiB to decompress it.
IdxArray read_idx(const std::filesystem::path& path, int dimensions, std::uint64_t most_bytes);

}  // namespace microbatch
