#include "microbatch/data/text.h"

#include <gtest/gtest.h>
#include <sys/stat.h>

#include <algorithm>
#include <cstdint>
#include <string>
#include <vector>

#include "microbatch/core/crc32c.h"
#include "support/errors.h"
#include "support/temp_folder.h"

namespace microbatch {
namespace {

namespace fs = std::filesystem;

constexpr std::uint64_t enough = 1 << 30;

std::string read(const fs::path& path) {
    const auto bytes = read_text(path, enough).bytes;
    return {bytes.begin(), bytes.end()};
}

void expect_bad_data(const fs::path& path, const std::vector<std::string>& parts) {
    test::expect_error(ErrorKind::bad_data, parts, [&] { read_text(path, enough); });
}

TEST(ReadText, ReadsTheBytesOfAFile) {
    const test::TempFolder folder;
    EXPECT_EQ(read(folder.write("file", "na\xc3\xafve\r\n")), "na\xc3\xafve\r\n");
}

TEST(ReadText, ReadsAFolderInSortedPathOrder) {
    const test::TempFolder folder;
    for (const char* name : {"d.txt", "b/2.txt", "a.txt", "c", "b/1.txt", "b/sub/3.txt"}) {
        folder.write(name, std::string(name) + "\n");
    }
    EXPECT_EQ(read(folder.path()), "a.txt\nb/1.txt\nb/2.txt\nb/sub/3.txt\nc\nd.txt\n");
}

TEST(ReadText, LeavesOutLinksSoThatNothingIsReadTwice) {
    const test::TempFolder folder;
    folder.write("sub/file", "once");
    fs::create_symlink("sub/file", folder.path() / "file.u8");
    fs::create_directory_symlink("sub", folder.path() / "linked");
    fs::create_directory_symlink("..", folder.path() / "sub/loop");
    fs::create_symlink("nowhere", folder.path() / "dangling");
    EXPECT_EQ(read(folder.path()), "once");
}

TEST(ReadText, FollowsALinkThatIsThePathItself) {
    const test::TempFolder folder;
    folder.write("sub/file", "text");
    fs::create_symlink("sub/file", folder.path() / "file.u8");
    fs::create_directory_symlink("sub", folder.path() / "linked");
    EXPECT_EQ(read(folder.path() / "file.u8"), "text");
    EXPECT_EQ(read(folder.path() / "linked"), "text");
}

TEST(ReadText, LeavesOutHiddenFilesAndFolders) {
    const test::TempFolder folder;
    folder.write(".hidden", "no");
    folder.write(".git/config", "no");
    folder.write("sub/.hidden", "no");
    folder.write("sub/seen", "yes");
    EXPECT_EQ(read(folder.path()), "yes");
}

TEST(ReadText, ReadsAHiddenPathThatIsAskedFor) {
    const test::TempFolder folder;
    folder.write(".cache/file", "text");
    EXPECT_EQ(read(folder.path() / ".cache"), "text");
    EXPECT_EQ(read(folder.write(".hidden", "text")), "text");
}

TEST(ReadText, LeavesOutFilesWithANulByteInTheFirst8KiB) {
    const test::TempFolder folder;
    std::string last_checked(9000, 'x');
    last_checked[8191] = '\0';
    std::string first_unchecked(9000, 'y');
    first_unchecked[8192] = '\0';
    folder.write("a", std::string("\0abc", 4));
    folder.write("b", last_checked);
    folder.write("c", first_unchecked);
    EXPECT_EQ(read(folder.path()), first_unchecked);
}

TEST(ReadText, RefusesABinaryFileGivenByName) {
    const test::TempFolder folder;
    const fs::path path = folder.write("model", std::string("ab\0c", 4));
    expect_bad_data(path, {path.string(), "is not text", "NUL"});
}

TEST(ReadText, RefusesAMissingPath) {
    const test::TempFolder folder;
    const fs::path path = folder.path() / "missing";
    expect_bad_data(path, {path.string(), "No such file or directory"});
}

TEST(ReadText, RefusesAnEmptyFile) {
    const test::TempFolder folder;
    const fs::path path = folder.write("file", "");
    expect_bad_data(path, {path.string(), "is empty"});
}

TEST(ReadText, RefusesAFolderWithoutText) {
    const test::TempFolder folder;
    expect_bad_data(folder.path(), {folder.path().string(), "has no text: give"});
    folder.write("empty", "");
    folder.write("binary", std::string(3, '\0'));
    folder.write(".hidden", "text");
    expect_bad_data(folder.path(), {"has no text; skipped: 1 hidden name (.hidden), 1 binary file (binary), "
                                    "1 empty file (empty)",
                                    "name a .bin file"});
}

TEST(ReadText, RefusesAFolderIfAPartCannotBeRead) {
    for (const bool subfolder : {false, true}) {
        const test::TempFolder folder;
        folder.write("readable", "text");
        const fs::path path = subfolder ? folder.write("sub/file", "more").parent_path() : folder.write("file", "more");
        folder.without_permission(path, [&] { expect_bad_data(folder.path(), {path.string(), "Permission denied"}); });
    }
}

TEST(ReadText, ListsWhatItReadsWithSizeAndChecksum) {
    const test::TempFolder folder;
    folder.write("b.txt", "two");
    folder.write("a/1.txt", "three");
    const DataListing files = read_text(folder.path(), enough).files;
    EXPECT_EQ(files.count, 2);
    EXPECT_EQ(files.bytes, 8U);
    const std::vector<DataFile> expected{{"a/1.txt", 5, crc32c("three")}, {"b.txt", 3, crc32c("two")}};
    EXPECT_EQ(files.files, expected);
    EXPECT_EQ(read_text(folder.path() / "", enough).files, files);  // a slash at the end
    EXPECT_EQ(read_text(folder.path() / "b.txt", enough).files.files, (std::vector<DataFile>{expected[1]}));
}

TEST(ReadText, CountsWhatItLeavesOutByTheReason) {
    const test::TempFolder folder;
    folder.write("text", "text");
    folder.write(".git/config", "hidden");
    folder.write("empty", "");
    for (const char* name : {"sub/4", "sub/3", "sub/2", "1"}) folder.write(name, std::string("\1\0\2", 3));
    folder.write("utf16", std::string("a\0b\0", 4));
    fs::create_symlink("text", folder.path() / "link");
    ASSERT_EQ(::mkfifo((folder.path() / "pipe").c_str(), 0600), 0);
    const Text read = read_text(folder.path(), enough);
    EXPECT_EQ(read.files.count, 1);
    EXPECT_EQ(describe(read.left_out),
              "1 hidden name (.git), 4 binary files (1, sub/2, sub/3 and 1 more), 1 empty file (empty), 1 link (link), "
              "1 special file (pipe), 1 UTF-16 file (utf16)");
    EXPECT_EQ(read.left_out[1].bytes, 12U);
    EXPECT_TRUE(read_text(folder.path() / "text", enough).left_out.empty());
    EXPECT_EQ(describe({}), "");
}

TEST(ReadText, LeavesOutTheFoldersOfRuns) {
    const test::TempFolder folder;
    folder.write("text", "text");
    for (const char* name : {"metrics.jsonl", "config.toml", "notes.txt", "checkpoints/step-1/state.json"}) {
        folder.write(fs::path("runs/a") / name, "log");
    }
    folder.write("half/metrics.jsonl", "a log alone");
    folder.write("other/config.toml", "settings alone");
    const Text read = read_text(folder.path(), enough);
    EXPECT_EQ(std::string(read.bytes.begin(), read.bytes.end()), "a log alonesettings alonetext");
    EXPECT_EQ(describe(read.left_out), "1 run folder (runs/a)");
}

TEST(ReadText, LeavesOutWhatARunWroteIntoTheFolderItself) {
    const test::TempFolder folder;
    folder.write("text", "text");
    folder.write("sub/report.html", " mine");
    const std::string before = read(folder.path());
    for (const char* name : {"metrics.jsonl", "config.toml", "summary.json", "report.html", "model.safetensors",
                             "events.out.tfevents.1.host", "snapshot-1.bin", "checkpoints/step-1/state.json"}) {
        folder.write(name, "log");
    }
    EXPECT_EQ(read(folder.path()), before);
    const Text left = read_text(folder.path(), enough);
    ASSERT_EQ(left.left_out.size(), 1U);
    EXPECT_EQ(left.left_out[0].what, "file of this run");
    EXPECT_EQ(left.left_out[0].count, 8);
}

TEST(ReadText, RefusesAHuggingFaceDatasetAndSkipsItInAFolder) {
    const std::vector<std::vector<const char*>> signs{{"dataset_info.json", "state.json"}, {"dataset_dict.json"}};
    for (const auto& names : signs) {
        const test::TempFolder folder;
        for (const char* name : names) folder.write(fs::path("set") / name, "{}");
        folder.write("set/data-00000-of-00001.arrow", std::string(8, '\xff'));
        expect_bad_data(folder.path() / "set", {(folder.path() / "set").string(), "save_to_disk", "load_from_disk"});
        expect_bad_data(folder.path(), {"has no text", "1 Hugging Face dataset (set)"});
        folder.write("text", "text");
        EXPECT_EQ(read(folder.path()), "text");
    }
    const test::TempFolder folder;
    folder.write("state.json", "{}");
    EXPECT_EQ(read(folder.path()), "{}");
}

TEST(ReadText, RefusesUtf16AndSaysHowToConvertIt) {
    const test::TempFolder folder;
    expect_bad_data(folder.write("file", std::string("\xff\xfeh\0i\0", 6)), {"file is UTF-16", "iconv"});
    expect_bad_data(folder.write("bare", std::string("\0h\0i", 4)), {"bare is UTF-16", "iconv"});
}

TEST(ReadText, NamesTheFormatOfAFileThatIsNotText) {
    const test::TempFolder folder;
    expect_bad_data(folder.write("a.gz", "\x1f\x8b\x08 small, without a NUL byte"),
                    {"a.gz is gzip-compressed", "plain"});
    folder.write("text", "text");
    EXPECT_EQ(read(folder.path()), "text");
}

TEST(ReadText, RefusesMoreTextThanItsMemoryLimit) {
    const test::TempFolder folder;
    folder.write("a", std::string(600, 'a'));
    const fs::path path = folder.write("b", std::string(424, 'b'));
    EXPECT_EQ(read_text(folder.path(), 1024).bytes.size(), 1024U);
    EXPECT_EQ(read_text(path, 424).bytes.size(), 424U);
    const auto refuses = [](const fs::path& what, std::uint64_t most, const std::string& in_words) {
        test::expect_error(ErrorKind::bad_data, {what.string(), "more text than the " + in_words},
                           [&] { read_text(what, most); });
    };
    refuses(folder.path(), 1023, "1023 B");
    refuses(path, 423, "423 B");
}

TEST(ReadText, RefusesAHugeFileBeforeItTakesMemory) {
    const test::TempFolder folder;
    const fs::path path = folder.write("file", std::string(8192, 'a'));
    fs::resize_file(path, std::uintmax_t{1} << 40);  // a hole: it takes no disk
    expect_bad_data(path, {path.string(), "more text than the 1 GiB"});
    expect_bad_data(folder.path(), {folder.path().string(), "more text than the 1 GiB"});
}

TEST(ReadText, RefusesAFileThatWasTruncated) {
    // For every file there, the system reports 4096 bytes, whatever its content: like a file that was truncated since.
    const fs::path path = "/sys/devices/system/cpu/online";
    if (!fs::exists(path)) GTEST_SKIP() << path << " is missing";
    expect_bad_data(path, {"cannot read " + path.string() + ": it ends at byte ", "4096 bytes"});
}

TEST(ReadText, RefusesAPipe) {
    const test::TempFolder folder;
    const fs::path path = folder.path() / "pipe";
    ASSERT_EQ(::mkfifo(path.c_str(), 0600), 0);
    expect_bad_data(path, {path.string(), "not a regular file"});
}

TEST(ReadText, ReadsTheFortunesOfDebian) {
    const fs::path fortunes = "/usr/share/games/fortunes";
    ASSERT_TRUE(fs::is_directory(fortunes)) << fortunes << " is missing: install Debian's fortunes and fortunes-min";
    // By name instead of content: the package holds text, an index NAME.dat and a link NAME.u8 for each.
    std::uintmax_t expected = 0;
    for (const auto& entry : fs::directory_iterator(fortunes)) {
        const auto extension = entry.path().extension();
        if (extension != ".dat" && extension != ".u8") expected += entry.file_size();
    }
    const Text text = read_text(fortunes, enough);
    EXPECT_GT(expected, 1'000'000U);
    EXPECT_EQ(text.bytes.size(), expected);
    EXPECT_EQ(text.files.bytes, expected);
    EXPECT_EQ(std::count(text.bytes.begin(), text.bytes.end(), 0), 0);
    ASSERT_EQ(text.left_out.size(), 2U);
    EXPECT_EQ(text.left_out[0].what, "binary file");
    EXPECT_EQ(text.left_out[1].what, "link");
    EXPECT_EQ(text.left_out[0].count, text.files.count);
}

}  // namespace
}  // namespace microbatch
