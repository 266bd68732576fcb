#include "microbatch/core/crc32c.h"

#include <gtest/gtest.h>

#include <random>
#include <string>
#include <string_view>

namespace microbatch {
namespace {

// RFC 3720, appendix B.4, and the check value of the catalogue of parametrised CRC algorithms.
TEST(Crc32c, IsThatOfTheStandard) {
    EXPECT_EQ(crc32c(""), 0u);
    EXPECT_EQ(crc32c("123456789"), 0xE3069283u);
    EXPECT_EQ(crc32c(std::string(32, '\0')), 0x8A9136AAu);
    EXPECT_EQ(crc32c(std::string(32, '\xFF')), 0x62A8AB43u);
    std::string rising, falling;
    for (int i = 0; i < 32; ++i) {
        rising += static_cast<char>(i);
        falling += static_cast<char>(31 - i);
    }
    EXPECT_EQ(crc32c(rising), 0x46DD794Eu);
    EXPECT_EQ(crc32c(falling), 0x113FDB5Cu);
}

TEST(Crc32c, InPiecesIsThatOfTheWhole) {
    const std::string all = "Gradients are summed; one division by the total weight, before one clip.";
    for (std::size_t cut = 0; cut <= all.size(); ++cut) {
        EXPECT_EQ(crc32c(all.substr(cut), crc32c(all.substr(0, cut))), crc32c(all));
    }
}

TEST(Crc32c, ByTheProcessorsInstructionIsThatOfTheTable) {
    std::mt19937_64 random(1);
    std::string bytes(5000, '\0');
    for (char& byte : bytes) byte = static_cast<char>(random());
    for (int i = 0; i < 5000; ++i) {
        const std::size_t length = i < 200 ? static_cast<std::size_t>(i) : random() % 4000;
        const std::string_view part = std::string_view(bytes).substr(random() % 1000, length);
        const auto before = static_cast<std::uint32_t>(random());
        EXPECT_EQ(crc32c(part, before), crc32c_by_table(part, before)) << length;
    }
    EXPECT_EQ(crc32c_by_table("123456789"), 0xE3069283u);
}

}  // namespace
}  // namespace microbatch
