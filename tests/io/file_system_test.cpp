#include "microbatch/io/file_system.h"

#include <fcntl.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <stdexcept>
#include <string>

#include "support/errors.h"
#include "support/full_disk.h"
#include "support/temp_folder.h"

namespace microbatch {
namespace {

using namespace test;
namespace fs = std::filesystem;

TEST(FileSystem, WritesANewFile) {
    const TempFolder folder;
    const fs::path path = folder.path() / "file";
    const auto file = system_files().create(path);
    file->write("one");
    file->write("");
    file->write(std::string("\0two", 4));
    file->sync();
    file->close();
    EXPECT_EQ(read_file(path), std::string("one\0two", 7));
}

TEST(FileSystem, CreatesNoFileOverAnother) {
    const TempFolder folder;
    const fs::path file = folder.write("file", "text"), link = folder.path() / "link";
    fs::create_symlink(folder.path() / "elsewhere", link);
    for (const fs::path& path : {file, link, folder.path(), folder.path() / "nowhere" / "file"}) {
        expect_write_error({path.string()}, [&] { system_files().create(path); });
    }
    EXPECT_EQ(read_file(file), "text");
    EXPECT_FALSE(fs::exists(folder.path() / "elsewhere"));
}

TEST(FileSystem, AFullDiskIsAnErrorThatSaysSo) {
    const TempFolder folder;
    const auto file = system_files().create(folder.path() / "file");
    const FullDisk disk(10);
    file->write("eight...");
    expect_write_error({(folder.path() / "file").string(), "File too large"}, [&] { file->write("three"); });
}

TEST(FileSystem, MakesFoldersThatAreMissing) {
    const TempFolder folder;
    const fs::path deep = folder.path() / "a" / "b";
    system_files().make_folder(deep);
    EXPECT_TRUE(fs::is_directory(deep));
    system_files().make_folder(deep);
    const fs::path file = folder.write("file", "text");
    expect_write_error({file.string()}, [&] { system_files().make_folder(file); });
    expect_write_error({file.string()}, [&] { system_files().make_folder(file / "a"); });
}

TEST(FileSystem, RenamesOverAFileOrAnEmptyFolderAndNothingElse) {
    const TempFolder folder;
    const auto full = [&](const std::string& name) {
        folder.write(fs::path(name) / "inside", name);
        return folder.path() / name;
    };
    system_files().rename(folder.write("new", "new"), folder.write("old", "old"));
    EXPECT_EQ(read_file(folder.path() / "old"), "new");
    fs::create_directory(folder.path() / "empty");
    system_files().rename(full("one"), folder.path() / "empty");
    EXPECT_EQ(read_file(folder.path() / "empty" / "inside"), "one");
    expect_write_error({"three"}, [&] { system_files().rename(full("two"), full("three")); });
    EXPECT_EQ(read_file(folder.path() / "two" / "inside"), "two");
    EXPECT_EQ(read_file(folder.path() / "three" / "inside"), "three");
    expect_write_error({}, [&] { system_files().rename(folder.path() / "nowhere", folder.path() / "x"); });
}

TEST(FileSystem, RemovesAllAndFollowsNoLink) {
    const TempFolder folder;
    const fs::path outside = folder.write("outside/file", "text");
    folder.write("inside/a/b", "text");
    fs::create_directory_symlink(outside.parent_path(), folder.path() / "inside" / "link");
    system_files().remove_all(folder.path() / "inside");
    EXPECT_FALSE(fs::exists(folder.path() / "inside"));
    EXPECT_EQ(read_file(outside), "text");
    system_files().remove_all(folder.path() / "inside");
    system_files().remove_all(outside);
    EXPECT_FALSE(fs::exists(outside));
}

TEST(FileSystem, SyncsFilesAndFolders) {
    const TempFolder folder;
    system_files().sync(folder.write("file", "text"));
    system_files().sync(folder.path());
    expect_write_error({"nowhere"}, [&] { system_files().sync(folder.path() / "nowhere"); });
}

TEST(FileSystem, FilesThatAreNotClosedDoNotStayOpen) {
    const TempFolder folder;
    const int next = ::dup(0);  // the lowest that is free
    ::close(next);
    system_files().create(folder.path() / "dropped")->write("text");
    system_files().create(folder.path() / "closed")->close();
    EXPECT_THROW(write_whole(folder.path() / "failed", [](OutputFile&) { throw std::runtime_error("struck"); }),
                 std::runtime_error);
    const int after = ::dup(0);
    ::close(after);
    EXPECT_EQ(after, next);
}

TEST(WriteWhole, ReplacesThePreviousFile) {
    const TempFolder folder;
    const fs::path file = folder.path() / "file";
    for (const char* content : {"first", "the second, longer", ""}) {
        write_whole(file, std::string_view(content));
        EXPECT_EQ(read_file(file), content);
    }
    folder.write("file.part", "what a process that was killed left");
    write_whole(file, "over it");
    EXPECT_EQ(read_file(file), "over it");
    EXPECT_FALSE(fs::exists(folder.path() / "file.part"));
}

TEST(WriteWhole, OnFailureThePreviousFileStaysAndNothingElse) {
    const TempFolder folder;
    const fs::path file = folder.write("file", "before");
    EXPECT_THROW(write_whole(file,
                             [](OutputFile& out) {
                                 out.write("half");
                                 throw std::runtime_error("struck");
                             }),
                 std::runtime_error);
    {
        const FullDisk disk(3);
        expect_write_error({file.string(), "File too large"}, [&] { write_whole(file, "longer"); });
    }
    EXPECT_EQ(read_file(file), "before");
    EXPECT_FALSE(fs::exists(folder.path() / "file.part"));
    expect_write_error({"nowhere"}, [&] { write_whole(folder.path() / "nowhere" / "file", "content"); });
}

TEST(WriteWhole, AcceptsANameInTheCurrentFolder) {
    const TempFolder folder;
    const fs::path before = fs::current_path();
    fs::current_path(folder.path());
    write_whole("file", "content");
    fs::current_path(before);
    EXPECT_EQ(read_file(folder.path() / "file"), "content");
}

}  // namespace
}  // namespace microbatch
