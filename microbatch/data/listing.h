#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace microbatch {

/// A file that data comes from.
struct DataFile {
    std::string name;            ///< relative to the folder that was opened
    std::uint64_t bytes = 0;     ///< of data: without a header, unpacked
    std::uint32_t checksum = 0;  ///< CRC-32C of them

    bool operator==(const DataFile&) const = default;
};

/// The files that data comes from: a run keeps this, to say later how its data has changed.
struct DataListing {
    /// More are counted but not listed: a checkpoint holds the listing.
    static constexpr std::size_t most_files = 256;

    std::vector<DataFile> files;  ///< in the order in which they are read
    std::int64_t count = 0;       ///< of all files
    std::uint64_t bytes = 0;      ///< of all files

    void add(DataFile file);
    bool operator==(const DataListing&) const = default;
};

/// How the data has changed, in one line: which files are new, gone or different, and their sizes in bytes. At most
/// three files are named. Empty if the listings are equal, or if one of them lists nothing.
std::string describe_difference(const DataListing& before, const DataListing& now);

/// "a, b, c and 40 more": the first three of `count` names, of which `names` has the first.
std::string list_names(const std::vector<std::string>& names, std::int64_t count);
std::string list_names(const std::vector<std::string>& names);

}  // namespace microbatch
