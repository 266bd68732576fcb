#pragma once

#include <cstdint>
#include <filesystem>
#include <vector>

namespace microbatch {

/// The bytes of a text file, or of all text files below a folder, one after the other in sorted path order.
///
/// Of a folder only regular files count: symbolic links, hidden files and folders (a leading dot) and binary files (a
/// NUL byte in the first 8 KiB) are left out. The path itself may be a link or hidden.
///
/// most_bytes: what the text may take of memory.
/// Errors: ErrorKind::bad_data if the path is missing or unreadable, a file is empty or binary, a folder holds no text,
///         or a file or folder below it cannot be read (nothing is left out silently for lack of permission); if there
///         is more than `most_bytes`, before any memory is taken for it; as InputFile::read.
/// Cost:   all the text in memory, and no more than that meanwhile.
std::vector<std::uint8_t> read_text(const std::filesystem::path& path, std::uint64_t most_bytes);

}  // namespace microbatch
