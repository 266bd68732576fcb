#include "microbatch/core/units.h"

#include <gtest/gtest.h>

#include <cstdint>
#include <limits>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "support/errors.h"

namespace microbatch {
namespace {

using test::expect_usage_error;

constexpr std::int64_t largest = std::numeric_limits<std::int64_t>::max();

TEST(Units, ReadsBinaryAndDecimalSizes) {
    EXPECT_EQ(parse_bytes("400MiB"), 400LL * 1024 * 1024);
    EXPECT_EQ(parse_bytes("2GiB"), 2LL << 30U);
    EXPECT_EQ(parse_bytes("2GB"), 2'000'000'000);
    EXPECT_EQ(parse_bytes("512 KiB"), 512 * 1024);
    EXPECT_EQ(parse_bytes("3KB"), 3'000);
    EXPECT_EQ(parse_bytes("7MB"), 7'000'000);
    EXPECT_EQ(parse_bytes("1TiB"), 1LL << 40U);
    EXPECT_EQ(parse_bytes("1TB"), 1'000'000'000'000);
    EXPECT_EQ(parse_bytes("123"), 123);
    EXPECT_EQ(parse_bytes("123B"), 123);
}

TEST(Units, ReadsSizesInAnyCaseAndWithSpace) {
    EXPECT_EQ(parse_bytes(" 1.5gib\t"), 3LL << 29U);
    EXPECT_EQ(parse_bytes("1.5  GIB"), 3LL << 29U);
    EXPECT_EQ(parse_bytes("10 mb"), 10'000'000);
}

TEST(Units, ReadsFractionsOfSizesExactlyAndRoundsDown) {
    EXPECT_EQ(parse_bytes("0.1GB"), 100'000'000);
    EXPECT_EQ(parse_bytes("0.29KB"), 290);  // 0.29 * 1000 is 289.99... in binary
    EXPECT_EQ(parse_bytes("1.9999 B"), 1);
    EXPECT_EQ(parse_bytes("1.0000000001GiB"), 1'073'741'824);  // 2^30 + 0.107
    // 2^40 * 0.999999999999999999 = 1099511627775.9999989: the last bit of the arithmetic matters.
    EXPECT_EQ(parse_bytes("0.999999999999999999TiB"), 1'099'511'627'775);
}

TEST(Units, ReadsSizesUpToTheLargestAndNotBeyond) {
    EXPECT_EQ(parse_bytes("9223372036854775807"), largest);
    EXPECT_EQ(parse_bytes("8388607TiB"), 8'388'607LL << 40U);
    EXPECT_EQ(parse_bytes("8388607.5TiB"), (8'388'607LL << 40U) + (1LL << 39U));
    EXPECT_EQ(parse_bytes("9223372036.854775807GB"), largest);
    expect_usage_error({"it is above 9223372036854775807"}, [] { parse_bytes("9223372036.9GB"); });
    expect_usage_error({"\"8388608TiB\": it is above 9223372036854775807"}, [] { parse_bytes("8388608TiB"); });
    expect_usage_error({"too many digits"}, [] { parse_bytes("9223372036854775808"); });
    expect_usage_error({"too many digits"}, [] { parse_bytes("99999999999999999999999"); });
    expect_usage_error({"too many digits"}, [] { parse_bytes("0.0000000000000000001GiB"); });
}

TEST(Units, RefusesWhatIsNotASize) {
    expect_usage_error({"\"\": it is empty; write for example 400MiB, 1.5GiB or 2GB"}, [] { parse_bytes(""); });
    expect_usage_error({"it is empty"}, [] { parse_bytes("  "); });
    expect_usage_error({"\"GiB\": it does not begin with a number"}, [] { parse_bytes("GiB"); });
    expect_usage_error({"it does not begin with a number"}, [] { parse_bytes("."); });
    expect_usage_error({"\"1.5\": a fraction needs a unit"}, [] { parse_bytes("1.5"); });
    expect_usage_error({"\"nan\": it does not begin with a number"}, [] { parse_bytes("nan"); });
    expect_usage_error({"\"inf GiB\": it does not begin with a number"}, [] { parse_bytes("inf GiB"); });
    expect_usage_error({"\"-1GiB\": it is negative"}, [] { parse_bytes("-1GiB"); });
    expect_usage_error({"\"0\": it must be above 0"}, [] { parse_bytes("0"); });
    expect_usage_error({"it must be above 0"}, [] { parse_bytes("0.0001KiB"); });
    expect_usage_error({"unknown unit \"parsec\"; the units are B, KiB, MiB"}, [] { parse_bytes("3 parsec"); });
    expect_usage_error({"unknown unit \".2gib\""}, [] { parse_bytes("1.5.2GiB"); });
    expect_usage_error({"unknown unit \",5gib\""}, [] { parse_bytes("1,5GiB"); });
    expect_usage_error({"unknown unit \"g\""}, [] { parse_bytes("2G"); });
}

TEST(Units, WritesSecondsAsAClockShowsThem) {
    EXPECT_EQ(format_seconds(0.0), "0:00");
    EXPECT_EQ(format_seconds(62.4), "1:02");
    EXPECT_EQ(format_seconds(3723.0), "1:02:03");
    EXPECT_EQ(format_seconds(360000.0), "100:00:00");
    for (const double odd : {-1.0, std::numeric_limits<double>::quiet_NaN(), std::numeric_limits<double>::infinity()}) {
        EXPECT_EQ(format_seconds(odd), "-");
    }
}

TEST(Units, WritesSizesWithThreeDigitsInBinaryUnits) {
    EXPECT_EQ(format_bytes(0), "0 B");
    EXPECT_EQ(format_bytes(512), "512 B");
    EXPECT_EQ(format_bytes(1023), "1023 B");
    EXPECT_EQ(format_bytes(1024), "1 KiB");
    EXPECT_EQ(format_bytes(1536), "1.5 KiB");
    EXPECT_EQ(format_bytes(400LL << 20U), "400 MiB");
    EXPECT_EQ(format_bytes(9LL << 28U), "2.25 GiB");
    EXPECT_EQ(format_bytes(10'000), "9.77 KiB");   // 9.765625
    EXPECT_EQ(format_bytes(50'000), "48.8 KiB");   // 48.828125
    EXPECT_EQ(format_bytes(500'000), "488 KiB");   // 488.28125
    EXPECT_EQ(format_bytes(102'348), "99.9 KiB");  // 99.949
    EXPECT_EQ(format_bytes(102'349), "100 KiB");   // 99.9502: not 100.0
    EXPECT_EQ(format_bytes(10'235), "10 KiB");     // 9.9951: not 10.00
    EXPECT_EQ(format_bytes(15'626), "15.3 KiB");   // 15.2598
    EXPECT_EQ(format_bytes(154'010), "150 KiB");   // 150.400
    EXPECT_EQ(format_bytes(-1536), "-1.5 KiB");
}

TEST(Units, WritesSizesThatRoundToTheNextUnitInThatUnit) {
    EXPECT_EQ(format_bytes((1LL << 20U) - 1), "1 MiB");
    EXPECT_EQ(format_bytes(1023 * 1024 + 511), "1023 KiB");
    EXPECT_EQ(format_bytes(1023 * 1024 + 512), "1 MiB");
    EXPECT_EQ(format_bytes(largest), "8 EiB");
    EXPECT_EQ(format_bytes(std::numeric_limits<std::int64_t>::min()), "-8 EiB");
}

TEST(Units, WrittenSizesAreReadBackWithinHalfAPercent) {
    std::mt19937_64 random(1);
    for (int trial = 0; trial < 10'000; ++trial) {
        const auto bytes = static_cast<std::int64_t>(random() >> (14 + random() % 49)) + 1;  // below 2^50: TiB
        const auto back = parse_bytes(format_bytes(bytes));
        // Three digits: at worst 0.005 of 1.00; reading drops a fraction of a byte.
        EXPECT_LE(std::abs(static_cast<double>(back - bytes)), 0.005 * static_cast<double>(bytes) + 1) << bytes;
    }
}

TEST(Units, ReadsCounts) {
    EXPECT_EQ(parse_count("0"), 0);
    EXPECT_EQ(parse_count("64"), 64);
    EXPECT_EQ(parse_count("10k"), 10'000);
    EXPECT_EQ(parse_count("10 K"), 10'000);
    EXPECT_EQ(parse_count("1M"), 1'000'000);
    EXPECT_EQ(parse_count("1.001G"), 1'001'000'000);
    EXPECT_EQ(parse_count("9223372036854775807"), largest);
}

TEST(Units, RefusesWhatIsNotACount) {
    expect_usage_error({"the count \"0.5\": it is not a whole number; write for example 64"},
                       [] { parse_count("0.5"); });
    expect_usage_error({"not a whole number"}, [] { parse_count("1.0001k"); });
    expect_usage_error({"negative"}, [] { parse_count("-3"); });
    expect_usage_error({"does not begin with a number"}, [] { parse_count("ten"); });
    expect_usage_error({"\"kg\" is not one of k, M and G"}, [] { parse_count("3kg"); });
    expect_usage_error({"it is above 9223372036854775807"}, [] { parse_count("9223372037G"); });
}

TEST(Units, ReadsIntervals) {
    EXPECT_EQ(parse_interval("100 steps"), (Interval{100, Unit::steps}));
    EXPECT_EQ(parse_interval("1M tokens"), (Interval{1'000'000, Unit::tokens}));
    EXPECT_EQ(parse_interval("2.5k samples"), (Interval{2'500, Unit::samples}));
    EXPECT_EQ(parse_interval("0.1k samples"), (Interval{100, Unit::samples}));
    EXPECT_EQ(parse_interval("0 steps"), (Interval{0, Unit::steps}));
    EXPECT_EQ(parse_interval("1 step"), (Interval{1, Unit::steps}));
    EXPECT_EQ(parse_interval("3 G Token"), (Interval{3'000'000'000, Unit::tokens}));
    EXPECT_EQ(parse_interval("5sample"), (Interval{5, Unit::samples}));
}

TEST(Units, RefusesWhatIsNotAnInterval) {
    expect_usage_error(
        {"\"100\": it has no unit; the units are steps, samples and tokens; write for example \"100 steps\""},
        [] { parse_interval("100"); });
    expect_usage_error({"it has no unit"}, [] { parse_interval("100k"); });
    expect_usage_error({"unknown unit \"epochs\"; the units are steps, samples and tokens"},
                       [] { parse_interval("3 epochs"); });
    expect_usage_error({"unknown unit \"million tokens\""}, [] { parse_interval("3 million tokens"); });
    expect_usage_error({"\"0.5 steps\": it is not a whole number"}, [] { parse_interval("0.5 steps"); });
    expect_usage_error({"negative"}, [] { parse_interval("-1 steps"); });
    expect_usage_error({"does not begin with a number"}, [] { parse_interval("steps"); });
    expect_usage_error({"it is above"}, [] { parse_interval("10000000000G tokens"); });
}

TEST(Units, WrittenIntervalsAreReadBackAsTheSame) {
    EXPECT_EQ(to_string(Interval{100, Unit::steps}), "100 steps");
    EXPECT_EQ(to_string(Interval{1, Unit::samples}), "1 sample");
    EXPECT_EQ(to_string(Interval{0, Unit::tokens}), "0 tokens");
    std::mt19937_64 random(2);
    for (const Unit unit : {Unit::steps, Unit::samples, Unit::tokens}) {
        for (const std::int64_t count : {std::int64_t{0}, std::int64_t{1}, std::int64_t{2}, largest}) {
            EXPECT_EQ(parse_interval(to_string(Interval{count, unit})), (Interval{count, unit}));
        }
        for (int trial = 0; trial < 1'000; ++trial) {
            const Interval interval{static_cast<std::int64_t>(random() >> (1 + random() % 63)), unit};
            EXPECT_EQ(parse_interval(to_string(interval)), interval);
        }
    }
}

TEST(Units, ProgressAddsAndIsReadInEachUnit) {
    Progress progress{.steps = 1, .samples = 20, .tokens = 300};
    progress += {.steps = 2, .samples = 10, .tokens = 50};
    EXPECT_EQ(progress.in(Unit::steps), 3);
    EXPECT_EQ(progress.in(Unit::samples), 30);
    EXPECT_EQ(progress.in(Unit::tokens), 350);
    EXPECT_EQ(progress + Progress{}, progress);
}

TEST(Units, ProgressThatLeavesSixtyFourBitsIsAnErrorAndChangesNothing) {
    Progress progress{.steps = 5, .samples = largest, .tokens = 7};
    expect_usage_error({"progress exceeds 64 bits: 9223372036854775807 + 1 samples"},
                       [&] { progress += {.steps = 1, .samples = 1, .tokens = 1}; });
    EXPECT_EQ(progress, (Progress{.steps = 5, .samples = largest, .tokens = 7}));
    EXPECT_EQ((progress + Progress{.samples = -1}).samples, largest - 1);
    expect_usage_error({"-2 + -9223"},
                       [&] { static_cast<void>(Progress{.tokens = -2} + Progress{.tokens = -largest}); });
}

TEST(Units, ConvertsIntervalsAndRoundsUp) {
    // 16 samples a step, 10 tokens a sample: 160 tokens a step.
    EXPECT_EQ(convert({3, Unit::steps}, Unit::samples, 16, 10), (Interval{48, Unit::samples}));
    EXPECT_EQ(convert({3, Unit::steps}, Unit::tokens, 16, 10), (Interval{480, Unit::tokens}));
    EXPECT_EQ(convert({33, Unit::samples}, Unit::steps, 16, 10), (Interval{3, Unit::steps}));
    EXPECT_EQ(convert({32, Unit::samples}, Unit::steps, 16, 10), (Interval{2, Unit::steps}));
    EXPECT_EQ(convert({321, Unit::tokens}, Unit::steps, 16, 10), (Interval{3, Unit::steps}));
    EXPECT_EQ(convert({320, Unit::tokens}, Unit::steps, 16, 10), (Interval{2, Unit::steps}));
    EXPECT_EQ(convert({321, Unit::tokens}, Unit::samples, 16, 10), (Interval{33, Unit::samples}));
    EXPECT_EQ(convert({7, Unit::samples}, Unit::tokens, 16, 10), (Interval{70, Unit::tokens}));
    EXPECT_EQ(convert({0, Unit::tokens}, Unit::steps, 16, 10), (Interval{0, Unit::steps}));
    EXPECT_EQ(convert({7, Unit::tokens}, Unit::tokens, 16, 10), (Interval{7, Unit::tokens}));
    EXPECT_EQ(convert({largest, Unit::tokens}, Unit::steps, 1, 1), (Interval{largest, Unit::steps}));
    EXPECT_EQ(convert({largest, Unit::tokens}, Unit::steps, largest, largest), (Interval{1, Unit::steps}));
}

TEST(Units, ConvertedIntervalIsTheSmallestThatIsLongEnough) {
    std::mt19937_64 random(3);
    for (int trial = 0; trial < 2'000; ++trial) {
        const auto tokens = static_cast<std::int64_t>(random() % 5'000);
        const auto batch = static_cast<std::int64_t>(1 + random() % 40);
        const auto width = static_cast<std::int64_t>(1 + random() % 40);
        const std::int64_t steps = convert({tokens, Unit::tokens}, Unit::steps, batch, width).count;
        EXPECT_GE(steps * batch * width, tokens);
        EXPECT_LT((steps - 1) * batch * width, tokens);
    }
}

TEST(Units, RefusesToConvertWithBadRatesOrBeyondSixtyFourBits) {
    expect_usage_error({"cannot convert 3 steps to tokens with 0 samples per step"}, [] {
        convert({3, Unit::steps}, Unit::tokens, 0, 10);
    });
    expect_usage_error({"-1 tokens per sample"}, [] { convert({3, Unit::steps}, Unit::steps, 16, -1); });
    expect_usage_error({"the interval must be 0 or more"}, [] { convert({-3, Unit::steps}, Unit::tokens, 16, 10); });
    expect_usage_error({"exceeds 64 bits"}, [] { convert({largest, Unit::steps}, Unit::samples, 2, 1); });
    expect_usage_error({"exceeds 64 bits"}, [] { convert({largest / 2, Unit::steps}, Unit::tokens, 2, 2); });
}

}  // namespace
TEST(Units, WritesCountsInGroupsOfThreeDigits) {
    EXPECT_EQ(format_count(0), "0");
    EXPECT_EQ(format_count(999), "999");
    EXPECT_EQ(format_count(1000), "1,000");
    EXPECT_EQ(format_count(-123456), "-123,456");
    EXPECT_EQ(format_count(1234567), "1,234,567");
    EXPECT_EQ(format_count(std::numeric_limits<std::int64_t>::min()), "-9,223,372,036,854,775,808");
}

}  // namespace microbatch
