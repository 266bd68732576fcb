#pragma once

#include <torch/nn/module.h>
#include <torch/nn/modules/container/sequential.h>
#include <torch/nn/modules/linear.h>
#include <torch/nn/pimpl.h>

#include <cstdint>
#include <memory>
#include <string_view>

#include "microbatch/model/recomputable.h"

namespace microbatch {

/// The normalization after the convolutions. With batch norm, the result for a sample depends on its micro-batch, so
/// the update depends on how the batch is split (see BatchNorm); with group norm and RMS norm, it does not.
enum class ImageNorm { batch, group, rms };

/// "batch", "group" or "rms".
std::string_view to_string(ImageNorm norm);

/// Parses the name. Errors: ErrorKind::usage, listing the names, for any other text.
ImageNorm parse_image_norm(std::string_view name);

class NormedConvolution;

/// Sizes of a `ResNet`.
struct ResNetConfig {
    std::int64_t channels = 1;  ///< of the image
    std::int64_t classes = 10;
    std::int64_t width = 16;  ///< channels of the first stage; the second has 2 width, the third 4 width
    std::int64_t blocks = 2;  ///< residual blocks per stage, of two convolutions each
    ImageNorm norm = ImageNorm::batch;
};

/// A residual network for small images (28x28, 32x32; other sizes work): a convolution, three stages at full, half and
/// quarter resolution, average over the image, linear. 6 blocks + 2 layers deep.
///
/// Errors: ErrorKind::usage if a size is below 1, or width is not a multiple of the 8 groups of group norm.
/// State:  convolutions from torch's default generator (at::manual_seed), normal of variance 2 / fan-out. Batch norm
///         has running statistics as buffers: training mode changes them in every forward.
/// Source: He et al. 2016, section 4.2, with 1x1 convolutions where a shortcut changes shape (option B); He et al.
///         2015 for the initial weights.
class ResNetImpl : public torch::nn::Module, public Recomputable {
public:
    explicit ResNetImpl(const ResNetConfig& config = {});

    /// Logits of the classes.
    /// Shapes: images [b, channels, height, width] -> [b, classes].
    /// Errors: ErrorKind::usage for another shape.
    at::Tensor forward(const at::Tensor& images);

    /// Recomputes every residual block in backward: see `recompute`.
    void set_recompute(bool on) override { recompute_ = on; }
    bool recomputes() const override { return recompute_; }

private:
    ResNetConfig config_;
    bool recompute_ = false;
    std::shared_ptr<NormedConvolution> stem_;
    torch::nn::Sequential blocks_ = nullptr;
    torch::nn::Linear head_ = nullptr;
};
TORCH_MODULE(ResNet);

}  // namespace microbatch
