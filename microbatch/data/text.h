#pragma once

#include <cstdint>
#include <filesystem>
#include <string>
#include <vector>

#include "microbatch/data/listing.h"

namespace microbatch {

/// What a folder holds that was not read, for one reason.
struct LeftOut {
    std::string what;  ///< such as "link"; takes an s in the plural
    std::int64_t count = 0;
    std::uint64_t bytes = 0;         ///< of files; of folders and links it is 0
    std::vector<std::string> names;  ///< the first three, relative to the folder
};

/// Text as it was read.
struct Text {
    std::vector<std::uint8_t> bytes;
    DataListing files;
    std::vector<LeftOut> left_out;
};

/// The bytes of a text file, or of all text files below a folder, one after the other in sorted path order.
///
/// Of a folder these are left out, and counted: symbolic links, hidden files and folders (a leading dot), empty and
/// binary files (see format_of), UTF-16 text, folders of runs (metrics.jsonl and config.toml), datasets of Hugging Face
/// (dataset_info.json and state.json) and, if the folder itself is a run's, what the run wrote into it. The path itself
/// may be a link or hidden.
///
/// most_bytes: what the text may take of memory.
/// Errors: ErrorKind::bad_data if the path is missing or unreadable, a file is empty or of another format, a folder
///         holds no text or is a dataset of Hugging Face, or a file or folder below it cannot be read; if there is more
///         than `most_bytes`, before any memory is taken for it; as InputFile::read.
/// Cost:   all the text in memory, and no more than that meanwhile.
Text read_text(const std::filesystem::path& path, std::uint64_t most_bytes);

/// "43 binary files (art.dat, debian.dat, food.dat and 40 more), 1 link (art.u8)"; empty if nothing was left out.
std::string describe(const std::vector<LeftOut>& left_out);

}  // namespace microbatch
