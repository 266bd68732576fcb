#include "microbatch/data/plausibility.h"

#include <gtest/gtest.h>

#include <memory>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "support/errors.h"

namespace microbatch {
namespace {

using Lines = std::vector<std::string>;
using Labels = std::vector<std::uint8_t>;

TokenScan scan_of(std::vector<std::uint16_t> values) {
    const auto owner = std::make_shared<const std::vector<std::uint16_t>>(std::move(values));
    return scan(Tokens{std::span<const std::uint16_t>(*owner), owner});
}

Lines warnings_of(std::vector<std::uint16_t> values) {
    return check_tokens(scan_of(std::move(values)), "a.bin");
}

void expect_refused(std::vector<std::uint16_t> values, std::vector<std::string> parts) {
    parts.push_back("a.bin");
    test::expect_error(ErrorKind::bad_data, parts, [&] { warnings_of(std::move(values)); });
}

/// Random tokens below `end`, and each of them once.
std::vector<std::uint16_t> tokens_below(int end, int count = 5000) {
    std::mt19937 random(3);
    std::vector<std::uint16_t> values;
    for (int i = 0; i < end; ++i) values.push_back(static_cast<std::uint16_t>(i));
    for (int i = 0; i < count; ++i) values.push_back(static_cast<std::uint16_t>(random() % static_cast<unsigned>(end)));
    return values;
}

/// The halves of wider tokens, the low one first.
std::vector<std::uint16_t> halves(const std::vector<std::uint32_t>& values, bool low_first = true) {
    std::vector<std::uint16_t> all;
    for (const std::uint32_t value : values) {
        const auto low = static_cast<std::uint16_t>(value & 0xffff), high = static_cast<std::uint16_t>(value >> 16);
        all.push_back(low_first ? low : high);
        all.push_back(low_first ? high : low);
    }
    return all;
}

TEST(CheckTokens, IsQuietAboutCharactersBytesAndGpt2) {
    for (const int vocabulary : {2, 65, 128, 256, 4096, 50257, 65536}) {
        EXPECT_EQ(warnings_of(tokens_below(vocabulary)), Lines()) << vocabulary;
    }
    // Characters and an end of text, a few tokens of a large vocabulary.
    std::vector<std::uint16_t> bytes = tokens_below(128);
    bytes.push_back(256);
    EXPECT_EQ(warnings_of(bytes), Lines());
    EXPECT_EQ(warnings_of({13, 198, 262, 11, 50256, 464, 1212, 318, 257, 1332}), Lines());
}

TEST(CheckTokens, RefusesUint32ReadAsUint16) {
    std::mt19937 random(1);
    std::vector<std::uint32_t> small, characters, large;
    for (int i = 0; i < 3000; ++i) {
        small.push_back(random() % 50257);
        characters.push_back(random() % 65);
        large.push_back(random() % 128256);
    }
    expect_refused(halves(small), {"every second token is 0", "uint32"});
    expect_refused(halves(small, false), {"every second token is 0", "uint32"});
    expect_refused(halves(characters), {"every second token is 0", "uint32"});
    expect_refused(halves(large), {"every second token is at most 1", "uint32"});
    // With few tokens, every second one may be small by chance.
    EXPECT_EQ(warnings_of({50256, 1, 40000, 7, 30000, 9}), Lines());
}

TEST(CheckTokens, RefusesTwoBytesOfTextReadAsOneToken) {
    std::mt19937 random(1);
    std::vector<std::uint16_t> text, small;
    for (int i = 0; i < 3000; ++i) {
        const auto pair = [&](unsigned first, unsigned end) {
            return static_cast<std::uint16_t>((first + random() % (end - first)) * 256 + first +
                                              random() % (end - first));
        };
        text.push_back(pair(' ', 127));
        small.push_back(pair(0, 65));
    }
    expect_refused(text, {"no token has a low byte above 127", "does not end in .bin"});
    expect_refused(small, {"no token has a low byte above 127", "uint8"});
}

TEST(CheckTokens, RefusesTokensThatAreAllTheSame) {
    expect_refused(std::vector<std::uint16_t>(100), {"all 100 tokens are 0"});
    expect_refused(std::vector<std::uint16_t>(100, 65535), {"all 100 tokens are 65535"});
}

TEST(CheckTokens, WarnsOfAStrayToken) {
    std::vector<std::uint16_t> values = tokens_below(65);
    values[77] = 65535;
    EXPECT_EQ(warnings_of(values), Lines{"token 65,535 is far above the others, which end at 64: remove them "
                                         "if they are a mistake; otherwise the model gets a vocabulary of 65,536"});
    values[78] = 65534;
    values[79] = 40000;
    ASSERT_EQ(warnings_of(values).size(), 1U);
    EXPECT_EQ(warnings_of(values)[0].find("tokens 40,000, 65,534 to 65,535 are far above"), 0U)
        << warnings_of(values)[0];
    values = tokens_below(20000);
    values[77] = 65535;
    EXPECT_EQ(warnings_of(values).size(), 1U);
}

TEST(CheckLabels, IsQuietAboutClassesThatTrainingAndHeldOutImagesHave) {
    EXPECT_EQ(check_labels(Labels{0, 1, 2, 1}, Labels{2, 0}, "set"), Lines());
    EXPECT_EQ(check_labels(Labels{0, 1, 2, 1}, Labels{1}, "set"), Lines());
}

TEST(CheckLabels, RefusesASingleClass) {
    test::expect_error(ErrorKind::bad_data, {"set", "all 5 training labels are 7", "at least 2 classes"}, [] {
        check_labels(Labels(5, 7), Labels{1, 2}, "set");
    });
}

TEST(CheckLabels, WarnsOfClassesThatNoImageHas) {
    Labels letters;
    for (std::uint8_t label = 1; label <= 26; ++label) letters.push_back(label);
    EXPECT_EQ(check_labels(letters, letters, "set"),
              Lines{"the labels are 1 to 26 (2 images of the largest): 1 of the model's 27 classes has no "
                    "image; number the classes from 0 without gaps"});
    EXPECT_EQ(check_labels(Labels{0, 1, 2, 255, 1}, Labels{0, 1, 2}, "set"),
              Lines{"the labels are 0 to 2, 255 (1 image of the largest): 252 of the model's 256 classes "
                    "have no image; number the classes from 0 without gaps"});
}

TEST(CheckLabels, WarnsOfAClassThatOnlyHeldOutImagesHave) {
    EXPECT_EQ(check_labels(Labels{0, 1, 0}, Labels{2, 0, 2}, "set"),
              Lines{"2 images of label 2 are held out, but no training image has it"});
}

TEST(CheckLabels, WarnsOfASingleClassThatIsHeldOut) {
    EXPECT_EQ(check_labels(Labels{0, 1, 0}, Labels(10, 1), "set"),
              Lines{"all 10 held-out images have label 1: their loss says nothing about the other classes"});
    EXPECT_EQ(check_labels(Labels{0, 1, 0}, Labels(9, 1), "set"), Lines());  // too few to tell
}

TEST(RefuseGrouped, RefusesImagesInOrderOfTheirClass) {
    const auto in_order = [](std::vector<std::uint8_t> classes, std::size_t each) {
        Labels labels;
        for (const std::uint8_t label : classes) labels.insert(labels.end(), each, label);
        return labels;
    };
    const Lines parts{"set", "sorted by class", "almost only label 1 of 3", "shuffle", "t10k-"};
    for (const std::size_t each : {10U, 1000U}) {
        test::expect_error(ErrorKind::bad_data, parts, [&] { refuse_grouped(in_order({2, 0, 1}, each), "set"); });
    }
    EXPECT_NO_THROW(refuse_grouped(in_order({2, 0, 1}, 9), "set"));        // too few
    EXPECT_NO_THROW(refuse_grouped(in_order({2, 0, 1, 2}, 1000), "set"));  // a class twice
    EXPECT_NO_THROW(refuse_grouped(Labels(100, 4), "set"));
}

}  // namespace
}  // namespace microbatch
