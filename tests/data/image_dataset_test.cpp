#include "microbatch/data/image_dataset.h"

#include <gtest/gtest.h>

#include <filesystem>
#include <limits>
#include <random>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "data/elements.h"
#include "support/errors.h"

namespace microbatch {
namespace {

using test::elements;
using test::expect_error;
using test::expect_usage_error;
using Bytes = std::vector<std::uint8_t>;
using Indices = std::vector<std::int64_t>;

std::shared_ptr<const LabelledImages> data_of(std::int64_t height, std::int64_t width, Bytes pixels, Bytes labels) {
    const auto images = static_cast<std::int64_t>(pixels.size()) / (height * width);
    const auto count = static_cast<std::int64_t>(labels.size());
    return std::make_shared<const LabelledImages>(
        LabelledImages{{{images, height, width}, std::move(pixels)}, {{count}, std::move(labels)}, "here"});
}

TEST(ImageDataset, GivesImagesWithOneChannelAndTheirLabels) {
    const ImageDataset dataset(data_of(1, 2, {0, 255, 51, 102, 153, 204}, {7, 255, 9}), {}, 0, 3);
    EXPECT_EQ(dataset.size(), 3);
    EXPECT_EQ(dataset.tokens_per_sample(), 1);
    const Batch batch = dataset.get(Indices{2, 0, 1, 2});
    ASSERT_EQ(batch.fields.size(), 2U);
    EXPECT_EQ(batch.fields[0].sizes(), (Indices{4, 1, 1, 2}));
    EXPECT_EQ(batch.fields[1].sizes(), Indices{4});
    EXPECT_EQ(elements<float>(batch.fields[0]), (std::vector<float>{0.6F, 0.8F, 0.0F, 1.0F, 0.2F, 0.4F, 0.6F, 0.8F}));
    EXPECT_EQ(elements<std::int64_t>(batch.fields[1]), (Indices{9, 7, 255, 9}));
}

TEST(ImageDataset, ScalesPixelsByTheGivenMeanAndDeviation) {
    // (0 - 0.5) / 0.25, (1 - 0.5) / 0.25 and (51 / 255 - 0.5) / 0.25
    const ImageDataset dataset(data_of(1, 3, {0, 255, 51}, {0}), {0.5, 0.25}, 0, 1);
    EXPECT_EQ(elements<float>(dataset.get(Indices{0}).fields[0]), (std::vector<float>{-2.0F, 2.0F, -1.2F}));
}

TEST(ImageDataset, IsARangeOfTheSharedImages) {
    const auto data = data_of(1, 1, {0, 51, 102, 153}, {0, 1, 2, 3});
    const ImageDataset first(data, {}, 0, 1);
    const ImageDataset rest(data, {}, 1, 4);
    EXPECT_EQ(data.use_count(), 3);
    EXPECT_EQ(first.size(), 1);
    EXPECT_EQ(rest.size(), 3);
    const Batch batch = rest.get(Indices{0, 2});
    EXPECT_EQ(elements<float>(batch.fields[0]), (std::vector<float>{0.2F, 0.6F}));
    EXPECT_EQ(elements<std::int64_t>(batch.fields[1]), (Indices{1, 3}));
    EXPECT_THROW(first.get(Indices{1}), std::out_of_range);
    EXPECT_THROW(rest.get(Indices{3}), std::out_of_range);
    EXPECT_THROW(rest.get(Indices{-1}), std::out_of_range);
}

TEST(ImageDataset, NoIndicesGiveAnEmptyBatch) {
    const Batch batch = ImageDataset(data_of(2, 3, Bytes(6), {0}), {}, 0, 1).get({});
    EXPECT_EQ(batch.fields[0].sizes(), (Indices{0, 1, 2, 3}));
    EXPECT_EQ(batch.fields[1].sizes(), Indices{0});
}

TEST(ImageDataset, RefusesCountsThatDiffer) {
    expect_error(ErrorKind::bad_data, {"here", "3 images", "2 labels"}, [] {
        ImageDataset(data_of(1, 1, {1, 2, 3}, {0, 0}), {}, 0, 2);
    });
    expect_error(ErrorKind::bad_data, {"here", "2 images", "3 labels"}, [] {
        ImageDataset(data_of(1, 1, {1, 2}, {0, 0, 0}), {}, 0, 2);
    });
}

TEST(ImageDataset, RefusesBytesThatDoNotMatchTheShape) {
    const IdxArray labels{{2}, {0, 0}};
    const std::vector<IdxArray> wrong{{{2, 2, 2}, Bytes(7)}, {{2, 2, 2}, Bytes(16)},  {{2, 4}, Bytes(8)},
                                      {{2, 0, 4}, Bytes(8)}, {{2, -2, -2}, Bytes(8)}, {{}, {}}};
    for (const IdxArray& images : wrong) {
        const auto data = std::make_shared<const LabelledImages>(LabelledImages{images, labels, "here"});
        expect_error(ErrorKind::bad_data, {"here", "shape"}, [&] { ImageDataset(data, {}, 0, 2); });
    }
    const auto data = std::make_shared<const LabelledImages>(LabelledImages{{{2, 1, 1}, Bytes(2)}, {{2}, {0}}, "here"});
    expect_error(ErrorKind::bad_data, {"here", "shape"}, [&] { ImageDataset(data, {}, 0, 2); });
}

TEST(ImageDataset, RefusesARangeThatIsEmptyOrOutOfBounds) {
    const auto data = data_of(1, 1, {1, 2}, {0, 0});
    for (const auto& [begin, end] : {std::pair{0, 3}, std::pair{-1, 1}, std::pair{1, 1}, std::pair{2, 1}}) {
        expect_usage_error({"the 2 images"}, [&, b = begin, e = end] { ImageDataset(data, {}, b, e); });
    }
}

TEST(ImageDataset, RefusesAScaleThatWouldGiveNoNumbers) {
    const auto data = data_of(1, 1, {1}, {0});
    const double nan = std::numeric_limits<double>::quiet_NaN();
    const double infinity = std::numeric_limits<double>::infinity();
    const std::vector<PixelScale> wrong{{0, 0}, {0, -1}, {0, nan}, {0, infinity}, {nan, 1}, {infinity, 1}};
    for (const PixelScale& scale : wrong) {
        expect_usage_error({"deviation finite and above 0"}, [&] { ImageDataset(data, scale, 0, 1); });
    }
}

TEST(PixelScale, IsMeanAndDeviationOfPixelsOver255) {
    // Two values at equal distance from the mean: the deviation is this distance.
    const PixelScale scale = pixel_scale(Bytes{0, 255, 255, 0});
    EXPECT_EQ(scale.mean, 0.5);
    EXPECT_EQ(scale.deviation, 0.5);
}

TEST(PixelScale, MakesRandomPixelsHaveMeanZeroAndDeviationOne) {
    std::mt19937 random(5);
    Bytes pixels(64 * 50);
    for (auto& pixel : pixels) pixel = static_cast<std::uint8_t>(random() % 97);
    const ImageDataset dataset(data_of(8, 8, pixels, Bytes(50)), pixel_scale(pixels), 0, 50);
    double sum = 0.0;
    double squares = 0.0;
    for (std::int64_t i = 0; i < 50; ++i) {
        for (const float x : elements<float>(dataset.get(Indices{i}).fields[0])) {
            sum += x;
            squares += double{x} * x;
        }
    }
    // Each value is rounded to float once: 6e-8 relative, about 1 in size.
    EXPECT_NEAR(sum / static_cast<double>(pixels.size()), 0.0, 1e-7);
    EXPECT_NEAR(squares / static_cast<double>(pixels.size()), 1.0, 2e-7);
}

TEST(PixelScale, OfEqualPixelsHasDeviationOneAndScalesThemToZero) {
    for (const int value : {0, 1, 77, 254, 255}) {
        const Bytes pixels(49, static_cast<std::uint8_t>(value));
        const PixelScale scale = pixel_scale(pixels);
        EXPECT_EQ(scale.deviation, 1.0);
        const Batch batch = ImageDataset(data_of(7, 7, pixels, {0}), scale, 0, 1).get(Indices{0});
        EXPECT_EQ(elements<float>(batch.fields[0]), std::vector<float>(49, 0.0F));
    }
}

TEST(PixelScale, RefusesNoPixels) {
    expect_usage_error({"no pixels"}, [] { pixel_scale({}); });
}

TEST(PixelScale, OfFashionMnistIsThePublishedOne) {
    const std::filesystem::path path = "/usr/share/datasets/fashion-mnist/train-images-idx3-ubyte.gz";
    ASSERT_TRUE(std::filesystem::exists(path)) << path << " is missing: install Debian's dataset-fashion-mnist";
    const PixelScale scale = pixel_scale(read_idx(path, 3, 1 << 30).bytes);
    // 0.2860 and 0.3530 are the values that everybody uses for this data set; they have four digits.
    EXPECT_NEAR(scale.mean, 0.2860, 5e-5);
    EXPECT_NEAR(scale.deviation, 0.3530, 5e-5);
}

}  // namespace
}  // namespace microbatch
