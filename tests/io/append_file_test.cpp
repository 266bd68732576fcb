#include "microbatch/io/append_file.h"

#include <fcntl.h>
#include <gtest/gtest.h>
#include <sys/stat.h>
#include <unistd.h>

#include <random>
#include <string>

#include "support/errors.h"
#include "support/full_disk.h"
#include "support/temp_folder.h"

namespace microbatch {
namespace {

using namespace test;
namespace fs = std::filesystem;

TEST(AppendFile, EachRecordIsThereAtOnce) {
    const TempFolder folder;
    AppendFile file(folder.path() / "log");
    EXPECT_EQ(read_file(file.path()), "");
    std::string all;
    for (const std::string record : {"one\n", "", "two\n", "a\0b"}) {
        EXPECT_EQ(file.append(record), "");
        all += record;
        EXPECT_EQ(read_file(file.path()), all);
    }
    EXPECT_EQ(file.flush(), "");
    EXPECT_EQ(read_file(file.path()), all);
}

TEST(AppendFile, ContinuesAfterWhatIsToStay) {
    const TempFolder folder;
    const fs::path path = folder.write("log", "one\ntwo\nhal");
    for (const std::uint64_t bytes : {8U, 8U, 4U, 0U}) {
        const std::string kept = read_file(path).substr(0, bytes);
        {
            AppendFile file(path, bytes);
            EXPECT_EQ(read_file(path), kept);
            EXPECT_EQ(file.append("three\n"), "");
        }
        EXPECT_EQ(read_file(path), kept + "three\n");
    }
}

TEST(AppendFile, WhatAFullDiskDoesNotTakeComesWithTheNextRecord) {
    const TempFolder folder;
    std::mt19937 random(1);
    for (int round = 0; round < 200; ++round) {
        const fs::path path = folder.path() / std::to_string(round);
        AppendFile file(path);
        std::string all;
        for (int i = 0; i < 20; ++i) {
            const std::string record = std::string(random() % 30, static_cast<char>('a' + i)) + "\n";
            const bool fits = random() % 3 == 0;
            std::string why;
            {
                // Room for everything, or for nothing or a part of the record.
                const FullDisk disk(fits ? 1'000'000 : read_file(path).size() + random() % record.size());
                why = file.append(record);
            }
            all += record;
            const std::string there = read_file(path);
            if (why.empty()) {
                EXPECT_EQ(there, all);
            } else {
                EXPECT_FALSE(fits);
                EXPECT_NE(why.find(path.string()), std::string::npos) << why;
                EXPECT_NE(why.find("File too large"), std::string::npos) << why;
                EXPECT_TRUE(there.empty() || there.back() == '\n');  // whole records alone
                EXPECT_EQ(there, all.substr(0, there.size()));
            }
        }
        EXPECT_EQ(file.flush(), "");
        EXPECT_EQ(read_file(path), all);
    }
}

TEST(AppendFile, LeavesAloneWhatHasItsNameAlready) {
    const TempFolder folder;
    const fs::path file = folder.write("file", "text"), link = folder.path() / "link";
    expect_write_error({file.string()}, [&] { AppendFile{file}; });
    fs::create_symlink(folder.path() / "elsewhere", link);
    expect_write_error({link.string()}, [&] { AppendFile{link}; });
    expect_write_error({folder.path().string()}, [&] { AppendFile{folder.path()}; });
    EXPECT_EQ(read_file(file), "text");
    EXPECT_FALSE(fs::exists(folder.path() / "elsewhere"));
}

TEST(AppendFile, ContinuesWithAPlainFileAlone) {
    const TempFolder folder;
    const fs::path file = folder.write("file", "text"), link = folder.path() / "link", pipe = folder.path() / "pipe";
    fs::create_symlink(file, link);
    ASSERT_EQ(::mkfifo(pipe.c_str(), 0600), 0);
    for (const fs::path& path : {link, pipe, folder.path(), folder.path() / "nowhere", fs::path("/dev/null")}) {
        expect_write_error({path.string()}, [&] { AppendFile(path, 0); });
    }
    // A pipe with a reader can be opened, but is still not a regular file.
    const int reader = ::open(pipe.c_str(), O_RDONLY | O_NONBLOCK);
    expect_write_error({pipe.string(), "not a regular file"}, [&] { AppendFile(pipe, 0); });
    ::close(reader);
    expect_error(ErrorKind::bad_data, {file.string(), "5 bytes"}, [&] { AppendFile(file, 5); });
    EXPECT_EQ(read_file(file), "text");
}

}  // namespace
}  // namespace microbatch
