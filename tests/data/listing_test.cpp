#include "microbatch/data/listing.h"

#include <gtest/gtest.h>

#include <string>
#include <vector>

#include "microbatch/core/str_cat.h"

namespace microbatch {
namespace {

DataListing listing(const std::vector<DataFile>& files) {
    DataListing all;
    for (const DataFile& file : files) all.add(file);
    return all;
}

std::string numbered(int i) {
    return str_cat("file-", 1000 + i);
}

DataListing many(int count, std::uint64_t bytes = 1) {
    DataListing all;
    for (int i = 0; i < count; ++i) all.add({numbered(i), bytes, 0});
    return all;
}

TEST(DataListing, CountsAllFilesAndKeepsTheFirst) {
    const DataListing all = many(300, 2);
    EXPECT_EQ(all.count, 300);
    EXPECT_EQ(all.bytes, 600U);
    ASSERT_EQ(all.files.size(), DataListing::most_files);
    EXPECT_EQ(all.files.back().name, numbered(255));
}

TEST(DataListing, NamesWhatIsNewMissingOrDifferent) {
    const DataListing before = listing({{"a", 1000, 1}, {"b", 2000, 2}, {"c", 3000, 3}});
    const auto to = [&](const std::vector<DataFile>& now) { return describe_difference(before, listing(now)); };
    EXPECT_EQ(to({{"a", 1000, 1}, {"b", 2000, 2}, {"c", 3000, 3}}), "");
    EXPECT_EQ(to({{"a", 1000, 1}, {"b", 2001, 2}, {"c", 3000, 3}}), "b had 2,000 bytes and has 2,001 bytes");
    EXPECT_EQ(to({{"a", 1000, 1}, {"b", 2000, 9}, {"c", 3000, 3}}), "b still has 2,000 bytes, but different content");
    EXPECT_EQ(to({{"a", 1000, 1}, {"c", 3000, 3}}),
              "3 files of 6,000 bytes became 2 files of 4,000 bytes: b (2,000 bytes) is missing");
    EXPECT_EQ(to({{"a", 1000, 1}, {"b", 2000, 2}, {"b2", 5, 0}, {"c", 3000, 3}}),
              "3 files of 6,000 bytes became 4 files of 6,005 bytes: b2 (5 bytes) is new");
    EXPECT_EQ(
        to({{"x", 1000, 1}}),
        "3 files of 6,000 bytes became 1 file of 1,000 bytes: x (1,000 bytes) is new, a (1,000 bytes) is missing, "
        "b (2,000 bytes) is missing and 1 more");
}

TEST(DataListing, IgnoresFilesThatMayExistUnlisted) {
    // A file that is new at the front pushes the last one off the list.
    DataListing now = listing({{"a", 7, 0}});
    for (int i = 0; i < 300; ++i) now.add({numbered(i), 1, 0});
    EXPECT_EQ(describe_difference(many(300), now),
              "300 files of 300 bytes became 301 files of 307 bytes: a (7 bytes) is new");
    EXPECT_EQ(describe_difference(now, many(300)),
              "301 files of 307 bytes became 300 files of 300 bytes: a (7 bytes) is missing");
    EXPECT_EQ(describe_difference(many(300), many(301)), "300 files of 300 bytes became 301 files of 301 bytes");
    DataListing grown = many(300);
    grown.bytes += 10;
    EXPECT_EQ(describe_difference(many(300), grown),
              "of the 300 files of 300 bytes, files after the first 256 have changed");
}

TEST(DataListing, IsEmptyIfOneListingIsEmpty) {
    EXPECT_EQ(describe_difference({}, many(1)), "");
    EXPECT_EQ(describe_difference(many(1), {}), "");
}

TEST(ListNames, ShowsThreeAndCountsTheOthers) {
    EXPECT_EQ(list_names({"a"}, 1), "a");
    EXPECT_EQ(list_names({"a", "b", "c"}, 3), "a, b, c");
    EXPECT_EQ(list_names({"a", "b", "c", "d"}, 4), "a, b, c and 1 more");
    EXPECT_EQ(list_names({"a", "b", "c"}, 2000), "a, b, c and 1,997 more");
}

}  // namespace
}  // namespace microbatch
