#include "microbatch/data/idx.h"

#include <gtest/gtest.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>
#include <zlib.h>

#include <algorithm>
#include <initializer_list>
#include <random>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

#include "support/errors.h"
#include "support/temp_folder.h"

namespace microbatch {
namespace {

namespace fs = std::filesystem;

using Shape = std::vector<std::int64_t>;
using Bytes = std::vector<std::uint8_t>;

constexpr std::uint64_t tebibyte = std::uint64_t{1} << 40;

IdxArray read(const fs::path& path, int dimensions) {
    return read_idx(path, dimensions, tebibyte);
}

void expect_bad_data(const fs::path& path, int dimensions, std::vector<std::string> parts) {
    parts.push_back(path.string());
    test::expect_error(ErrorKind::bad_data, parts, [&] { read(path, dimensions); });
}

std::string big_endian(std::uint32_t word) {
    std::string bytes;
    for (int shift = 24; shift >= 0; shift -= 8) bytes += static_cast<char>(word >> shift & 0xff);
    return bytes;
}

/// An IDX file: magic number, lengths, elements.
std::string idx(std::uint32_t magic, std::initializer_list<std::uint32_t> lengths, std::string_view elements) {
    std::string bytes = big_endian(magic);
    for (const std::uint32_t length : lengths) bytes += big_endian(length);
    return bytes.append(elements);
}

std::string gzipped(const test::TempFolder& folder, const std::string& bytes) {
    const fs::path path = folder.path() / "gzipped";
    const gzFile file = ::gzopen(path.c_str(), "wb");
    ::gzwrite(file, bytes.data(), static_cast<unsigned>(bytes.size()));
    ::gzclose(file);
    return test::read_file(path);
}

TEST(Idx, ReadsTheShapeAndTheElements) {
    const test::TempFolder folder;
    const auto images = read(folder.write("images", idx(0x803, {2, 1, 3}, "abcdef")), 3);
    EXPECT_EQ(images.shape, (Shape{2, 1, 3}));
    EXPECT_EQ(images.bytes, (Bytes{'a', 'b', 'c', 'd', 'e', 'f'}));
    const auto labels = read(folder.write("labels", idx(0x801, {1}, "\xff")), 1);
    EXPECT_EQ(labels.shape, Shape{1});
    EXPECT_EQ(labels.bytes, Bytes{255});
}

TEST(Idx, LengthsAreBigEndian) {
    const test::TempFolder folder;
    const auto array = read(folder.write("a", idx(0x801, {0x010203}, std::string(0x010203, 'x'))), 1);
    EXPECT_EQ(array.shape, Shape{66051});
    EXPECT_EQ(array.bytes, Bytes(66051, 'x'));
}

TEST(Idx, TellsGzipByTheContentAndNotTheName) {
    const test::TempFolder folder;
    const std::string bytes = idx(0x801, {3}, "abc");
    EXPECT_EQ(read(folder.write("a", gzipped(folder, bytes)), 1).bytes, (Bytes{'a', 'b', 'c'}));
    EXPECT_EQ(read(folder.write("b.gz", bytes), 1).bytes, (Bytes{'a', 'b', 'c'}));
}

TEST(Idx, GivesBackRandomBytesOfSeveralChunks) {
    const test::TempFolder folder;
    std::mt19937 random(3);
    for (const std::uint32_t size : {(1U << 20) - 1, 1U << 20, (1U << 20) + 1, 5'000'000U}) {
        std::string elements(size, '\0');
        for (char& element : elements) element = static_cast<char>(random());
        const std::string bytes = idx(0x801, {size}, elements);
        const Bytes expected(elements.begin(), elements.end());
        const auto plain = read(folder.write("plain", bytes), 1);
        EXPECT_TRUE(plain.bytes == expected) << size;
        EXPECT_EQ(plain.bytes.capacity(), size);  // nothing kept to spare
        EXPECT_TRUE(read(folder.write("zipped", gzipped(folder, bytes)), 1).bytes == expected) << size;
    }
}

TEST(Idx, RefusesAWrongMagicNumber) {
    const test::TempFolder folder;
    expect_bad_data(folder.write("a", idx(0x12000803, {1, 1, 1}, "a")), 3, {"not an IDX", "0x12000803", "0x00000803"});
    expect_bad_data(folder.write("b", idx(0x00340801, {1}, "a")), 1, {"not an IDX", "0x00340801", "0x00000801"});
}

TEST(Idx, RefusesAnotherElementType) {
    const test::TempFolder folder;
    expect_bad_data(folder.write("a", idx(0xd01, {1}, "abcd")), 1, {"type 0x0d", "expected 0x08"});
}

TEST(Idx, RefusesAnotherNumberOfDimensions) {
    const test::TempFolder folder;
    expect_bad_data(folder.write("a", idx(0x801, {1}, "a")), 3, {"has 1 dimensions", "expected 3 (images)"});
    expect_bad_data(folder.write("b", idx(0x803, {1, 1, 1}, "a")), 1, {"has 3 dimensions", "expected 1 (labels)"});
}

TEST(Idx, RefusesALengthOfZero) {
    const test::TempFolder folder;
    expect_bad_data(folder.write("a", idx(0x803, {0, 28, 28}, "")), 3, {"dimension 0 is 0", "expected at least 1"});
    expect_bad_data(folder.write("b", idx(0x803, {5, 28, 0}, "")), 3, {"dimension 2 is 0"});
}

TEST(Idx, RefusesLengthsThatOverflowOrAreAbsurd) {
    const test::TempFolder folder;
    const std::uint32_t most = 0xffffffff;
    expect_bad_data(folder.write("a", idx(0x803, {most, most, most}, "a")), 3, {"more than 1 TiB", "4294967295"});
    // 2^32 * 2^32 is 0 in 64 bits.
    expect_bad_data(folder.write("b", idx(0x803, {1U << 31, 1U << 31, 4}, "a")), 3, {"more than 1 TiB"});
    expect_bad_data(folder.write("c", idx(0x802, {1U << 20, (1U << 20) + 1}, "a")), 2, {"more than 1 TiB"});
}

TEST(Idx, BelievesTheFileAndNotItsHeaderAboutMemory) {
    const test::TempFolder folder;
    // 10^12 bytes announced, more than this machine could allocate: an error of this library, not std::bad_alloc.
    const std::string bytes = idx(0x803, {10'000, 10'000, 10'000}, "abc");
    expect_bad_data(folder.write("a", bytes), 3, {"truncated", "has 3 bytes", "expected 1000000000000"});
    expect_bad_data(folder.write("b", gzipped(folder, bytes)), 3, {"truncated", "has 3 bytes"});
}

/// Bytes of memory that a call takes at most, all that the process has meanwhile; of a process of its own, for a peak
/// is never forgotten.
template <class Call>
std::int64_t peak_bytes(Call&& call) {
    int ends[2];
    if (::pipe(ends) != 0) throw std::runtime_error("no pipe");
    const pid_t child = ::fork();
    if (child == 0) {
        rusage before{}, after{};
        ::getrusage(RUSAGE_SELF, &before);
        call();
        ::getrusage(RUSAGE_SELF, &after);
        const std::int64_t kibibytes = after.ru_maxrss - before.ru_maxrss;
        const bool written = ::write(ends[1], &kibibytes, sizeof kibibytes) == sizeof kibibytes;
        ::_exit(written ? 0 : 1);
    }
    ::close(ends[1]);
    std::int64_t kibibytes = -1;
    const bool got = ::read(ends[0], &kibibytes, sizeof kibibytes) == sizeof kibibytes;
    ::close(ends[0]);
    ::waitpid(child, nullptr, 0);
    return got ? kibibytes * 1024 : -1;
}

/// A gzip stream of some bytes and then many zeros, which takes a thousandth of them.
fs::path write_bomb(const test::TempFolder& folder, const std::string& first, std::size_t zeros) {
    const fs::path path = folder.path() / "bomb.gz";
    const gzFile file = ::gzopen(path.c_str(), "wb");
    ::gzwrite(file, first.data(), static_cast<unsigned>(first.size()));
    const std::string some(1 << 20, '\0');
    for (std::size_t i = 0; i < zeros; i += some.size()) ::gzwrite(file, some.data(), 1 << 20);
    ::gzclose(file);
    return path;
}

TEST(Idx, AGzipBombTakesNoMoreMemoryThanItsHeaderClaims) {
    const test::TempFolder folder;
    const fs::path path = write_bomb(folder, idx(0x803, {10, 28, 28}, ""), 64 << 20);
    ASSERT_LT(fs::file_size(path), 1U << 20);
    expect_bad_data(path, 3, {"has extra bytes at the end", "claims 7840 bytes"});
    const auto peak = peak_bytes([&] { test::error_message(ErrorKind::bad_data, [&] { read(path, 3); }); });
    EXPECT_GE(peak, 0);
    EXPECT_LT(peak, 16 << 20);
}

TEST(Idx, AGzipBombThatClaimsItsSizeIsRefusedBeforeItIsExpanded) {
    const test::TempFolder folder;
    const fs::path path = write_bomb(folder, idx(0x802, {1 << 20, 1 << 20}, ""), 64 << 20);
    const auto refusal = [&] {
        test::expect_error(ErrorKind::bad_data, {path.string(), "more than 32 MiB", "dimension 1 is 1048576"},
                           [&] { read_idx(path, 2, 32 << 20); });
    };
    refusal();
    const auto peak = peak_bytes(refusal);
    EXPECT_GE(peak, 0);
    EXPECT_LT(peak, 16 << 20);
}

TEST(Idx, AcceptsUpToTheLimitAndNotAByteMore) {
    const test::TempFolder folder;
    const fs::path path = folder.write("a", idx(0x803, {2, 3, 5}, std::string(30, 'x')));
    EXPECT_EQ(read_idx(path, 3, 30).bytes.size(), 30U);
    test::expect_error(ErrorKind::bad_data, {path.string(), "more than 29 B", "dimension 2 is 5"},
                       [&] { read_idx(path, 3, 29); });
}

TEST(Idx, AnArrayIsReadWithoutAnotherOfItsSize) {
    const test::TempFolder folder;
    const std::uint32_t size = 65 << 20;  // just beyond where doubling would hold two arrays
    const fs::path path = folder.write("a", idx(0x801, {size}, std::string(size, 'x')));
    const auto peak = peak_bytes([&] { EXPECT_EQ(read(path, 1).bytes.size(), size); });
    EXPECT_GT(peak, 0);
    EXPECT_LT(peak, size + (32 << 20));
}

TEST(Idx, RefusesAPipe) {
    const test::TempFolder folder;
    const fs::path path = folder.path() / "pipe";
    ASSERT_EQ(::mkfifo(path.c_str(), 0600), 0);
    expect_bad_data(path, 1, {"not a regular file"});
}

TEST(Idx, RefusesATruncatedFileWhereverItEnds) {
    const test::TempFolder folder;
    const std::string bytes = idx(0x803, {2, 1, 3}, "abcdef");
    for (std::size_t size = 1; size < bytes.size(); ++size) {
        SCOPED_TRACE(size);
        expect_bad_data(folder.write("a", bytes.substr(0, size)), 3, {"truncated", "expected"});
    }
}

TEST(Idx, RefusesBytesAfterTheEnd) {
    const test::TempFolder folder;
    const std::string bytes = idx(0x801, {3}, "abcd");
    expect_bad_data(folder.write("a", bytes), 1, {"has extra bytes at the end", "claims 3 bytes"});
    expect_bad_data(folder.write("b", gzipped(folder, bytes)), 1, {"has extra bytes at the end"});
}

TEST(Idx, RefusesAGzipStreamTruncatedAnywhere) {
    const test::TempFolder folder;
    std::mt19937 random(4);
    std::string elements(300, '\0');
    for (char& element : elements) element = static_cast<char>(random());
    const std::string bytes = gzipped(folder, idx(0x801, {300}, elements));
    EXPECT_EQ(read(folder.write("whole", bytes), 1).bytes.size(), 300U);
    // From 2 bytes on it is recognised as gzip; the last 8 are its checksum and size.
    for (std::size_t size = 2; size < bytes.size(); ++size) {
        SCOPED_TRACE(size);
        expect_bad_data(folder.write("a", bytes.substr(0, size)), 1, {"is corrupted", "download it again"});
    }
}

TEST(Idx, RefusesAGzipStreamWithAFlippedByte) {
    const test::TempFolder folder;
    std::string elements(300, 'a');
    std::string bytes = gzipped(folder, idx(0x801, {300}, elements));
    bytes[bytes.size() - 8] ^= 1;  // the checksum
    expect_bad_data(folder.write("a", bytes), 1, {"is corrupted", "incorrect data check"});
}

TEST(Idx, RefusesAMissingOrEmptyFileOrAFolder) {
    const test::TempFolder folder;
    expect_bad_data(folder.path() / "missing", 1, {"No such file or directory"});
    expect_bad_data(folder.write("a", ""), 1, {"is empty"});
    expect_bad_data(folder.path(), 1, {"Is a directory"});
}

TEST(Idx, RefusesToExpectAnImpossibleNumberOfDimensions) {
    for (const int dimensions : {0, -1, 256}) {
        test::expect_usage_error({std::to_string(dimensions)}, [&] { read("unused", dimensions); });
    }
}

TEST(Idx, ReadsFashionMnist) {
    const fs::path folder = "/usr/share/datasets/fashion-mnist";
    ASSERT_TRUE(fs::is_directory(folder)) << folder << " is missing: install Debian's dataset-fashion-mnist";
    EXPECT_EQ(read(folder / "train-images-idx3-ubyte.gz", 3).shape, (Shape{60000, 28, 28}));
    EXPECT_EQ(read(folder / "t10k-images-idx3-ubyte.gz", 3).shape, (Shape{10000, 28, 28}));
    const auto train = read(folder / "train-labels-idx1-ubyte.gz", 1).bytes;
    const auto test = read(folder / "t10k-labels-idx1-ubyte.gz", 1).bytes;
    ASSERT_EQ(train.size(), 60000U);
    ASSERT_EQ(test.size(), 10000U);
    // The first labels, as published with the data set; it has the same number of each of its ten classes.
    EXPECT_EQ(Bytes(train.begin(), train.begin() + 4), (Bytes{9, 0, 0, 3}));
    EXPECT_EQ(Bytes(test.begin(), test.begin() + 4), (Bytes{9, 2, 1, 1}));
    for (int label = 0; label < 10; ++label) {
        EXPECT_EQ(std::count(train.begin(), train.end(), label), 6000);
        EXPECT_EQ(std::count(test.begin(), test.end(), label), 1000);
    }
}

}  // namespace
}  // namespace microbatch
