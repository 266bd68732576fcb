#pragma once

#include <filesystem>
#include <string>
#include <utility>
#include <vector>

#include "microbatch/io/file_system.h"
#include "microbatch/state/state_dict.h"
#include "microbatch/state/stored_tensor.h"

namespace microbatch {

/// Writes named tensors as a safetensors file, which Python's `safetensors` reads: to a temporary name first, then
/// renamed, so that the file is either complete or absent.
///
/// Source: the safetensors format: length of the header (uint64, little-endian), JSON header, the tensors' bytes.
/// Shapes: any; written contiguous, from any device. dtypes: float64, float32, float16, bfloat16, int64, int32, int16,
///         int8, uint8, bool.
/// Errors: ErrorKind::usage for another dtype, a name that is used twice or is reserved by the format (`__metadata__`),
///         or a file that cannot be written; the previous file is then unchanged.
void write_safetensors(const std::filesystem::path& path, const NamedTensors& tensors);

/// Tensor handles by name.
using StoredTensors = std::vector<std::pair<std::string, StoredTensor>>;

/// Writes to an open file, which stays open; the metadata records the memory layout of the tensors.
/// Memory: one tensor at a time, if it has to be loaded or made contiguous.
void write_safetensors(OutputFile& file, const StoredTensors& tensors);

/// The tensors of a safetensors file, each read on demand, on the CPU: the file stays open while any of them exists.
/// The file is not trusted: lengths, shapes and offsets are checked against each other and the file before anything is
/// created from them. The tensors are in the order of their bytes, with the layout from their metadata.
///
/// Memory: about ten times the header, which has at most 100 MB.
/// Errors: ErrorKind::bad_data, naming the file and what is wrong, if it is missing, truncated or invalid (a dtype that
///         write_safetensors() does not write; offsets that overlap, leave gaps or do not match the shape); also from
///         get(), if the file can no longer be read.
StoredTensors open_safetensors(const std::filesystem::path& path);

/// Reads every tensor of a file. Errors: as open_safetensors().
NamedTensors read_safetensors(const std::filesystem::path& path);

/// Copies tensors to those of the same names.
/// Errors: ErrorKind::bad_data, naming the tensor, if one is missing, unknown, or of a different shape or dtype;
///         nothing has changed then. `what` is the start of the message.
void copy_by_name(const NamedTensors& from, const NamedTensors& to, const std::string& what);

/// The same state with its tensors in a new file, which is deleted with the last of them: they take no memory, and are
/// read on demand.
/// Memory: one tensor at a time, if it is in a file or not contiguous.
/// Errors: ErrorKind::usage if the file exists already, or cannot be written completely (disk full, read-only); nothing
///         remains of it then. Reading: ErrorKind::bad_data if the file has changed.
StateDict moved_to_file(const StateDict& state, const std::filesystem::path& file);

}  // namespace microbatch
