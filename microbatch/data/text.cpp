#include "microbatch/data/text.h"

#include <algorithm>
#include <cstddef>
#include <span>
#include <string>
#include <system_error>

#include "microbatch/core/error.h"
#include "microbatch/core/text.h"
#include "microbatch/data/mapped_file.h"

namespace microbatch {
namespace {

namespace fs = std::filesystem;

constexpr std::size_t binary_check_bytes = 8192;

bool is_binary(std::span<const std::byte> bytes) {
    const auto head = bytes.first(std::min(bytes.size(), binary_check_bytes));
    return std::find(head.begin(), head.end(), std::byte{0}) != head.end();
}

void append(std::vector<std::uint8_t>& all, std::span<const std::byte> bytes) {
    const auto* begin = reinterpret_cast<const std::uint8_t*>(bytes.data());
    all.insert(all.end(), begin, begin + bytes.size());
}

void check_walk(const std::error_code& error, const fs::path& folder) {
    if (error) {
        throw Error(ErrorKind::bad_data, text("cannot read the folder ", folder.string(), ": ", error.message()));
    }
}

/// Regular files below the folder, hidden ones and links left out, sorted: the system lists them in any order.
std::vector<fs::path> files_below(const fs::path& folder) {
    std::vector<fs::path> files;
    std::error_code error;
    fs::recursive_directory_iterator entry(folder, error);
    check_walk(error, folder);
    while (entry != fs::recursive_directory_iterator()) {
        const fs::path path = entry->path();
        const fs::file_status status = entry->symlink_status(error);
        check_walk(error, path);
        const bool hidden = path.filename().native().starts_with('.');
        if (hidden) entry.disable_recursion_pending();
        if (!hidden && fs::is_regular_file(status)) files.push_back(path);
        entry.increment(error);
        check_walk(error, path);
    }
    std::sort(files.begin(), files.end());
    return files;
}

}  // namespace

std::vector<std::uint8_t> read_text(const fs::path& path) {
    std::vector<std::uint8_t> all;
    std::error_code ignored;  // what cannot be looked at is reported by opening it
    if (fs::is_directory(path, ignored)) {
        for (const fs::path& name : files_below(path)) {
            const MappedFile file(name);
            if (!is_binary(file.bytes())) append(all, file.bytes());
        }
        if (all.empty()) {
            throw Error(ErrorKind::bad_data, text("the folder ", path.string(),
                                                  " holds no text: give one with text "
                                                  "files that are not empty, hidden, binary or links"));
        }
        return all;
    }
    const MappedFile file(path);
    if (file.bytes().empty()) throw Error(ErrorKind::bad_data, text(path.string(), " is empty: give a file with text"));
    if (is_binary(file.bytes())) {
        throw Error(ErrorKind::bad_data, text(path.string(),
                                              " is not text (it has a NUL byte): give a text file, "
                                              "a .bin of uint16 tokens or a folder with IDX images and labels"));
    }
    append(all, file.bytes());
    return all;
}

}  // namespace microbatch
