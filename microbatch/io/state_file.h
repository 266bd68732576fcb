#pragma once

#include <filesystem>

#include "microbatch/state/state_dict.h"

namespace microbatch {

/// The same state with its tensors in a new file, which is deleted with the last of them: they take no memory, and are
/// read on demand.
/// Memory: one tensor at a time, if it is in a file or not contiguous.
/// Errors: ErrorKind::usage if the file exists already, or cannot be written completely (disk full, read-only); nothing
///         remains of it then. Reading: ErrorKind::bad_data if the file has changed.
StateDict moved_to_file(const StateDict& state, const std::filesystem::path& file);

}  // namespace microbatch
