#pragma once

#include <array>
#include <cstdint>
#include <memory>
#include <span>
#include <string>

#include "microbatch/data/dataset.h"
#include "microbatch/data/idx.h"

namespace microbatch {

/// Greyscale images [n, height, width] and their labels [n], as read.
struct LabelledImages {
    IdxArray images;
    IdxArray labels;
    std::string source;  ///< where they come from, for messages
};

/// Normalisation of pixels: (x / 255 - mean) / deviation.
struct PixelScale {
    double mean = 0.0;
    double deviation = 1.0;
};

/// Mean and standard deviation of pixels / 255; the deviation is 1 if all pixels are the same.
/// Errors: ErrorKind::usage if there are no pixels.
PixelScale pixel_scale(std::span<const std::uint8_t> pixels);

/// Images with their labels; the bytes are stored and converted to floating point on demand.
///
/// Shapes: get() returns two fields, images [b, 1, height, width] float32 and labels [b] int64.
/// Errors: the constructor throws ErrorKind::bad_data if the numbers of images and labels differ or the bytes of an
///         array do not match its shape, ErrorKind::usage unless 0 <= begin < end <= n and the scale is finite with a
///         positive deviation; get() throws std::out_of_range.
class ImageDataset final : public Dataset {
public:
    /// The samples are the images [begin, end), so several datasets can share the storage.
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
