#include "microbatch/data/open.h"

#include <algorithm>
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
#include "microbatch/data/text.h"
#include "microbatch/data/token_file.h"
#include "microbatch/data/token_windows.h"
#include "microbatch/memory/machine.h"

namespace microbatch {
namespace {

namespace fs = std::filesystem;

std::string samples_in_words(const OpenedData& data) {
    return str_cat(format_count(data.train->size()), " training and ", format_count(data.held_out->size()),
                   " held-out ");
}

/// What text or an array may take: a part of what there is now, so that what is read next has some left.
std::uint64_t most_bytes() {
    return static_cast<std::uint64_t>(available_memory_bytes() / 2);
}

/// Windows of the first 90 % to train on and of the rest to hold out, and what one pass over them finds.
void split_tokens(OpenedData& data, const Tokens& tokens, std::int64_t length, const fs::path& path) {
    if (length < 1) throw Error(ErrorKind::usage, str_cat("a sample has ", length, " tokens: it needs at least 1"));
    const std::int64_t total = tokens.size();
    const std::int64_t held_out = total / 10;
    if (held_out <= length) {
        throw Error(ErrorKind::bad_data,
                    str_cat(path.string(), " has ", total, " tokens, of which the last 10 % (", held_out,
                            ") are held out, but one sample of ", length, " needs ",
                            static_cast<std::uint64_t>(length) + 1, ": give more data or use shorter samples"));
    }
    const Tokens first = tokens.slice(0, total - held_out), last = tokens.slice(total - held_out, total);
    data.train = std::make_unique<TokenWindows>(first, length);
    data.held_out = std::make_unique<TokenWindows>(last, length);
    const TokenScan seen = scan(first);
    data.classes = std::max(seen.vocabulary, scan(last).vocabulary);
    data.fingerprint = seen.checksum;
}

OpenedData open_text(const fs::path& path, std::int64_t length) {
    OpenedData data;
    data.kind = DataKind::text;
    const Tokens tokens = byte_tokens(read_text(path, most_bytes()));
    split_tokens(data, tokens, length, path);
    data.classes = 256;  // any byte can follow, seen or not
    data.description = str_cat(format_bytes(tokens.size()), " of text, ", samples_in_words(data), "samples of ",
                               format_count(length), " bytes");
    return data;
}

OpenedData open_tokens(const fs::path& path, std::int64_t length) {
    OpenedData data;
    data.kind = DataKind::tokens;
    const Tokens tokens = open_token_file(path);
    split_tokens(data, tokens, length, path);
    data.description = str_cat(format_count(tokens.size()), " tokens of a vocabulary of ", format_count(data.classes),
                               ", ", samples_in_words(data), "samples of ", format_count(length), " tokens");
    return data;
}

bool holds_idx_files(const fs::path& folder) {
    std::error_code error;
    fs::directory_iterator entry(folder, error);
    while (!error && entry != fs::directory_iterator()) {
        const std::string name = entry->path().filename().string();
        if (name.find("idx3-ubyte") != std::string::npos || name.find("idx1-ubyte") != std::string::npos) return true;
        entry.increment(error);
    }
    if (error) {
        throw Error(ErrorKind::bad_data, str_cat("cannot read the folder ", folder.string(), ": ", error.message()));
    }
    return false;
}

std::optional<fs::path> find_idx(const fs::path& folder, const std::string& name) {
    for (const fs::path& candidate : {folder / name, folder / (name + ".gz")}) {
        std::error_code ignored;  // a link to nowhere and a missing file are the same here
        if (fs::exists(candidate, ignored)) return candidate;
    }
    return std::nullopt;
}

/// The images and labels of one set ("train", "t10k"); null if neither is there.
std::shared_ptr<const LabelledImages> read_set(const fs::path& folder, const std::string& set) {
    const std::string images_name = set + "-images-idx3-ubyte";
    const std::string labels_name = set + "-labels-idx1-ubyte";
    const auto images = find_idx(folder, images_name);
    const auto labels = find_idx(folder, labels_name);
    if (!images && !labels) return nullptr;
    if (!images || !labels) {
        throw Error(ErrorKind::bad_data,
                    str_cat(folder.string(), " has ", images ? images_name : labels_name, " but no ",
                            images ? labels_name : images_name, " (.gz or not): put it there"));
    }
    return std::make_shared<const LabelledImages>(
        LabelledImages{read_idx(*images, 3, most_bytes()), read_idx(*labels, 1, most_bytes()),
                       str_cat(images->string(), " and ", labels->filename().string())});
}

std::int64_t largest_label(const LabelledImages& data) {
    return *std::max_element(data.labels.bytes.begin(), data.labels.bytes.end());
}

std::string_view characters(std::span<const std::uint8_t> bytes) {
    return {reinterpret_cast<const char*>(bytes.data()), bytes.size()};
}

OpenedData open_images(const fs::path& folder) {
    const auto train = read_set(folder, "train");
    if (!train) {
        throw Error(ErrorKind::bad_data, str_cat(folder.string(),
                                                 " has IDX files but no train-images-idx3-ubyte and "
                                                 "train-labels-idx1-ubyte (.gz or not): put them there"));
    }
    const auto test = read_set(folder, "t10k");
    const auto& shape = train->images.shape;
    const std::int64_t pixels = shape[1] * shape[2];
    const std::int64_t trained = test ? shape[0] : shape[0] - shape[0] / 10;
    if (!test && trained == shape[0]) {
        throw Error(ErrorKind::bad_data, str_cat(folder.string(), " has ", shape[0],
                                                 " images and no t10k-images-idx3-ubyte: "
                                                 "at least 10 are needed to hold out the last 10 %"));
    }
    if (test && (test->images.shape[1] != shape[1] || test->images.shape[2] != shape[2])) {
        throw Error(ErrorKind::bad_data, str_cat(folder.string(), " has training images of ", shape[1], "x", shape[2],
                                                 " but held-out ones of ", test->images.shape[1], "x",
                                                 test->images.shape[2], ": give files that belong together"));
    }
    const auto seen = std::span(train->images.bytes).first(static_cast<std::size_t>(trained * pixels));
    const PixelScale scale = pixel_scale(seen);
    OpenedData data;
    data.kind = DataKind::images;
    data.train = std::make_unique<ImageDataset>(train, scale, 0, trained);
    const auto& held_out = test ? test : train;
    data.held_out = std::make_unique<ImageDataset>(held_out, scale, test ? 0 : trained, held_out->images.shape[0]);
    data.classes = std::max(largest_label(*train), largest_label(*held_out)) + 1;
    const auto labels = std::span(train->labels.bytes).first(static_cast<std::size_t>(trained));
    data.fingerprint = crc32c(characters(labels), crc32c(characters(seen)));
    data.height = shape[1];
    data.width = shape[2];
    data.description =
        str_cat(samples_in_words(data), "images of ", shape[1], "x", shape[2], " pixels, ", data.classes, " classes");
    return data;
}

}  // namespace

OpenedData open_data(const fs::path& path, std::int64_t length) {
    std::error_code ignored;  // what cannot be looked at is reported by opening it
    if (fs::is_directory(path, ignored)) return holds_idx_files(path) ? open_images(path) : open_text(path, length);
    return path.extension() == ".bin" ? open_tokens(path, length) : open_text(path, length);
}

}  // namespace microbatch
