#include "microbatch/data/text.h"

#include <algorithm>
#include <array>
#include <cstddef>
#include <span>
#include <string>
#include <system_error>

#include "microbatch/core/error.h"
#include "microbatch/core/str_cat.h"
#include "microbatch/core/units.h"
#include "microbatch/io/input_file.h"

namespace microbatch {
namespace {

namespace fs = std::filesystem;

constexpr std::size_t binary_check_bytes = 8192;

bool is_binary(const InputFile& file) {
    std::array<std::byte, binary_check_bytes> bytes{};
    const auto head =
        std::span(bytes).first(static_cast<std::size_t>(std::min<std::uint64_t>(bytes.size(), file.size())));
    file.read(0, head);
    return std::find(head.begin(), head.end(), std::byte{0}) != head.end();
}

void check_walk(const std::error_code& error, const fs::path& folder) {
    if (error) {
        throw Error(ErrorKind::bad_data, str_cat("cannot read the folder ", folder.string(), ": ", error.message()));
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

struct TextFile {
    fs::path path;
    std::uint64_t size;
};

/// Those of the files that are text, without the empty ones.
std::vector<TextFile> text_among(const std::vector<fs::path>& paths) {
    std::vector<TextFile> found;
    for (const fs::path& path : paths) {
        const InputFile file(path);
        if (file.size() > 0 && !is_binary(file)) found.push_back({path, file.size()});
    }
    return found;
}

/// The file as a list of one. Errors: ErrorKind::bad_data if it is empty or binary.
std::vector<TextFile> only_text(const fs::path& path) {
    const InputFile file(path);
    if (file.size() == 0) throw Error(ErrorKind::bad_data, str_cat(path.string(), " is empty: give a file with text"));
    if (is_binary(file)) {
        throw Error(ErrorKind::bad_data, str_cat(path.string(),
                                                 " is not text (it has a NUL byte): give a text file, "
                                                 "a .bin of uint16 tokens or a folder with IDX images and labels"));
    }
    return {{path, file.size()}};
}

/// The sum of the sizes. Errors: ErrorKind::bad_data if it is above `most`.
std::size_t total_size(const std::vector<TextFile>& files, const fs::path& path, std::uint64_t most) {
    std::uint64_t total = 0;
    for (const TextFile& file : files) {
        if (file.size > most - total) {
            throw Error(
                ErrorKind::bad_data,
                str_cat(path.string(), " holds more text than the ", format_bytes(static_cast<std::int64_t>(most)),
                        " of memory that it may take: give less, or a .bin of uint16 tokens, "
                        "which is not kept in memory"));
        }
        total += file.size;
    }
    return static_cast<std::size_t>(total);
}

}  // namespace

std::vector<std::uint8_t> read_text(const fs::path& path, std::uint64_t most_bytes) {
    std::error_code ignored;  // what cannot be looked at is reported by opening it
    const bool folder = fs::is_directory(path, ignored);
    const auto files = folder ? text_among(files_below(path)) : only_text(path);
    if (files.empty()) {
        throw Error(ErrorKind::bad_data, str_cat("the folder ", path.string(),
                                                 " holds no text: give one with text "
                                                 "files that are not empty, hidden, binary or links"));
    }
    std::vector<std::uint8_t> all(total_size(files, path, most_bytes));
    std::span<std::byte> rest = std::as_writable_bytes(std::span(all));
    for (const TextFile& file : files) {
        // By the size that was counted: what a file has grown by meanwhile is not read.
        InputFile(file.path).read(0, rest.first(static_cast<std::size_t>(file.size)));
        rest = rest.subspan(static_cast<std::size_t>(file.size));
    }
    return all;
}

}  // namespace microbatch
