#include "microbatch/data/file_format.h"

#include <gtest/gtest.h>

#include <string>

#include "support/temp_folder.h"

namespace microbatch {
namespace {

FileFormat::Kind kind_of(const std::string& content) {
    const test::TempFolder folder;
    return format_of(InputFile(folder.write("file", content))).kind;
}

/// Each character with a NUL byte before or after it.
std::string widened(const std::string& text, bool little_endian) {
    std::string bytes;
    for (const char one : text) bytes += little_endian ? std::string{one, '\0'} : std::string{'\0', one};
    return bytes;
}

TEST(FileFormat, TextHasNoNulByteInItsFirst8KiB) {
    EXPECT_EQ(kind_of(""), FileFormat::text);
    EXPECT_EQ(kind_of("na\xc3\xafve\r\n"), FileFormat::text);
    EXPECT_EQ(kind_of(std::string(8192, 'x') + '\0'), FileFormat::text);
    EXPECT_EQ(kind_of(std::string(8191, 'x') + '\0'), FileFormat::binary);
    EXPECT_EQ(kind_of(std::string(1, '\0')), FileFormat::binary);
}

TEST(FileFormat, Utf16HasAMarkOrANulByteBesideEachCharacter) {
    EXPECT_EQ(kind_of("\xff\xfe\x61\x62"), FileFormat::utf16);
    EXPECT_EQ(kind_of("\xfe\xff\x61\x62"), FileFormat::utf16);
    for (const bool little_endian : {true, false}) {
        EXPECT_EQ(kind_of(widened("Hello,\tworld\r\n", little_endian)), FileFormat::utf16);
        EXPECT_EQ(kind_of(widened(std::string(5000, 'a'), little_endian)), FileFormat::utf16);
        EXPECT_EQ(kind_of(widened("tokens \1", little_endian)), FileFormat::binary);
        EXPECT_EQ(kind_of(widened("text", little_endian) + "xx"), FileFormat::binary);
    }
    EXPECT_EQ(kind_of(std::string(100, '\0')), FileFormat::binary);
}

TEST(FileFormat, KnowsFormatsByTheirSignature) {
    const test::TempFolder folder;
    const auto name_of = [&](const std::string& content) {
        const FileFormat format = format_of(InputFile(folder.write("file", content)));
        EXPECT_EQ(format.kind, FileFormat::known) << content;
        return std::string(format.name);
    };
    EXPECT_EQ(name_of("\x1f\x8b\x08..."), "gzip-compressed");
    EXPECT_EQ(name_of("\x28\xb5\x2f\xfd..."), "Zstandard-compressed");
    EXPECT_EQ(name_of("PAR1..."), "a Parquet table");
    EXPECT_EQ(name_of(std::string("ARROW1\0\0", 8)), "an Arrow table");
    EXPECT_EQ(name_of("%PDF-1.7"), "a PDF document");
}

}  // namespace
}  // namespace microbatch
