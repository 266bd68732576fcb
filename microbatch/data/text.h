#pragma once

#include <cstdint>
#include <filesystem>
#include <string>
#include <vector>

#include "microbatch/data/listing.h"

namespace microbatch {

/// Entries of a folder that were skipped for the same reason.
struct LeftOut {
    std::string what;  ///< such as "link"; the plural has an s
    std::int64_t count = 0;
    std::uint64_t bytes = 0;         ///< of files; 0 for folders and links
    std::vector<std::string> names;  ///< the first three, relative to the folder
};

/// Text that was read.
struct Text {
    std::vector<std::uint8_t> bytes;
    DataListing files;
    std::vector<LeftOut> left_out;
};

/// The bytes of a text file, or of all text files below a folder, one after the other in sorted path order.
///
/// In a folder, these are skipped and counted: symbolic links, hidden files and folders (a leading dot), empty and
/// binary files (see format_of), UTF-16 text, folders of runs (metrics.jsonl and config.toml), Hugging Face datasets
/// (dataset_info.json and state.json) and, if the folder itself is a run's, the files of the run. The path itself may
/// be a link or hidden.
///
/// most_bytes: the most memory that the text may take.
/// Errors: ErrorKind::bad_data if the path is missing or unreadable, a file is empty or of another format, a folder has
///         no text or is a Hugging Face dataset, or a file or folder below it cannot be read; if there is more text
///         than `most_bytes`, before any memory is allocated for it; as InputFile::read.
/// Cost:   all the text in memory, and nothing more while reading.
Text read_text(const std::filesystem::path& path, std::uint64_t most_bytes);

/// "43 binary files (art.dat, debian.dat, food.dat and 40 more), 1 link (art.u8)"; empty if nothing was skipped.
std::string describe(const std::vector<LeftOut>& left_out);

}  // namespace microbatch
