#include "microbatch/data/image_dataset.h"

#include <ATen/ops/empty.h>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <stdexcept>
#include <utility>

#include "microbatch/core/error.h"
#include "microbatch/core/str_cat.h"

namespace microbatch {
namespace {

/// True if there are `dimensions` lengths whose product is the number of bytes.
bool is_filled(const IdxArray& array, std::size_t dimensions) {
    if (array.shape.size() != dimensions) return false;
    std::uint64_t left = array.bytes.size();
    for (const std::int64_t length : array.shape) {
        if (length < 1 || left % static_cast<std::uint64_t>(length) != 0) return false;
        left /= static_cast<std::uint64_t>(length);
    }
    return left == 1;
}

void check_data(const LabelledImages& data) {
    if (!is_filled(data.images, 3) || !is_filled(data.labels, 1)) {
        throw Error(ErrorKind::bad_data, data.source,
                    ": expected bytes for images [n, height, width] and labels [n], but a shape does not match its "
                    "number of bytes");
    }
    if (data.images.shape[0] != data.labels.shape[0]) {
        throw Error(ErrorKind::bad_data, data.source, ": there are ", data.images.shape[0], " images but ",
                    data.labels.shape[0], " labels: give files that belong together");
    }
}

}  // namespace

PixelScale pixel_scale(std::span<const std::uint8_t> pixels) {
    if (pixels.empty()) throw Error(ErrorKind::usage, "no pixels to average: give at least one image");
    std::array<std::int64_t, 256> count{};
    for (const std::uint8_t pixel : pixels) ++count[pixel];
    const auto total = static_cast<double>(pixels.size());
    double sum = 0.0;
    for (std::size_t x = 0; x < count.size(); ++x) sum += static_cast<double>(count[x]) * static_cast<double>(x);
    const double mean = sum / total;  // in units of pixels, where equal pixels have exactly their value as mean
    double squares = 0.0;
    for (std::size_t x = 0; x < count.size(); ++x) {
        const double distance = static_cast<double>(x) - mean;
        squares += static_cast<double>(count[x]) * distance * distance;
    }
    const double deviation = std::sqrt(squares / total) / 255.0;
    return {mean / 255.0, deviation > 0.0 ? deviation : 1.0};
}

ImageDataset::ImageDataset(std::shared_ptr<const LabelledImages> data, const PixelScale& scale, std::int64_t begin,
                           std::int64_t end)
    : data_(std::move(data)), begin_(begin), end_(end) {
    check_data(*data_);
    if (begin < 0 || begin >= end || end > data_->images.shape[0]) {
        throw Error(ErrorKind::usage, "images [", begin, ", ", end, ") are not a nonempty part of the ",
                    data_->images.shape[0], " images");
    }
    if (!std::isfinite(scale.mean) || !std::isfinite(scale.deviation) || scale.deviation <= 0.0) {
        throw Error(ErrorKind::usage, "pixels cannot be scaled by mean ", scale.mean, " and deviation ",
                    scale.deviation, ": the mean must be finite and the deviation finite and above 0");
    }
    for (std::size_t x = 0; x < value_of_.size(); ++x) {
        value_of_[x] = static_cast<float>((static_cast<double>(x) / 255.0 - scale.mean) / scale.deviation);
    }
}

Batch ImageDataset::get(std::span<const std::int64_t> indices) const {
    const auto count = static_cast<std::int64_t>(indices.size());
    const std::int64_t height = data_->images.shape[1];
    const std::int64_t width = data_->images.shape[2];
    const at::Tensor images = at::empty({count, 1, height, width}, at::TensorOptions(at::kCPU).dtype(at::kFloat));
    const at::Tensor labels = at::empty({count}, at::TensorOptions(at::kCPU).dtype(at::kLong));
    auto* pixel = images.mutable_data_ptr<float>();
    auto* label = labels.mutable_data_ptr<std::int64_t>();
    for (const std::int64_t index : indices) {
        if (index < 0 || index >= size()) {
            throw std::out_of_range(str_cat("sample ", index, " of a dataset with ", size(), " samples"));
        }
        const std::int64_t row = begin_ + index;
        const std::uint8_t* first = data_->images.bytes.data() + row * height * width;
        pixel = std::transform(first, first + height * width, pixel, [&](std::uint8_t x) { return value_of_[x]; });
        *label++ = data_->labels.bytes[static_cast<std::size_t>(row)];
    }
    return {{images, labels}};
}

}  // namespace microbatch
