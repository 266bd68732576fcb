#pragma once

#include <filesystem>

#include "microbatch/optim/parameters.h"

namespace microbatch {

/// Writes named tensors as a safetensors file, which Python's `safetensors` reads: to a temporary name beside it first,
/// then renamed, so that the file is whole or not there.
///
/// Source: the safetensors format: length of the header (uint64, little-endian), JSON header, the tensors' bytes.
/// Shapes: any; written contiguous, from whatever device. dtypes: float64, float32, float16, bfloat16, int64, int32,
///         int16, int8, uint8, bool.
/// Errors: ErrorKind::usage for another dtype, a name that stands twice, or a file that cannot be written; the file
///         that was there before stays then.
void write_safetensors(const std::filesystem::path& path, const Parameters& tensors);

}  // namespace microbatch
