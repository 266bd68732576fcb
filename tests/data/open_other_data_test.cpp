// Data of an unexpected kind: refused, or opened with a warning; files that are read and skipped are listed.
#include <gtest/gtest.h>

#include <string>
#include <vector>

#include "data/data_files.h"
#include "microbatch/data/open.h"
#include "support/errors.h"
#include "support/temp_folder.h"

namespace microbatch {
namespace {

namespace fs = std::filesystem;

using test::images_file;
using test::labels_file;
using test::tokens_file;
using Lines = std::vector<std::string>;

void expect_refused(const fs::path& path, const Lines& parts) {
    test::expect_error(ErrorKind::bad_data, parts, [&] { open_data(path, 8); });
}

TEST(OpenOtherData, AsksForTheFolderOfAnIdxFile) {
    const test::TempFolder folder;
    const auto path = folder.write("train-images-idx3-ubyte", images_file({1}));
    expect_refused(path, {path.string(), "an IDX file", "the folder"});
}

TEST(OpenOtherData, RefusesImagesWhoseLastTenthIsASingleClass) {
    const test::TempFolder folder;
    std::string images{0, 0, 8, 3, 0, 0, 0, 100, 0, 0, 0, 1, 0, 0, 0, 1}, labels{0, 0, 8, 1, 0, 0, 0, 100};
    for (int i = 0; i < 100; ++i) {
        images += static_cast<char>(i);
        labels += static_cast<char>(i / 10);
    }
    folder.write("train-images-idx3-ubyte", images);
    const fs::path path = folder.write("train-labels-idx1-ubyte", labels);
    expect_refused(folder.path(), {path.filename().string(), "sorted by class", "label 9"});
    // With a pair to hold out they may be: training shuffles them.
    folder.write("t10k-images-idx3-ubyte", images_file({1, 2}));
    folder.write("t10k-labels-idx1-ubyte", labels_file({3, 8}));
    EXPECT_EQ(open_data(folder.path(), 1).warnings, Lines());
}

TEST(OpenOtherData, ChecksTheLabelsOfImages) {
    const test::TempFolder folder;
    folder.write("train-images-idx3-ubyte", images_file({1, 2, 3}));
    folder.write("train-labels-idx1-ubyte", labels_file({1, 2, 1}));
    folder.write("t10k-images-idx3-ubyte", images_file({1}));
    folder.write("t10k-labels-idx1-ubyte", labels_file({4}));
    const OpenedData data = open_data(folder.path(), 1);
    ASSERT_EQ(data.warnings.size(), 2U);
    EXPECT_EQ(data.warnings[0].find("the labels are 1 to 2, 4 (1 image of the largest)"), 0U) << data.warnings[0];
    EXPECT_EQ(data.warnings[1].find("1 image of label 4 is held out"), 0U) << data.warnings[1];
    folder.write("train-labels-idx1-ubyte", labels_file({2, 2, 2}));
    expect_refused(folder.path(), {"train-labels-idx1-ubyte", "all 3 training labels are 2"});
}

TEST(OpenOtherData, RefusesAFileOfUint32Tokens) {
    const test::TempFolder folder;
    const std::string bytes = tokens_file(1000);
    std::string wide;
    for (std::size_t i = 0; i < bytes.size(); i += 2) wide += bytes.substr(i, 2) + std::string(2, '\0');
    const fs::path path = folder.write("train.bin", wide);
    expect_refused(path, {path.string(), "every second token is 0", "uint32"});
}

TEST(OpenOtherData, WarnsOfAStrayTokenInEitherPart) {
    const test::TempFolder folder;
    for (const std::size_t place : {5U, 950U}) {
        std::string bytes;
        for (int i = 0; i < 1000; ++i) bytes += {static_cast<char>(i % 65), '\0'};
        bytes.replace(2 * place, 2, "\xff\xff");
        const OpenedData data = open_data(folder.write("a.bin", bytes), 9);
        EXPECT_EQ(data.classes, 65536);
        ASSERT_EQ(data.warnings.size(), 1U);
        EXPECT_EQ(data.warnings[0].find("token 65,535 is far above the others"), 0U) << data.warnings[0];
    }
}

TEST(OpenOtherData, AsksToNameAFileOfTokensInAFolder) {
    const test::TempFolder nano;
    for (const char* name : {"input.txt", "prepare.py"}) nano.write(name, std::string(999, 'a'));
    for (const char* name : {"val.bin", "train.bin"}) nano.write(name, tokens_file(99));
    expect_refused(nano.path(), {".bin files (train.bin, val.bin)", "such as " + (nano.path() / "train.bin").string(),
                                 "or a text file"});
    const test::TempFolder alone;
    for (const char* name : {"a.bin", "b.bin", ".hidden"}) alone.write(name, tokens_file(99));
    expect_refused(alone.path(), {"(a.bin, b.bin)", "such as " + (alone.path() / "a.bin").string()});
}

TEST(OpenOtherData, WarnsOfTokensBesideText) {
    const test::TempFolder folder;
    folder.write("input.txt", std::string(999, 'a'));
    folder.write("some.bin", tokens_file(99));
    const OpenedData data = open_data(folder.path(), 8);
    EXPECT_EQ(data.notes, (Lines{"read input.txt", "skipped 1 binary file (some.bin)"}));
    EXPECT_EQ(data.warnings, Lines{"some.bin skipped: to train on tokens, name their file"});
}

TEST(OpenOtherData, ListsWhatItReadsAndWhatItLeavesOut) {
    const test::TempFolder folder;
    for (const char* name : {"a.txt", "b.txt", "c.txt", "d.txt"}) folder.write(name, std::string(500, 'a'));
    for (const char* name : {"runs/1/metrics.jsonl", "runs/1/config.toml"}) folder.write(name, "log");
    fs::create_symlink("a.txt", folder.path() / "link");
    const OpenedData data = open_data(folder.path(), 8);
    EXPECT_EQ(data.notes,
              (Lines{"read 4 files: a.txt, b.txt, c.txt and 1 more", "skipped 1 link (link), 1 run folder (runs/1)"}));
    EXPECT_EQ(data.warnings, Lines());
    EXPECT_EQ(data.files.count, 4);
    EXPECT_EQ(open_data(folder.path() / "a.txt", 8).notes, Lines{"read a.txt"});
}

TEST(OpenOtherData, OpensTheSameDataWhenTheFolderHasRuns) {
    const test::TempFolder folder;
    folder.write("a.txt", std::string(500, 'a'));
    const OpenedData before = open_data(folder.path(), 8);
    for (const char* name : {"runs/1/metrics.jsonl", "runs/1/config.toml", "metrics.jsonl", "config.toml"}) {
        folder.write(name, std::string(500, 'l'));
    }
    const OpenedData after = open_data(folder.path(), 8);
    EXPECT_EQ(after.fingerprint, before.fingerprint);
    EXPECT_EQ(after.files, before.files);
    EXPECT_EQ(describe_difference(before.files, after.files), "");
    folder.write("a.txt", std::string(500, 'b'));
    EXPECT_EQ(describe_difference(before.files, open_data(folder.path(), 8).files),
              "a.txt still has 500 bytes, but different content");
}

TEST(OpenOtherData, WarnsWhereTextIsTheSmallerPartOrNotProse) {
    const test::TempFolder folder;
    folder.write("README", std::string(500, 'a'));
    folder.write("utf16.txt", "\xff\xfe" + std::string(10, 'a'));
    folder.write("train.parquet", "PAR1" + std::string(1000, 'a'));
    EXPECT_EQ(open_data(folder.path(), 8).warnings,
              (Lines{"1 binary file (train.parquet) skipped, with more bytes (1004 B) than the text that was read",
                     "1 UTF-16 file (utf16.txt) skipped: to train on it, convert it to UTF-8"}));
    const OpenedData data = open_data(folder.write("a.jsonl", std::string(500, 'a')), 8);
    ASSERT_EQ(data.warnings.size(), 1U);
    EXPECT_NE(data.warnings[0].find("JSON"), std::string::npos);
}

}  // namespace
}  // namespace microbatch
