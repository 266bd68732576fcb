#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace microbatch {

/// A file that contains data.
struct DataFile {
    std::string name;            ///< relative to the opened folder
    std::uint64_t bytes = 0;     ///< of data: without the header, uncompressed
    std::uint32_t checksum = 0;  ///< CRC-32C of these bytes

    bool operator==(const DataFile&) const = default;
};

/// The files of a dataset: a run stores this list, to report later how its data has changed.
struct DataListing {
    /// Further files are counted but not listed, because a checkpoint stores the list.
    static constexpr std::size_t most_files = 256;

    std::vector<DataFile> files;  ///< in reading order
    std::int64_t count = 0;       ///< of all files
    std::uint64_t bytes = 0;      ///< of all files

    void add(DataFile file);
    bool operator==(const DataListing&) const = default;
};

/// How the data has changed, in one line: which files are new, missing or different, and their sizes in bytes. Names at
/// most three files. Empty if the listings are equal, or if one of them is empty.
std::string describe_difference(const DataListing& before, const DataListing& now);

/// "a, b, c and 40 more": the first three of `count` names; `names` has the first ones.
std::string list_names(const std::vector<std::string>& names, std::int64_t count);
std::string list_names(const std::vector<std::string>& names);

}  // namespace microbatch
