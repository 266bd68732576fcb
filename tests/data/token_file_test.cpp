#include "microbatch/data/tokens.h"

#include <gtest/gtest.h>
#include <sys/stat.h>

#include <cstdint>
#include <fstream>
#include <random>
#include <span>
#include <string>
#include <vector>

#include "data/elements.h"
#include "microbatch/core/crc32c.h"
#include "microbatch/data/token_windows.h"
#include "support/errors.h"
#include "support/temp_folder.h"

namespace microbatch {
namespace {

namespace fs = std::filesystem;

using Values = std::vector<std::uint16_t>;

void expect_bad_data(const fs::path& path, std::vector<std::string> parts) {
    parts.push_back(path.string());
    test::expect_error(ErrorKind::bad_data, parts, [&] { open_token_file(path); });
}

std::string little_endian(const Values& values) {
    std::string bytes;
    for (const std::uint16_t value : values) {
        bytes += static_cast<char>(value & 0xff);
        bytes += static_cast<char>(value >> 8);
    }
    return bytes;
}

/// The header of llm.c: 256 int32, of which three are used.
std::string header(std::uint32_t magic, std::uint32_t version, std::uint32_t count) {
    std::string bytes;
    for (const std::uint32_t word : {magic, version, count}) {
        for (int shift = 0; shift < 32; shift += 8) bytes += static_cast<char>(word >> shift & 0xff);
    }
    bytes.resize(1024);
    return bytes;
}

Values values_of(const Tokens& tokens) {
    const auto part = std::get<TokensInFile>(tokens.values);
    Values values(part.count);
    part.file->read(part.offset, std::as_writable_bytes(std::span(values)));
    return values;
}

TEST(TokenFile, ReadsLittleEndianTokensWithoutAHeader) {
    const test::TempFolder folder;
    // 50256 is 0xc450: low byte first.
    EXPECT_EQ(values_of(open_token_file(folder.write("a.bin", std::string("\x50\xc4\x01\0", 4)))), (Values{50256, 1}));
}

TEST(TokenFile, ReadsTheTokensAfterAHeaderOfLlmC) {
    const test::TempFolder folder;
    const Values values{50256, 1, 65535};
    const auto path = folder.write("a.bin", header(20240520, 1, 3) + little_endian(values));
    EXPECT_EQ(values_of(open_token_file(path)), values);
    EXPECT_EQ(open_token_file(folder.write("b.bin", header(20240520, 1, 0))).size(), 0);
}

TEST(TokenFile, GivesBackRandomTokensInBothFormats) {
    std::mt19937 random(2);
    const test::TempFolder folder;
    for (int round = 0; round < 30; ++round) {
        Values values(1 + random() % 3000);
        for (auto& value : values) value = static_cast<std::uint16_t>(random() % 50257);
        const std::string bytes = little_endian(values);
        const auto count = static_cast<std::uint32_t>(values.size());
        EXPECT_EQ(values_of(open_token_file(folder.write("plain.bin", bytes))), values);
        EXPECT_EQ(values_of(open_token_file(folder.write("llmc.bin", header(20240520, 1, count) + bytes))), values);
    }
}

TEST(TokenFile, GivesWindowsOfBothFormats) {
    const test::TempFolder folder;
    const std::string bytes = little_endian({50256, 1, 65535, 7, 8, 9});
    for (const auto& content : {bytes, header(20240520, 1, 6) + bytes}) {
        const TokenWindows windows(open_token_file(folder.write("a.bin", content)).slice(1, 6), 2);
        const Batch batch = windows.get(std::vector<std::int64_t>{1, 0});
        EXPECT_EQ(test::elements<std::int64_t>(batch.fields[0]), (std::vector<std::int64_t>{7, 8, 1, 65535}));
        EXPECT_EQ(test::elements<std::int64_t>(batch.fields[1]), (std::vector<std::int64_t>{8, 9, 65535, 7}));
    }
}

TEST(TokenFile, IsReadWhenASampleIsAskedFor) {
    const test::TempFolder folder;
    const auto path = folder.write("a.bin", little_endian({1, 2, 3}));
    const Tokens tokens = open_token_file(path);
    std::fstream(path, std::ios::in | std::ios::out | std::ios::binary) << little_endian({7, 8, 9});  // in place
    EXPECT_EQ(values_of(tokens), (Values{7, 8, 9}));
}

TEST(TokenFile, ThatIsRemovedIsReadAsLongAsASliceOfItLives) {
    const test::TempFolder folder;
    const fs::path path = folder.write("a.bin", little_endian({1, 2, 3, 4}));
    const Tokens part = open_token_file(path).slice(2, 4);
    fs::remove(path);
    EXPECT_EQ(values_of(part), (Values{3, 4}));
}

TEST(TokenFile, ThatIsTruncatedIsAnErrorForTheMissingSample) {
    const test::TempFolder folder;
    const fs::path path = folder.write("a.bin", little_endian({1, 2, 3, 4, 5}));
    const Tokens tokens = open_token_file(path);
    const TokenWindows windows(tokens, 2);
    fs::resize_file(path, 7);
    EXPECT_EQ(test::elements<std::int64_t>(windows.get(std::vector<std::int64_t>{0}).fields[1]),
              (std::vector<std::int64_t>{2, 3}));
    const std::vector<std::string> parts{"cannot read " + path.string() + ": it ends at byte 7", "10 bytes"};
    test::expect_error(ErrorKind::bad_data, parts, [&] { windows.get(std::vector<std::int64_t>{0, 1}); });
    test::expect_error(ErrorKind::bad_data, parts, [&] { scan(tokens); });
}

TEST(TokenFile, IsScannedInParts) {
    std::mt19937 random(5);
    Values values(1'300'000);  // three parts
    for (auto& value : values) value = static_cast<std::uint16_t>(random() % 40000);
    values[1'299'999] = 50256;
    const test::TempFolder folder;
    const std::string bytes = little_endian(values);
    const TokenScan seen = scan(open_token_file(folder.write("a.bin", bytes)));
    EXPECT_EQ(seen.vocabulary, 50257);
    EXPECT_EQ(seen.checksum, crc32c(bytes));
}

TEST(TokenFile, RefusesAPipe) {
    const test::TempFolder folder;
    const fs::path path = folder.path() / "a.bin";
    ASSERT_EQ(::mkfifo(path.c_str(), 0600), 0);
    expect_bad_data(path, {"not a regular file"});
}

TEST(TokenFile, RefusesAHeaderThatContradictsTheSize) {
    const test::TempFolder folder;
    const std::string bytes = little_endian({1, 2, 3});
    expect_bad_data(folder.write("a.bin", header(20240520, 1, 4) + bytes), {"truncated", "4 tokens", "6 bytes"});
    expect_bad_data(folder.write("b.bin", header(20240520, 1, 2) + bytes), {"corrupted", "2 tokens", "6 bytes"});
    expect_bad_data(folder.write("c.bin", header(20240520, 1, 0xffffffff) + bytes), {"corrupted", "-1 tokens"});
    expect_bad_data(folder.write("d.bin", header(20240520, 1, 0x7fffffff) + bytes), {"2147483647 tokens", "6 bytes"});
    // Twice this count is 6 in 32 bits.
    expect_bad_data(folder.write("f.bin", header(20240520, 1, 0x80000003) + bytes), {"-2147483645 tokens", "6 bytes"});
    expect_bad_data(folder.write("e.bin", header(20240520, 1, 3) + bytes.substr(1)), {"3 tokens", "5 bytes"});
}

TEST(TokenFile, RefusesATruncatedHeader) {
    const test::TempFolder folder;
    for (const std::size_t size : {4U, 12U, 1022U, 1023U}) {
        expect_bad_data(folder.write("a.bin", header(20240520, 1, 3).substr(0, size)),
                        {"truncated", std::to_string(size) + " bytes of the 1024"});
    }
}

TEST(TokenFile, RefusesAnotherVersion) {
    const test::TempFolder folder;
    expect_bad_data(folder.write("a.bin", header(20240520, 2, 1) + "ab"), {"version 2", "version 1"});
}

TEST(TokenFile, RefusesUint32Tokens) {
    const test::TempFolder folder;
    expect_bad_data(folder.write("a.bin", header(20240801, 7, 1) + "abcd"), {"uint32", "20240801", "only uint16"});
}

TEST(TokenFile, RefusesOtherFormatsByTheirName) {
    const test::TempFolder folder;
    const std::string rest(2000, '\0');
    expect_bad_data(folder.write("a.bin", "\x93NUMPY\1" + rest), {"a NumPy array"});
    expect_bad_data(folder.write("a.bin", "PK\x03\x04" + rest), {"a zip archive"});
}

TEST(TokenFile, RefusesText) {
    const test::TempFolder folder;
    std::string text;
    while (text.size() < 4096) text += "\xc3\xa4hnlich ";
    text.resize(4096);
    expect_bad_data(folder.write("a.bin", text), {"looks like text", "does not end in .bin"});
    EXPECT_EQ(open_token_file(folder.write("a.bin", text.substr(2))).size(), 2047);  // too few bytes to tell
    text[4000] = '\0';
    EXPECT_EQ(open_token_file(folder.write("a.bin", text)).size(), 2048);
}

TEST(TokenFile, RefusesHalfAToken) {
    const test::TempFolder folder;
    expect_bad_data(folder.write("a.bin", "abc"), {"3 bytes is an odd number"});
    expect_bad_data(folder.write("b.bin", "a"), {"1 bytes is an odd number"});
}

TEST(TokenFile, RefusesAMissingOrEmptyFile) {
    const test::TempFolder folder;
    expect_bad_data(folder.path() / "missing.bin", {"No such file or directory"});
    expect_bad_data(folder.write("a.bin", ""), {"is empty"});
}

}  // namespace
}  // namespace microbatch
