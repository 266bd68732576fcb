#include "microbatch/data/open.h"

#include <algorithm>
#include <iterator>
#include <optional>
#include <span>
#include <string_view>
#include <system_error>
#include <utility>

#include "microbatch/core/crc32c.h"
#include "microbatch/core/error.h"
#include "microbatch/core/str_cat.h"
#include "microbatch/core/units.h"
#include "microbatch/data/idx.h"
#include "microbatch/data/image_dataset.h"
#include "microbatch/data/plausibility.h"
#include "microbatch/data/text.h"
#include "microbatch/data/token_windows.h"
#include "microbatch/io/file_system.h"
#include "microbatch/memory/machine.h"

namespace microbatch {
namespace {

namespace fs = std::filesystem;

std::string samples_in_words(const OpenedData& data) {
    return str_cat(format_count(data.train->size()), " training and ", format_count(data.held_out->size()),
                   " held-out ");
}

/// The most memory for text or an array: a part of what is free now, so that the next one has some left.
std::uint64_t most_bytes() {
    return static_cast<std::uint64_t>(available_memory_bytes() / 2);
}

/// How many of all are training data: the last 10 % are held out.
std::int64_t trained_of(std::int64_t all) {
    return all - all / 10;
}

std::string_view characters(std::span<const std::uint8_t> bytes) {
    return {reinterpret_cast<const char*>(bytes.data()), bytes.size()};
}

std::vector<std::string> names_of(const DataListing& files) {
    std::vector<std::string> names;
    for (const DataFile& file : files.files) names.push_back(file.name);
    return names;
}

void note_files(OpenedData& data) {
    data.notes.push_back(str_cat("read ",
                                 data.files.count == 1 ? "" : str_cat(format_count(data.files.count), " files: "),
                                 list_names(names_of(data.files), data.files.count)));
}

/// Windows of the first 90 % to train on and of the rest to hold out.
void split_tokens(OpenedData& data, const Tokens& tokens, std::int64_t length, const fs::path& path) {
    if (length < 1) throw Error(ErrorKind::usage, "a sample has ", length, " tokens: it needs at least 1");
    const std::int64_t total = tokens.size(), trained = trained_of(total);
    if (total - trained <= length) {
        throw Error(ErrorKind::bad_data, path.string(), " has ", total, " tokens, of which the last 10 % (",
                    total - trained, ") are held out, but one sample of ", length, " needs ",
                    static_cast<std::uint64_t>(length) + 1, ": give more data or use shorter samples");
    }
    data.train = std::make_unique<TokenWindows>(tokens.slice(0, trained), length);
    data.held_out = std::make_unique<TokenWindows>(tokens.slice(trained, total), length);
}

/// True if a file of this name has records: the names of their fields would be trained on, too.
bool has_records(const std::string& name) {
    const auto ends = [&](const char* end) { return name.ends_with(end); };
    return ends(".json") || ends(".jsonl") || ends(".csv") || ends(".tsv");
}

void warn_of_text(OpenedData& data, const std::vector<LeftOut>& left_out) {
    const auto warn = [&](const auto&... parts) { data.warnings.push_back(str_cat(parts...)); };
    std::uint64_t in_records = 0;
    for (const DataFile& file : data.files.files) in_records += has_records(file.name) ? file.bytes : 0;
    if (in_records > data.files.bytes / 2) {
        warn("most of the text is JSON or a table, read verbatim: to train on one field only, write it to a text file");
    }
    for (const LeftOut& one : left_out) {
        if (one.what == "UTF-16 file") {
            warn(describe({one}), " skipped: to train on it, convert it to UTF-8");
        } else if (one.what == "binary file" && one.bytes > data.files.bytes) {
            warn(describe({one}), " skipped, with more bytes (", format_bytes(static_cast<std::int64_t>(one.bytes)),
                 ") than the text that was read");
        }
    }
}

OpenedData open_text(const fs::path& path, std::int64_t length) {
    OpenedData data;
    data.kind = DataKind::text;
    Text text = read_text(path, most_bytes());
    const auto trained = static_cast<std::size_t>(trained_of(static_cast<std::int64_t>(text.bytes.size())));
    data.fingerprint = crc32c(characters(std::span(text.bytes).first(trained)));
    const Tokens tokens = byte_tokens(std::move(text.bytes));
    split_tokens(data, tokens, length, path);
    data.classes = 256;  // any byte can follow, seen or not
    data.description = str_cat(format_bytes(tokens.size()), " of text, ", samples_in_words(data), "samples of ",
                               format_count(length), " bytes");
    data.files = std::move(text.files);
    note_files(data);
    if (!text.left_out.empty()) data.notes.push_back(str_cat("skipped ", describe(text.left_out)));
    warn_of_text(data, text.left_out);
    return data;
}

OpenedData open_tokens(const fs::path& path, std::int64_t length) {
    OpenedData data;
    data.kind = DataKind::tokens;
    const Tokens tokens = open_token_file(path);
    split_tokens(data, tokens, length, path);
    const std::int64_t trained = trained_of(tokens.size());
    TokenScan seen = scan(tokens.slice(0, trained));
    data.fingerprint = seen.checksum;
    seen = scan(tokens.slice(trained, tokens.size()), std::move(seen));
    data.warnings = check_tokens(seen, path.string());
    data.classes = seen.vocabulary;
    data.description = str_cat(format_count(tokens.size()), " tokens of a vocabulary of ", format_count(data.classes),
                               ", ", samples_in_words(data), "samples of ", format_count(length), " tokens");
    data.files.add({path.filename().string(), static_cast<std::uint64_t>(tokens.size()) * 2, seen.checksum});
    note_files(data);
    return data;
}

bool is_idx_name(const std::string& name) {
    return name.find("idx3-ubyte") != std::string::npos || name.find("idx1-ubyte") != std::string::npos;
}

/// Names of files at the top of a folder that decide what it is, sorted.
struct TopLevel {
    std::vector<std::string> idx, bin;
    bool others = false;  ///< that are not hidden
};

TopLevel look_at(const fs::path& folder) {
    TopLevel found;
    std::error_code error;
    for (const fs::path& path : paths_in(folder, error)) {
        const std::string name = path.filename().string();
        if (is_idx_name(name)) {
            found.idx.push_back(name);
        } else if (!name.starts_with('.')) {
            const bool bin = name.ends_with(".bin");
            if (bin) found.bin.push_back(name);
            found.others = found.others || !bin;
        }
    }
    if (error) throw Error(ErrorKind::bad_data, "cannot read the folder ", folder.string(), ": ", error.message());
    std::sort(found.idx.begin(), found.idx.end());
    std::sort(found.bin.begin(), found.bin.end());
    return found;
}

/// Does not guess which of several token files, or the text next to them, is meant.
void require_no_token_files(const std::vector<std::string>& bin, bool others, const fs::path& folder) {
    const auto is_there = [&](const char* name) { return std::find(bin.begin(), bin.end(), name) != bin.end(); };
    if (bin.empty() || (others && !is_there("train.bin") && !is_there("val.bin"))) return;
    const fs::path example = folder / (is_there("train.bin") ? "train.bin" : bin.front());
    throw Error(ErrorKind::bad_data, "the folder ", folder.string(), " has .bin files (", list_names(bin),
                "), which are read as uint16 tokens: name the one to train on, such as ", example.string(),
                others ? ", or a text file" : "");
}

std::optional<fs::path> find_idx(const fs::path& folder, const std::string& name) {
    for (const fs::path& candidate : {folder / name, folder / (name + ".gz")}) {
        std::error_code ignored;  // a broken link and a missing file are treated the same
        if (fs::exists(candidate, ignored)) return candidate;
    }
    return std::nullopt;
}

/// The images and labels of one set ("train", "t10k"); null if neither is there.
std::shared_ptr<const LabelledImages> read_set(const fs::path& folder, const std::string& name, DataListing& files) {
    const std::string images_name = name + "-images-idx3-ubyte";
    const std::string labels_name = name + "-labels-idx1-ubyte";
    const auto images = find_idx(folder, images_name);
    const auto labels = find_idx(folder, labels_name);
    if (!images && !labels) return nullptr;
    if (!images || !labels) {
        throw Error(ErrorKind::bad_data, folder.string(), " has ", (images ? *images : *labels).filename().string(),
                    " but no ", images ? labels_name : images_name, " (.gz or not): add it");
    }
    auto set = std::make_shared<LabelledImages>(
        LabelledImages{read_idx(*images, 3, most_bytes()), read_idx(*labels, 1, most_bytes()),
                       str_cat(images->string(), " and ", labels->filename().string())});
    for (const auto& [path, array] : {std::pair(*images, &set->images), std::pair(*labels, &set->labels)}) {
        files.add({path.filename().string(), array->bytes.size(), crc32c(characters(array->bytes))});
    }
    return set;
}

std::int64_t largest_label(const LabelledImages& data) {
    return *std::max_element(data.labels.bytes.begin(), data.labels.bytes.end());
}

void note_unread(OpenedData& data, const std::vector<std::string>& found) {
    std::vector<std::string> unread;
    const auto read = names_of(data.files);
    std::copy_if(found.begin(), found.end(), std::back_inserter(unread),
                 [&](const std::string& name) { return std::find(read.begin(), read.end(), name) == read.end(); });
    if (!unread.empty()) data.notes.push_back(str_cat("skipped ", list_names(unread)));
}

OpenedData open_images(const fs::path& folder, const std::vector<std::string>& found) {
    OpenedData data;
    data.kind = DataKind::images;
    const auto train = read_set(folder, "train", data.files);
    if (!train) {
        throw Error(
            ErrorKind::bad_data, folder.string(), " has ", list_names(found),
            " but no train-images-idx3-ubyte and train-labels-idx1-ubyte (.gz or not): add them, or rename the files");
    }
    const auto test = read_set(folder, "t10k", data.files);
    const auto& shape = train->images.shape;
    const std::int64_t pixels = shape[1] * shape[2];
    const std::int64_t trained = test ? shape[0] : trained_of(shape[0]);
    if (!test && trained == shape[0]) {
        throw Error(ErrorKind::bad_data, folder.string(), " has ", shape[0],
                    " images and no t10k-images-idx3-ubyte: at least 10 are needed to hold out the last 10 %");
    }
    if (test && (test->images.shape[1] != shape[1] || test->images.shape[2] != shape[2])) {
        throw Error(ErrorKind::bad_data, folder.string(), " has training images of ", shape[1], "x", shape[2],
                    " but held-out ones of ", test->images.shape[1], "x", test->images.shape[2],
                    ": give files that belong together");
    }
    const auto seen = std::span(train->images.bytes).first(static_cast<std::size_t>(trained * pixels));
    const PixelScale scale = pixel_scale(seen);
    data.train = std::make_unique<ImageDataset>(train, scale, 0, trained);
    const auto& held_out = test ? test : train;
    data.held_out = std::make_unique<ImageDataset>(held_out, scale, test ? 0 : trained, held_out->images.shape[0]);
    data.classes = std::max(largest_label(*train), largest_label(*held_out)) + 1;
    const auto all_labels = std::span(train->labels.bytes),
               labels = all_labels.first(static_cast<std::size_t>(trained));
    if (!test) refuse_grouped(all_labels, train->source);
    data.warnings =
        check_labels(labels, test ? std::span(test->labels.bytes) : all_labels.subspan(labels.size()), train->source);
    data.fingerprint = crc32c(characters(labels), crc32c(characters(seen)));
    data.height = shape[1];
    data.width = shape[2];
    data.description =
        str_cat(samples_in_words(data), "images of ", shape[1], "x", shape[2], " pixels, ", data.classes, " classes");
    note_files(data);
    note_unread(data, found);
    return data;
}

}  // namespace

OpenedData open_data(const fs::path& path, std::int64_t length) {
    std::error_code ignored;  // opening it reports errors
    if (fs::is_directory(path, ignored)) {
        const TopLevel found = look_at(path);
        if (!found.idx.empty()) return open_images(path, found.idx);
        require_no_token_files(found.bin, found.others, path);
        OpenedData data = open_text(path, length);
        if (!found.bin.empty()) {
            data.warnings.push_back(str_cat(list_names(found.bin), " skipped: to train on tokens, name their file"));
        }
        return data;
    }
    if (is_idx_name(path.filename().string()) && fs::exists(path, ignored)) {
        throw Error(ErrorKind::bad_data, path.string(),
                    " is an IDX file, which has only images or only labels: give the folder that has both");
    }
    return path.extension() == ".bin" ? open_tokens(path, length) : open_text(path, length);
}

}  // namespace microbatch
