#pragma once

#include <filesystem>

#include "microbatch/state/state_dict.h"

namespace microbatch {

/// The same state with its tensors in a new file, which is removed with the last of them: they take no memory, and are
/// read when asked for.
/// Memory: one tensor at a time, where it is elsewhere or not contiguous.
/// Errors: ErrorKind::usage if there is a file of that name already, or it cannot be written whole (disk full,
///         read-only); nothing is left of it then. Reading: ErrorKind::bad_data if the file is not as it was written.
StateDict moved_to_file(const StateDict& state, const std::filesystem::path& file);

}  // namespace microbatch
