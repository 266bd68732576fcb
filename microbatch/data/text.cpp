#include "microbatch/data/text.h"

#include <algorithm>
#include <array>
#include <cstddef>
#include <span>
#include <string_view>
#include <system_error>

#include "microbatch/core/crc32c.h"
#include "microbatch/core/error.h"
#include "microbatch/core/str_cat.h"
#include "microbatch/core/units.h"
#include "microbatch/data/file_format.h"
#include "microbatch/io/input_file.h"

namespace microbatch {
namespace {

namespace fs = std::filesystem;

bool has(const fs::path& folder, const char* name) {
    std::error_code ignored;  // the walk reports errors
    return fs::exists(folder / name, ignored);
}

bool is_run(const fs::path& folder) {
    return has(folder, "metrics.jsonl") && has(folder, "config.toml");
}

bool is_dataset(const fs::path& folder) {
    return has(folder, "dataset_dict.json") || (has(folder, "dataset_info.json") && has(folder, "state.json"));
}

/// True if a run writes a file or folder of this name into its own folder.
bool is_of_a_run(const std::string& name) {
    constexpr std::array<std::string_view, 6> whole{"config.toml", "metrics.jsonl",     "summary.json",
                                                    "report.html", "model.safetensors", "checkpoints"};
    return std::find(whole.begin(), whole.end(), name) != whole.end() || name.starts_with("events.out.tfevents.") ||
           (name.starts_with("snapshot-") && name.ends_with(".bin"));
}

void check_walk(const std::error_code& error, const fs::path& folder) {
    if (error) throw Error(ErrorKind::bad_data, "cannot read the folder ", folder.string(), ": ", error.message());
}

/// Why a file or folder is skipped without opening it; null if it is not.
const char* reason_to_leave_out(const fs::path& path, const fs::file_status& status, bool top_of_a_run) {
    if (path.filename().native().starts_with('.')) return "hidden name";
    if (fs::is_symlink(status)) return "link";
    if (top_of_a_run && is_of_a_run(path.filename().string())) return "file of this run";
    if (fs::is_regular_file(status)) return nullptr;
    if (!fs::is_directory(status)) return "special file";
    if (is_run(path)) return "run folder";
    return is_dataset(path) ? "Hugging Face dataset" : nullptr;
}

struct Entry {
    fs::path path;
    const char* left_out;  ///< why; null for a regular file
};

/// Regular files below the folder and skipped entries, sorted, because the system lists them in any order.
std::vector<Entry> entries_below(const fs::path& folder) {
    const bool of_a_run = is_run(folder);
    std::vector<Entry> entries;
    std::error_code error;
    fs::recursive_directory_iterator entry(folder, error);
    check_walk(error, folder);
    while (entry != fs::recursive_directory_iterator()) {
        const fs::path path = entry->path();
        const fs::file_status status = entry->symlink_status(error);
        check_walk(error, path);
        const char* reason = reason_to_leave_out(path, status, of_a_run && entry.depth() == 0);
        if (reason != nullptr) entry.disable_recursion_pending();
        if (reason != nullptr || fs::is_regular_file(status)) entries.push_back({path, reason});
        entry.increment(error);
        check_walk(error, path);
    }
    std::sort(entries.begin(), entries.end(), [](const Entry& a, const Entry& b) { return a.path < b.path; });
    return entries;
}

struct TextFile {
    fs::path path;
    std::string name;  ///< relative to the folder
    std::uint64_t size;
};

void leave_out(std::vector<LeftOut>& all, const std::string& what, const std::string& name, std::uint64_t bytes) {
    auto found = std::find_if(all.begin(), all.end(), [&](const LeftOut& one) { return one.what == what; });
    if (found == all.end()) found = all.insert(found, {.what = what, .names = {}});
    ++found->count;
    found->bytes += bytes;
    if (found->names.size() < 3) found->names.push_back(name);
}

/// The text files below the folder. Other entries are added to `left_out`.
std::vector<TextFile> text_below(const fs::path& folder, std::vector<LeftOut>& left_out) {
    std::vector<TextFile> found;
    for (const auto& [path, reason] : entries_below(folder)) {
        const std::string name = path.lexically_relative(folder).string();
        if (reason != nullptr) {
            leave_out(left_out, reason, name, 0);
            continue;
        }
        const InputFile file(path);
        const FileFormat::Kind kind = format_of(file).kind;
        if (kind == FileFormat::text && file.size() > 0) {
            found.push_back({path, name, file.size()});
        } else {
            leave_out(left_out,
                      file.size() == 0            ? "empty file"
                      : kind == FileFormat::utf16 ? "UTF-16 file"
                                                  : "binary file",
                      name, file.size());
        }
    }
    return found;
}

/// The file as a list of one. Errors: ErrorKind::bad_data if it is empty or not text.
std::vector<TextFile> only_text(const fs::path& path) {
    const InputFile file(path);
    if (file.size() == 0) throw Error(ErrorKind::bad_data, path.string(), " is empty: give a file with text");
    const FileFormat format = format_of(file);
    switch (format.kind) {
        case FileFormat::text:
            return {{path, path.filename().string(), file.size()}};
        case FileFormat::utf16:
            throw Error(ErrorKind::bad_data, path.string(),
                        " is UTF-16 text: convert it to UTF-8, such as by iconv -f UTF-16 -t UTF-8");
        case FileFormat::known:
            throw Error(ErrorKind::bad_data, path.string(), " is ", format.name, ", not text: extract the plain text");
        case FileFormat::binary:
            break;
    }
    throw Error(ErrorKind::bad_data, path.string(),
                " is not text (it has a NUL byte): give a text file, a .bin of uint16 tokens or a folder with IDX "
                "images and labels");
}

/// The sum of the sizes. Errors: ErrorKind::bad_data if it is above `most`.
std::size_t total_size(const std::vector<TextFile>& files, const fs::path& path, std::uint64_t most) {
    std::uint64_t total = 0;
    for (const TextFile& file : files) {
        if (file.size > most - total) {
            throw Error(ErrorKind::bad_data, path.string(), " has more text than the ",
                        format_bytes(static_cast<std::int64_t>(most)),
                        " of memory that it may use: give less, or a .bin file of uint16 tokens, which is not loaded "
                        "into memory");
        }
        total += file.size;
    }
    return static_cast<std::size_t>(total);
}

/// Errors: ErrorKind::bad_data if the folder is a Hugging Face dataset.
std::vector<TextFile> text_of_folder(const fs::path& path, std::vector<LeftOut>& left_out) {
    if (is_dataset(path)) {
        throw Error(ErrorKind::bad_data, path.string(),
                    " is a dataset written by Hugging Face's save_to_disk: load it with datasets.load_from_disk, and "
                    "write its text to a file or its tokens to a .bin file of uint16");
    }
    std::vector<TextFile> files = text_below(path, left_out);
    if (files.empty()) {
        throw Error(ErrorKind::bad_data, "the folder ", path.string(), " has no text",
                    left_out.empty() ? "" : "; skipped: ", describe(left_out),
                    ": give a folder with text files, or name a .bin file of uint16 tokens");
    }
    return files;
}

}  // namespace

std::string describe(const std::vector<LeftOut>& left_out) {
    std::string text;
    for (const LeftOut& one : left_out) {
        text += str_cat(text.empty() ? "" : ", ", format_count(one.count), " ", one.what, one.count == 1 ? "" : "s",
                        " (", list_names(one.names, one.count), ")");
    }
    return text;
}

Text read_text(const fs::path& path, std::uint64_t most_bytes) {
    Text text;
    std::error_code ignored;  // opening it reports errors
    const auto files = fs::is_directory(path, ignored) ? text_of_folder(path, text.left_out) : only_text(path);
    text.bytes.resize(total_size(files, path, most_bytes));
    std::span<std::uint8_t> rest(text.bytes);
    for (const TextFile& file : files) {
        // By the counted size: what has been appended since is not read.
        const auto part = rest.first(static_cast<std::size_t>(file.size));
        InputFile(file.path).read(0, std::as_writable_bytes(part));
        text.files.add({file.name, file.size, crc32c({reinterpret_cast<const char*>(part.data()), part.size()})});
        rest = rest.subspan(part.size());
    }
    return text;
}

}  // namespace microbatch
