#include "microbatch/io/event_file.h"

#include <gtest/gtest.h>

#include <cstring>
#include <limits>
#include <set>
#include <vector>

#include "microbatch/core/crc32c.h"
#include "support/errors.h"
#include "support/full_disk.h"
#include "support/temp_folder.h"

namespace microbatch {
namespace {

using namespace test;

std::uint64_t little_endian(std::string_view bytes) {
    std::uint64_t number = 0;
    for (std::size_t i = bytes.size(); i-- > 0;) number = number << 8U | static_cast<unsigned char>(bytes[i]);
    return number;
}

/// The records of a file, their checksums looked at.
std::vector<std::string> records_of(const std::filesystem::path& path) {
    const std::string file = read_file(path);
    std::vector<std::string> records;
    const auto check = [&](std::size_t at, std::size_t size) {
        const auto masked = static_cast<std::uint32_t>(little_endian(std::string_view(file).substr(at + size, 4)));
        const std::uint32_t rotated = masked - 0xA282EAD8U;
        EXPECT_EQ((rotated >> 17U) | (rotated << 15U), crc32c(std::string_view(file).substr(at, size)));
    };
    for (std::size_t at = 0; at < file.size();) {
        const std::size_t size = little_endian(std::string_view(file).substr(at, 8));
        check(at, 8);
        check(at + 12, size);
        records.push_back(file.substr(at + 12, size));
        at += 16 + size;
    }
    return records;
}

TEST(EventFile, IsRecordsWithChecksumsTheFirstOfWhichNamesTheVersion) {
    const TempFolder folder;
    EventFile events(folder.path());
    const std::vector<Scalar> scalars{{"train/loss", 2.5}, {"rate", std::numeric_limits<double>::infinity()}};
    events.write(1, scalars);
    events.write(300, scalars);
    EXPECT_EQ(events.path().filename().string().find("events.out.tfevents."), 0u);
    const std::vector<std::string> records = records_of(events.path());
    ASSERT_EQ(records.size(), 3u);
    EXPECT_NE(records[0].find("brain.Event:2"), std::string::npos);
    // Field 2, a varint: 300 is AC 02. Field 2 of a value, four bytes: 2.5 is 00 00 20 40.
    EXPECT_NE(records[2].find("\x10\xAC\x02"), std::string::npos);
    EXPECT_NE(records[2].find(std::string("\x0A\x0Atrain/loss\x15\x00\x00\x20\x40", 17)), std::string::npos);
}

TEST(EventFile, WhatCannotBeWrittenIsAnError) {
    const TempFolder folder;
    expect_write_error({"nowhere"}, [&] { EventFile(folder.path() / "nowhere"); });
}

TEST(EventFile, GoingOnTellsWhichStepsOfOtherFilesAreNotDrawn) {
    const TempFolder folder;
    EventFile events(folder.path());
    EXPECT_EQ(events.go_on(299), "");
    const std::vector<std::string> records = records_of(events.path());
    ASSERT_EQ(records.size(), 2u);
    // Field 1, a double; field 2, a varint: the step that comes next; field 7: a session log whose status, its field 1,
    // is START, 1. See tensorboard's event.proto.
    EXPECT_EQ(records[1].front(), '\x09');
    EXPECT_EQ(records[1].substr(9), std::string("\x10\xAC\x02\x3A\x02\x08\x01", 7));
}

TEST(EventFile, NoneIsWrittenOverAnotherOneOfTheSameSecondAndProcess) {
    const TempFolder folder;
    std::set<std::filesystem::path> paths;
    for (int i = 0; i < 20; ++i) {
        EventFile events(folder.path());
        events.write(i, {});
        paths.insert(events.path());
        EXPECT_EQ(events.path().filename().string().find("events.out.tfevents."), 0u);
    }
    EXPECT_EQ(paths.size(), 20u);
    for (const auto& path : paths) EXPECT_EQ(records_of(path).size(), 2u);
}

TEST(EventFile, WhatAFullDiskDoesNotTakeComesWithTheNextStep) {
    const TempFolder folder;
    EventFile events(folder.path());
    const std::vector<Scalar> scalars{{"loss", 1.0}};
    {
        const FullDisk disk(std::filesystem::file_size(events.path()) + 20);
        const std::string why = events.write(1, scalars);
        EXPECT_NE(why.find(events.path().string()), std::string::npos) << why;
        EXPECT_EQ(records_of(events.path()).size(), 1u);
    }
    EXPECT_EQ(events.write(2, scalars), "");
    EXPECT_EQ(records_of(events.path()).size(), 3u);
}

}  // namespace
}  // namespace microbatch
