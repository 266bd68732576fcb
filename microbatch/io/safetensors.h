#pragma once

#include <filesystem>
#include <string>
#include <utility>
#include <vector>

#include "microbatch/io/file_system.h"
#include "microbatch/state/state_dict.h"
#include "microbatch/state/stored_tensor.h"

namespace microbatch {

/// Writes named tensors as a safetensors file, which Python's `safetensors` reads: to a temporary name beside it first,
/// then renamed, so that the file is whole or not there.
///
/// Source: the safetensors format: length of the header (uint64, little-endian), JSON header, the tensors' bytes.
/// Shapes: any; written contiguous, from whatever device. dtypes: float64, float32, float16, bfloat16, int64, int32,
///         int16, int8, uint8, bool.
/// Errors: ErrorKind::usage for another dtype, a name that is listed twice or reserved by the format
///         (`__metadata__`), or a file that cannot be written; the file
///         that was there before stays then.
void write_safetensors(const std::filesystem::path& path, const NamedTensors& tensors);

/// Handles of tensors, by name.
using StoredTensors = std::vector<std::pair<std::string, StoredTensor>>;

/// The same into a file that is open, and left open; how the tensors lay in memory is in its metadata.
/// Memory: one tensor at a time, where it has to be fetched or laid out anew.
void write_safetensors(OutputFile& file, const StoredTensors& tensors);

/// The tensors of a safetensors file, each read, on the CPU, when it is asked for: the file stays open as long as one
/// of them is held. The file is not trusted: lengths, shapes and offsets are held against each other and the file
/// before anything is made of them. In the order of their bytes, laid out as their metadata has it.
///
/// Memory: the header, of at most 100 MB, some ten times.
/// Errors: ErrorKind::bad_data, naming the file and what is wrong with it, if it is not there, cut short, or not as the
///         format has it (a dtype that write_safetensors() does not write, offsets that overlap, leave holes or do not
///         fit the shape); from get(), too, if it cannot be read any more.
StoredTensors open_safetensors(const std::filesystem::path& path);

/// Every tensor of a file. Errors: as open_safetensors().
NamedTensors read_safetensors(const std::filesystem::path& path);

/// Copies tensors into those of the same names.
/// Errors: ErrorKind::bad_data, naming the tensor, if one is missing, too many, or of another shape or dtype; nothing
///         has changed then. `what` begins the message.
void copy_by_name(const NamedTensors& from, const NamedTensors& to, const std::string& what);

/// The same state with its tensors in a new file, which is removed with the last of them: they take no memory, and are
/// read when asked for.
/// Memory: one tensor at a time, where it is elsewhere or not contiguous.
/// Errors: ErrorKind::usage if there is a file of that name already, or it cannot be written whole (disk full,
///         read-only); nothing is left of it then. Reading: ErrorKind::bad_data if the file is not as it was written.
StateDict moved_to_file(const StateDict& state, const std::filesystem::path& file);

}  // namespace microbatch
