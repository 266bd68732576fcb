#include "microbatch/data/mapped_file.h"

#include <gtest/gtest.h>
#include <sys/stat.h>

#include <fstream>
#include <string>
#include <string_view>
#include <type_traits>
#include <utility>
#include <vector>

#include "support/errors.h"
#include "support/temp_folder.h"

namespace microbatch {
namespace {

namespace fs = std::filesystem;

static_assert(!std::is_copy_constructible_v<MappedFile> && !std::is_copy_assignable_v<MappedFile>);

void expect_bad_data(const fs::path& path, const std::vector<std::string>& parts) {
    test::expect_error(ErrorKind::bad_data, parts, [&] { const MappedFile file(path); });
}

std::string_view content(const MappedFile& file) {
    return {reinterpret_cast<const char*>(file.bytes().data()), file.bytes().size()};
}

TEST(MappedFile, ShowsTheBytesOfTheFile) {
    const test::TempFolder folder;
    const std::string bytes("a\0b\xff\n", 5);
    EXPECT_EQ(content(MappedFile(folder.write("file", bytes))), bytes);
}

TEST(MappedFile, ShowsWhatIsWrittenLater) {
    const test::TempFolder folder;
    const fs::path path = folder.write("file", "before");
    const MappedFile file(path);
    std::fstream(path, std::ios::in | std::ios::out) << "AFTER!";  // in place: the same file, not a copy in memory
    EXPECT_EQ(content(file), "AFTER!");
}

TEST(MappedFile, AllowsAnEmptyFile) {
    const test::TempFolder folder;
    EXPECT_TRUE(MappedFile(folder.write("file", "")).bytes().empty());
}

TEST(MappedFile, MovesTheMappingAndLeavesNothingBehind) {
    const test::TempFolder folder;
    MappedFile first(folder.write("first", "one"));
    MappedFile second(std::move(first));
    EXPECT_EQ(content(second), "one");
    EXPECT_TRUE(first.bytes().empty());
    MappedFile third(folder.write("third", "three"));
    third = std::move(second);
    EXPECT_EQ(content(third), "one");
    EXPECT_TRUE(second.bytes().empty());
    MappedFile& same = third;
    third = std::move(same);
    EXPECT_EQ(content(third), "one");
}

TEST(MappedFile, NamesThePathAndTheReasonOfAMissingFile) {
    const test::TempFolder folder;
    const fs::path path = folder.path() / "missing";
    expect_bad_data(path, {path.string(), "No such file or directory"});
}

TEST(MappedFile, RefusesAFolder) {
    const test::TempFolder folder;
    expect_bad_data(folder.path(), {folder.path().string(), "Is a directory"});
}

TEST(MappedFile, RefusesAPipeWithoutWaitingForItsWriter) {
    const test::TempFolder folder;
    const fs::path path = folder.path() / "pipe";
    ASSERT_EQ(::mkfifo(path.c_str(), 0600), 0);
    expect_bad_data(path, {path.string(), "not a regular file"});
}

TEST(MappedFile, RefusesAFileWithoutPermission) {
    const test::TempFolder folder;
    const fs::path path = folder.write("file", "secret");
    folder.without_permission(path, [&] { expect_bad_data(path, {path.string(), "Permission denied"}); });
}

}  // namespace
}  // namespace microbatch
