#include "microbatch/data/open.h"

#include <gtest/gtest.h>

#include <string>
#include <string_view>
#include <vector>

#include "data/data_files.h"
#include "data/elements.h"
#include "microbatch/core/crc32c.h"
#include "support/errors.h"
#include "support/temp_folder.h"

namespace microbatch {
namespace {

namespace fs = std::filesystem;

using Indices = std::vector<std::int64_t>;
using test::images_file;
using test::labels_file;
using test::tokens_file;
using Lines = std::vector<std::string>;

void expect_error(ErrorKind kind, const fs::path& path, std::int64_t length, const std::vector<std::string>& parts) {
    test::expect_error(kind, parts, [&] { open_data(path, length); });
}

/// All elements of one field of a whole dataset.
template <class Value>
std::vector<Value> all(const Dataset& dataset, std::size_t field) {
    std::vector<Value> values;
    for (std::int64_t i = 0; i < dataset.size(); ++i) {
        const Batch sample = dataset.get(Indices{i});
        for (const Value value : test::elements<Value>(sample.fields[field])) values.push_back(value);
    }
    return values;
}

TEST(OpenData, HoldsOutTheLastTenthOfText) {
    const test::TempFolder folder;
    const auto path = folder.write("text", "abcdefghijklmnopqrstuvwxyzABCDEFG");  // 33 bytes: 30 and 3
    const OpenedData data = open_data(path, 2);
    EXPECT_EQ(data.kind, DataKind::text);
    EXPECT_EQ(data.classes, 256);
    EXPECT_EQ(data.height, 0);
    EXPECT_EQ(data.width, 0);
    EXPECT_EQ(data.train->size(), 14);
    EXPECT_EQ(data.train->tokens_per_sample(), 2);
    EXPECT_EQ(all<std::int64_t>(*data.train, 0).front(), 'a');
    EXPECT_EQ(all<std::int64_t>(*data.train, 1).back(), 'C');  // the 29th: the 30th fills no window
    EXPECT_EQ(all<std::int64_t>(*data.held_out, 0), (Indices{'E', 'F'}));
    EXPECT_EQ(all<std::int64_t>(*data.held_out, 1), (Indices{'F', 'G'}));
    EXPECT_EQ(data.description, "33 B of text, 14 training and 1 held-out samples of 2 bytes");
}

TEST(OpenData, TellsTokensByTheNameBin) {
    const test::TempFolder folder;
    const OpenedData data = open_data(folder.write("train.bin", tokens_file(1000)), 9);
    EXPECT_EQ(data.kind, DataKind::tokens);
    EXPECT_EQ(data.classes, 1000);  // the largest token is a held-out one
    EXPECT_EQ(data.train->size(), 99);
    EXPECT_EQ(data.held_out->size(), 11);
    EXPECT_EQ(all<std::int64_t>(*data.train, 0).front(), 0);
    EXPECT_EQ(all<std::int64_t>(*data.held_out, 0).front(), 900);
    EXPECT_EQ(data.description,
              "1,000 tokens of a vocabulary of 1,000, 99 training and 11 held-out samples of 9 tokens");
}

TEST(OpenData, NeedsASampleOfEachPart) {
    const test::TempFolder folder;
    const auto enough = folder.write("enough.bin", tokens_file(50));
    EXPECT_EQ(open_data(enough, 4).held_out->size(), 1);
    expect_error(ErrorKind::bad_data, enough, 5, {enough.string(), "50 tokens", "(5)", "needs 6"});
    expect_error(ErrorKind::bad_data, folder.write("text", "a"), 64, {"1 tokens", "needs 65"});
}

TEST(OpenData, RefusesALengthBelowOne) {
    const test::TempFolder folder;
    expect_error(ErrorKind::usage, folder.write("text", std::string(99, 'a')), 0, {"0 tokens"});
    expect_error(ErrorKind::usage, folder.write("a.bin", tokens_file(99)), -1, {"-1 tokens"});
}

TEST(OpenData, RefusesMissingEmptyAndTruncatedFiles) {
    const test::TempFolder folder;
    for (const char* name : {"missing", "missing.bin"}) {
        const fs::path path = folder.path() / name;
        expect_error(ErrorKind::bad_data, path, 8, {path.string(), "No such file or directory"});
    }
    expect_error(ErrorKind::bad_data, folder.write("text", ""), 8, {"is empty"});
    expect_error(ErrorKind::bad_data, folder.write("a.bin", ""), 8, {"is empty"});
    expect_error(ErrorKind::bad_data, folder.write("b.bin", tokens_file(99) + "x"), 8, {"truncated", "199 bytes"});
}

TEST(OpenData, PairsTrainingAndHeldOutImages) {
    const test::TempFolder folder;
    folder.write("train-images-idx3-ubyte", images_file({0, 255, 0, 255, 0, 255, 0, 255}, 1, 2));
    folder.write("train-labels-idx1-ubyte", labels_file({0, 1, 2, 1}));
    folder.write("t10k-images-idx3-ubyte", images_file({255, 255}, 1, 2));
    folder.write("t10k-labels-idx1-ubyte", labels_file({4}));
    const OpenedData data = open_data(folder.path(), 0);  // the length is not used
    EXPECT_EQ(data.kind, DataKind::images);
    EXPECT_EQ(data.classes, 5);  // the largest label is a held-out one
    EXPECT_EQ(data.height, 1);
    EXPECT_EQ(data.width, 2);
    EXPECT_EQ(all<std::int64_t>(*data.train, 1), (Indices{0, 1, 2, 1}));
    EXPECT_EQ(all<std::int64_t>(*data.held_out, 1), (Indices{4}));
    // Mean and deviation are 0.5, those of the training images alone.
    EXPECT_EQ(all<float>(*data.train, 0), (std::vector<float>{-1, 1, -1, 1, -1, 1, -1, 1}));
    EXPECT_EQ(all<float>(*data.held_out, 0), (std::vector<float>{1, 1}));
    EXPECT_EQ(data.description, "4 training and 1 held-out images of 1x2 pixels, 5 classes");
}

TEST(OpenData, HoldsOutTheLastTenthOfTheImagesWhereThereAreNoOthers) {
    const test::TempFolder folder;
    folder.write("train-images-idx3-ubyte", images_file({0, 255, 0, 255, 0, 255, 0, 255, 0, 255, 200}));
    folder.write("train-labels-idx1-ubyte", labels_file({0, 1, 0, 1, 0, 1, 0, 1, 0, 1, 9}));
    const OpenedData data = open_data(folder.path(), 1);
    EXPECT_EQ(data.classes, 10);
    EXPECT_EQ(data.train->size(), 10);
    EXPECT_EQ(all<std::int64_t>(*data.held_out, 1), (Indices{9}));
    EXPECT_EQ(all<float>(*data.train, 0), (std::vector<float>{-1, 1, -1, 1, -1, 1, -1, 1, -1, 1}));
}

TEST(OpenData, NeedsTenImagesToHoldOutATenth) {
    const test::TempFolder folder;
    folder.write("train-images-idx3-ubyte", images_file({1, 2, 3, 4, 5, 6, 7, 8, 9}));
    folder.write("train-labels-idx1-ubyte", labels_file({1, 2, 3, 4, 5, 6, 7, 8, 9}));
    expect_error(ErrorKind::bad_data, folder.path(), 1, {folder.path().string(), "9 images", "at least 10"});
}

TEST(OpenData, NamesTheMissingFileOfAPartialSet) {
    const std::vector<std::string> names{"train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte",
                                         "t10k-labels-idx1-ubyte"};
    for (const std::string& missing : names) {
        const test::TempFolder folder;
        for (const std::string& name : names) {
            if (name == missing) continue;
            const bool images = name.find("images") != std::string::npos;
            folder.write(name + ".gz", images ? images_file({1}) : labels_file({1}));
        }
        const std::string split = missing.substr(0, missing.find('-'));
        const std::string partner =
            split + (missing.find("images") != std::string::npos ? "-labels-idx1-ubyte.gz" : "-images-idx3-ubyte.gz");
        expect_error(ErrorKind::bad_data, folder.path(), 1,
                     {folder.path().string(), "has " + partner + " but no " + missing});
    }
    const test::TempFolder folder;
    folder.write("t10k-labels-idx1-ubyte", labels_file({1}));
    folder.write("emnist-train-images-idx3-ubyte", images_file({1}));
    expect_error(
        ErrorKind::bad_data, folder.path(), 1,
        {"has emnist-train-images-idx3-ubyte, t10k-labels-idx1-ubyte but no train-images-idx3-ubyte", "rename"});
}

TEST(OpenData, PrefersTheUncompressedFile) {
    const test::TempFolder folder;
    folder.write("train-images-idx3-ubyte", images_file({1, 2}));
    folder.write("train-labels-idx1-ubyte", labels_file({7, 8}));
    folder.write("train-labels-idx1-ubyte.gz", labels_file({3, 4}));
    folder.write("t10k-images-idx3-ubyte.gz", images_file({1}));
    folder.write("t10k-labels-idx1-ubyte.gz", labels_file({2}));
    const OpenedData data = open_data(folder.path(), 1);
    EXPECT_EQ(all<std::int64_t>(*data.train, 1), (Indices{7, 8}));
    EXPECT_EQ(all<std::int64_t>(*data.held_out, 1), (Indices{2}));
    EXPECT_EQ(data.notes, (Lines{"read 4 files: train-images-idx3-ubyte, train-labels-idx1-ubyte, "
                                 "t10k-images-idx3-ubyte.gz and 1 more",
                                 "skipped train-labels-idx1-ubyte.gz"}));
    const std::vector<DataFile> files{{"train-images-idx3-ubyte", 2, crc32c("\1\2")},
                                      {"train-labels-idx1-ubyte", 2, crc32c("\7\x08")},
                                      {"t10k-images-idx3-ubyte.gz", 1, crc32c("\1")},
                                      {"t10k-labels-idx1-ubyte.gz", 1, crc32c("\2")}};
    EXPECT_EQ(data.files.files, files);
}

TEST(OpenData, ReadsAFolderWithoutIdxFilesAsText) {
    const test::TempFolder folder;
    folder.write("a/1.txt", std::string(3 << 19, 'a'));
    const OpenedData data = open_data(folder.path(), 64);
    EXPECT_EQ(data.kind, DataKind::text);
    EXPECT_EQ(data.description, "1.5 MiB of text, 22,118 training and 2,457 held-out samples of 64 bytes");
}

TEST(OpenData, RefusesCountsThatDiffer) {
    const test::TempFolder folder;
    folder.write("train-images-idx3-ubyte", images_file({1, 2, 3}));
    folder.write("train-labels-idx1-ubyte", labels_file({1, 2, 3}));
    folder.write("t10k-images-idx3-ubyte", images_file({1, 2}));
    const auto labels = folder.write("t10k-labels-idx1-ubyte", labels_file({1}));
    expect_error(ErrorKind::bad_data, folder.path(), 1, {"t10k-images-idx3-ubyte", "2 images", "1 labels"});
    folder.write("train-labels-idx1-ubyte", labels_file({1, 2, 3, 4}));
    expect_error(ErrorKind::bad_data, folder.path(), 1, {"train-images-idx3-ubyte", "3 images", "4 labels"});
}

TEST(OpenData, RefusesHeldOutImagesOfAnotherSize) {
    const test::TempFolder folder;
    folder.write("train-images-idx3-ubyte", images_file({1, 2, 3, 4}, 2, 2));
    folder.write("train-labels-idx1-ubyte", labels_file({1}));
    folder.write("t10k-labels-idx1-ubyte", labels_file({1}));
    folder.write("t10k-images-idx3-ubyte", images_file({1, 2}, 2, 1));
    expect_error(ErrorKind::bad_data, folder.path(), 1, {folder.path().string(), "2x2", "2x1"});
    folder.write("t10k-images-idx3-ubyte", images_file({1, 2}, 1, 2));
    expect_error(ErrorKind::bad_data, folder.path(), 1, {folder.path().string(), "2x2", "1x2"});
}

TEST(OpenData, RefusesAnIdxFileWithAWrongMagicNumber) {
    const test::TempFolder folder;
    folder.write("train-labels-idx1-ubyte", labels_file({1}));
    std::string images = images_file({1});
    images[0] = '\x7f';
    const auto path = folder.write("train-images-idx3-ubyte.gz", images);
    expect_error(ErrorKind::bad_data, folder.path(), 1, {path.string(), "0x7f000803", "0x00000803"});
}

TEST(OpenData, FingerprintTellsOtherTrainingData) {
    const test::TempFolder folder;
    std::string bytes = tokens_file(1000);
    const auto of_file = [&](const char* name, const std::string& content) {
        return open_data(folder.write(name, content), 9).fingerprint;
    };
    const std::uint32_t tokens = of_file("a.bin", bytes), as_text = of_file("a", std::string(2000, 'x'));
    EXPECT_EQ(of_file("copied/elsewhere.bin", bytes), tokens);
    EXPECT_EQ(of_file("copied/elsewhere", std::string(2000, 'x')), as_text);
    EXPECT_EQ(tokens, crc32c(std::string_view(bytes).substr(0, 1800)));
    bytes[1799] ^= 1;  // the last byte that is trained on
    EXPECT_NE(of_file("b.bin", bytes), tokens);
    EXPECT_NE(of_file("b", std::string(1999, 'x') + 'y'), 0U);
    EXPECT_EQ(of_file("c", std::string(1999, 'x') + 'y'), as_text);  // a held-out byte
    EXPECT_NE(of_file("d", std::string(1799, 'x') + 'y' + std::string(200, 'x')), as_text);
}

TEST(OpenData, FingerprintTellsOtherImagesAndOtherLabels) {
    const test::TempFolder folder;
    const auto of_images = [&](const char* name, int pixel, int label, int held_out) {
        const fs::path here = folder.path() / name;
        folder.write(here / "train-images-idx3-ubyte", images_file({1, 2, 3, pixel}, 1, 2));
        folder.write(here / "train-labels-idx1-ubyte", labels_file({0, label}));
        folder.write(here / "t10k-images-idx3-ubyte", images_file({5, held_out}, 1, 2));
        folder.write(here / "t10k-labels-idx1-ubyte", labels_file({1}));
        return open_data(here, 1).fingerprint;
    };
    const std::uint32_t first = of_images("a", 4, 1, 6);
    EXPECT_EQ(first, crc32c(std::string_view("\1\2\3\4\0\1", 6)));
    EXPECT_EQ(of_images("copied/elsewhere", 4, 1, 6), first);
    EXPECT_NE(of_images("b", 5, 1, 6), first);
    EXPECT_NE(of_images("c", 4, 2, 6), first);
    EXPECT_EQ(of_images("d", 4, 1, 7), first);
}

TEST(OpenData, RefusesDataThatWouldNotFitInMemory) {
    const test::TempFolder folder;
    const fs::path path = folder.write("text", std::string(8192, 'a'));
    fs::resize_file(path, std::uintmax_t{1} << 42);  // a hole: it takes no disk
    expect_error(ErrorKind::bad_data, path, 8, {path.string(), "more text than the "});
    folder.write("images/train-labels-idx1-ubyte", labels_file({1}));
    const std::string header("\0\0\x8\3\0\1\0\0\0\1\0\0\0\0\4\0", 16);  // 2^16 images of 2^16 x 2^10 pixels
    const fs::path images = folder.write("images/train-images-idx3-ubyte", header);
    expect_error(ErrorKind::bad_data, images.parent_path(), 1, {images.string(), "claims more than ", "memory"});
}

TEST(OpenData, OpensTheFortunesOfDebian) {
    const fs::path fortunes = "/usr/share/games/fortunes";
    ASSERT_TRUE(fs::is_directory(fortunes)) << fortunes << " is missing: install Debian's fortunes and fortunes-min";
    const OpenedData data = open_data(fortunes, 64);
    EXPECT_EQ(data.kind, DataKind::text);
    EXPECT_NE(data.description.find(" MiB of text, "), std::string::npos) << data.description;
    EXPECT_GT(data.held_out->size(), 1000);
    EXPECT_NEAR(static_cast<double>(data.train->size()) / static_cast<double>(data.held_out->size()), 9.0, 0.01);
    EXPECT_EQ(data.notes.size(), 2U);
    EXPECT_EQ(data.warnings, Lines());
}

TEST(OpenData, OpensFashionMnist) {
    const fs::path folder = "/usr/share/datasets/fashion-mnist";
    ASSERT_TRUE(fs::is_directory(folder)) << folder << " is missing: install Debian's dataset-fashion-mnist";
    const OpenedData data = open_data(folder, 1);
    EXPECT_EQ(data.kind, DataKind::images);
    EXPECT_EQ(data.description, "60,000 training and 10,000 held-out images of 28x28 pixels, 10 classes");
    EXPECT_EQ(data.warnings, Lines());
    const Batch batch = data.train->get(Indices{0, 1, 2, 3});
    EXPECT_EQ(batch.fields[0].sizes(), (Indices{4, 1, 28, 28}));
    EXPECT_EQ(test::elements<std::int64_t>(batch.fields[1]), (Indices{9, 0, 0, 3}));
    // The corner of the first image is black: (0 - 0.2860) / 0.3530, whose inputs are rounded to four digits.
    EXPECT_NEAR(*batch.fields[0].const_data_ptr<float>(), -0.2860F / 0.3530F, 3e-4);
}

}  // namespace
}  // namespace microbatch
