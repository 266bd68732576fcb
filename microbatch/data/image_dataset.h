#pragma once

#include <array>
#include <cstdint>
#include <memory>
#include <span>
#include <string>

#include "microbatch/data/dataset.h"
#include "microbatch/data/idx.h"

namespace microbatch {

/// Grey images [n, height, width] and their labels [n], as read.
struct LabelledImages {
    IdxArray images;
    IdxArray labels;
    std::string source;  ///< where they come from, for messages
};

/// What pixels are shifted and scaled by: (x / 255 - mean) / deviation.
struct PixelScale {
    double mean = 0.0;
    double deviation = 1.0;
};

/// Mean and standard deviation of pixels / 255; the deviation of pixels that are all the same is given as 1.
/// Errors: ErrorKind::usage if there are no pixels.
PixelScale pixel_scale(std::span<const std::uint8_t> pixels);

/// Images with their labels; the bytes are kept and turned into numbers when they are asked for.
///
/// Shapes: get() gives two fields, images [b, 1, height, width] float32 and labels [b] int64.
/// Errors: the constructor throws ErrorKind::bad_data if the numbers of images and labels differ or an array's bytes do
///         not fill its shape, ErrorKind::usage unless 0 <= begin < end <= n and the scale is finite with a positive
///         deviation; get() throws std::out_of_range.
class ImageDataset final : public Dataset {
public:
    /// Samples are the images [begin, end), so that several datasets can share the storage.
    ImageDataset(std::shared_ptr<const LabelledImages> data, const PixelScale& scale, std::int64_t begin,
                 std::int64_t end);

    std::int64_t size() const override { return end_ - begin_; }
    Batch get(std::span<const std::int64_t> indices) const override;

private:
    std::shared_ptr<const LabelledImages> data_;
    std::int64_t begin_;
    std::int64_t end_;
    std::array<float, 256> value_of_;
};

}  // namespace microbatch
