#include "microbatch/io/input_file.h"

#include <gtest/gtest.h>
#include <sys/stat.h>

#include <fstream>
#include <span>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "support/errors.h"
#include "support/temp_folder.h"

namespace microbatch {
namespace {

namespace fs = std::filesystem;

static_assert(!std::is_copy_constructible_v<InputFile> && !std::is_copy_assignable_v<InputFile>);

constexpr std::uint64_t enough = 1000;

void expect_bad_data(const fs::path& path, std::vector<std::string> parts) {
    parts.push_back(path.string());
    test::expect_error(ErrorKind::bad_data, parts, [&] { const InputFile file(path); });
}

std::string part_of(const InputFile& file, std::uint64_t offset, std::size_t count) {
    std::string bytes(count, '\0');
    file.read(offset, std::as_writable_bytes(std::span(bytes)));
    return bytes;
}

TEST(InputFile, ReadsTheBytesOfTheFile) {
    const test::TempFolder folder;
    const std::string bytes("a\0b\xff\n", 5);
    const InputFile file(folder.write("file", bytes));
    EXPECT_EQ(file.size(), 5U);
    EXPECT_EQ(file.path(), folder.path() / "file");
    EXPECT_EQ(file.read_all(enough), bytes);
    EXPECT_EQ(part_of(file, 2, 3), "b\xff\n");
    EXPECT_EQ(part_of(file, 5, 0), "");
}

TEST(InputFile, ReadsWhatIsWrittenLater) {
    const test::TempFolder folder;
    const fs::path path = folder.write("file", "before");
    const InputFile file(path);
    std::fstream(path, std::ios::in | std::ios::out) << "AFTER!";  // in place: the same file
    EXPECT_EQ(file.read_all(enough), "AFTER!");
}

TEST(InputFile, AllowsAnEmptyFile) {
    const test::TempFolder folder;
    const InputFile file(folder.write("file", ""));
    EXPECT_EQ(file.size(), 0U);
    EXPECT_EQ(file.read_all(0), "");
}

TEST(InputFile, SaysWhereAFileEndsThatHasBecomeShorter) {
    const test::TempFolder folder;
    const fs::path path = folder.write("file", "0123456789");
    const InputFile file(path);
    fs::resize_file(path, 4);
    EXPECT_EQ(part_of(file, 1, 3), "123");
    test::expect_error(ErrorKind::bad_data, {"cannot read " + path.string() + ": it ends at byte 4", "10 bytes"},
                       [&] { part_of(file, 2, 5); });
    test::expect_error(ErrorKind::bad_data, {path.string(), "ends at byte 4"}, [&] { file.read_all(enough); });
    test::expect_error(ErrorKind::bad_data, {path.string(), "ends at byte 7"}, [&] { part_of(file, 7, 1); });
}

TEST(InputFile, StaysReadableWhenItIsRemoved) {
    const test::TempFolder folder;
    const fs::path path = folder.write("file", "kept");
    const InputFile file(path);
    fs::remove(path);
    EXPECT_EQ(file.read_all(enough), "kept");
}

TEST(InputFile, RefusesToReadAllOfMoreThanIsAllowed) {
    const test::TempFolder folder;
    const InputFile file(folder.write("file", "four"));
    EXPECT_EQ(file.read_all(4), "four");
    test::expect_error(ErrorKind::bad_data, {file.path().string(), "4 bytes", "more than the allowed 3"},
                       [&] { file.read_all(3); });
}

TEST(InputFile, MovesTheFileAndLeavesNothingBehind) {
    const test::TempFolder folder;
    InputFile first(folder.write("first", "one"));
    InputFile second(std::move(first));
    EXPECT_EQ(second.read_all(enough), "one");
    EXPECT_EQ(first.size(), 0U);
    InputFile third(folder.write("third", "three"));
    third = std::move(second);
    EXPECT_EQ(third.read_all(enough), "one");
    InputFile& same = third;
    third = std::move(same);
    EXPECT_EQ(third.read_all(enough), "one");
}

TEST(InputFile, NamesThePathAndTheReasonOfAMissingFile) {
    const test::TempFolder folder;
    expect_bad_data(folder.path() / "missing", {"No such file or directory"});
}

TEST(InputFile, RefusesAFolder) {
    const test::TempFolder folder;
    expect_bad_data(folder.path(), {"Is a directory"});
}

TEST(InputFile, RefusesAPipeWithoutWaitingForItsWriter) {
    const test::TempFolder folder;
    const fs::path path = folder.path() / "pipe";
    ASSERT_EQ(::mkfifo(path.c_str(), 0600), 0);
    expect_bad_data(path, {"not a regular file"});
}

TEST(InputFile, RefusesADevice) {
    expect_bad_data("/dev/zero", {"not a regular file"});
}

TEST(InputFile, RefusesAFileWithoutPermission) {
    const test::TempFolder folder;
    const fs::path path = folder.write("file", "secret");
    folder.without_permission(path, [&] { expect_bad_data(path, {"Permission denied"}); });
}

}  // namespace
}  // namespace microbatch
