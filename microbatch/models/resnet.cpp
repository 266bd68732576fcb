#include "microbatch/models/resnet.h"

#include <ATen/ops/relu.h>
#include <torch/nn/init.h>
#include <torch/nn/modules/batchnorm.h>
#include <torch/nn/modules/conv.h>
#include <torch/nn/modules/normalization.h>

#include <memory>
#include <optional>
#include <string>

#include "microbatch/autograd/recompute.h"
#include "microbatch/core/error.h"
#include "microbatch/models/checks.h"
#include "microbatch/ops/group_norm.h"
#include "microbatch/ops/residual_block.h"

namespace microbatch {

using torch::nn::Sequential;

namespace {

constexpr std::int64_t norm_groups = 8;
constexpr int stages = 3;

}  // namespace

/// RMS norm over the channels of every pixel, with the affine weights of a batch norm.
class ChannelRmsNorm : public torch::nn::Module {
public:
    explicit ChannelRmsNorm(std::int64_t channels)
        : weight_(register_parameter("weight", at::ones({channels}))),
          bias_(register_parameter("bias", at::zeros({channels}))) {}

    at::Tensor forward(const at::Tensor& x) {
        constexpr double epsilon = 1e-5;
        const at::Tensor scale = (x.square().mean(1, /*keepdim=*/true) + epsilon).rsqrt();
        return x * scale * weight_.view({-1, 1, 1}) + bias_.view({-1, 1, 1});
    }

private:
    at::Tensor weight_, bias_;
};

/// A convolution that preserves the image size (divided by its stride), followed by a norm.
class NormedConvolution {
public:
    /// They join `layers` as conv`number` and norm`number`.
    NormedConvolution(Sequential& layers, const std::string& number, const torch::nn::Conv2dOptions& options,
                      ImageNorm norm)
        : convolution_(options) {
        torch::nn::init::kaiming_normal_(convolution_->weight, 0, torch::kFanOut, torch::kReLU);
        layers->push_back("conv" + number, convolution_);
        if (norm == ImageNorm::batch) {
            batch_norm_ = torch::nn::BatchNorm2d(options.out_channels());
            layers->push_back("norm" + number, batch_norm_);
        } else if (norm == ImageNorm::group) {
            group_norm_ = torch::nn::GroupNorm(norm_groups, options.out_channels());
            layers->push_back("norm" + number, group_norm_);
        } else {
            rms_norm_ = std::make_shared<ChannelRmsNorm>(options.out_channels());
            layers->push_back("norm" + number, rms_norm_);
        }
    }

    at::Tensor forward(const at::Tensor& x, const NormTail& tail) {
        const at::Tensor y = convolution_->forward(x);
        if (group_norm_) {
            return microbatch::group_norm(y, norm_groups, group_norm_->weight, group_norm_->bias,
                                          group_norm_->options.eps(), tail);
        }
        at::Tensor normed = rms_norm_ ? rms_norm_->forward(y) : batch_norm_->forward(y);
        if (tail.added.defined()) normed = normed + tail.added;
        return tail.relu ? at::relu(normed) : normed;
    }

    const at::Tensor& weight() const { return convolution_->weight; }
    const torch::nn::GroupNorm& group_norm() const { return group_norm_; }  ///< empty for batch norm

private:
    torch::nn::Conv2d convolution_;
    torch::nn::BatchNorm2d batch_norm_ = nullptr;
    torch::nn::GroupNorm group_norm_ = nullptr;
    std::shared_ptr<ChannelRmsNorm> rms_norm_;
};

namespace {

/// Without bias, because the norm after the convolution has one.
torch::nn::Conv2dOptions convolution_of(std::int64_t inputs, std::int64_t outputs, std::int64_t kernel,
                                        std::int64_t stride) {
    return torch::nn::Conv2dOptions(inputs, outputs, kernel).stride(stride).padding(kernel / 2).bias(false);
}

class ResidualBlock : public torch::nn::Module {
public:
    ResidualBlock(std::int64_t inputs, std::int64_t outputs, std::int64_t stride, ImageNorm norm)
        : residual_(register_module("residual", Sequential())),
          shortcut_(register_module("shortcut", Sequential())),
          stride_(stride),
          first_(residual_, "1", convolution_of(inputs, outputs, 3, stride), norm),
          second_(residual_, "2", convolution_of(outputs, outputs, 3, 1), norm) {
        if (inputs != outputs || stride != 1) {
            projection_.emplace(shortcut_, "1", convolution_of(inputs, outputs, 1, stride), norm);
        }
    }

    at::Tensor forward(const at::Tensor& x) {
        if (const auto& norm = first_.group_norm()) {
            return residual_block(x, weights(),
                                  {.stride = stride_, .groups = norm_groups, .epsilon = norm->options.eps()});
        }
        const at::Tensor shortcut = projection_ ? projection_->forward(x, {}) : x;
        return second_.forward(first_.forward(x, {.relu = true}), {.added = shortcut, .relu = true});
    }

private:
    ResidualWeights weights() const {
        const auto &norm1 = first_.group_norm(), &norm2 = second_.group_norm();
        ResidualWeights weights{first_.weight(),  norm1->weight, norm1->bias,
                                second_.weight(), norm2->weight, norm2->bias};
        if (projection_) {
            const auto& norm = projection_->group_norm();
            weights.projection = projection_->weight();
            weights.projection_scale = norm->weight;
            weights.projection_shift = norm->bias;
        }
        return weights;
    }

    Sequential residual_;
    Sequential shortcut_;
    std::int64_t stride_;
    NormedConvolution first_, second_;
    std::optional<NormedConvolution> projection_;
};

/// With the channels of a pixel next to each other, as the fastest convolutions and the norm need them.
at::Tensor channels_last(const at::Tensor& images) {
    if (images.size(1) > 1) return images.contiguous(at::MemoryFormat::ChannelsLast);
    // With one channel, both layouts are the same; the strides say which is meant.
    const std::int64_t width = images.size(3), pixels = images.size(2) * width;
    return images.contiguous().as_strided(images.sizes(), {pixels, 1, width, 1});
}

void require_valid(const ResNetConfig& config) {
    require_size("resnet", "channels", config.channels);
    require_size("resnet", "classes", config.classes);
    require_size("resnet", "width", config.width);
    require_size("resnet", "blocks", config.blocks);
    require_that(config.norm != ImageNorm::group || config.width % norm_groups == 0, "resnet: width ", config.width,
                 " is not a multiple of the ", norm_groups,
                 " groups of group norm; change the width or use batch norm");
}

}  // namespace

std::string_view to_string(ImageNorm norm) {
    if (norm == ImageNorm::batch) return "batch";
    return norm == ImageNorm::group ? "group" : "rms";
}

ImageNorm parse_image_norm(std::string_view name) {
    if (name == "batch") return ImageNorm::batch;
    if (name == "group") return ImageNorm::group;
    if (name == "rms") return ImageNorm::rms;
    throw Error(ErrorKind::usage, "unknown image norm \"", name, "\"; choose batch, group or rms");
}

ResNetImpl::ResNetImpl(const ResNetConfig& config) : config_(config) {
    require_valid(config);
    Sequential stem = register_module("stem", Sequential());
    stem_ = std::make_shared<NormedConvolution>(stem, "1", convolution_of(config.channels, config.width, 3, 1),
                                                config.norm);
    blocks_ = register_module("blocks", Sequential());
    std::int64_t inputs = config.width;
    for (int stage = 0; stage < stages; ++stage) {
        const std::int64_t outputs = config.width << stage;
        for (std::int64_t block = 0; block < config.blocks; ++block) {
            const std::int64_t stride = stage > 0 && block == 0 ? 2 : 1;
            blocks_->push_back(std::make_shared<ResidualBlock>(inputs, outputs, stride, config.norm));
            inputs = outputs;
        }
    }
    head_ = register_module("head", torch::nn::Linear(inputs, config.classes));
}

at::Tensor ResNetImpl::forward(const at::Tensor& images) {
    require_that(images.dim() == 4 && images.size(1) == config_.channels, "resnet: images have shape ", images.sizes(),
                 "; give [samples, ", config_.channels, ", height, width] or set channels");
    at::Tensor x = stem_->forward(channels_last(images), {.relu = true});
    for (const auto& any : *blocks_) {
        const auto block = std::dynamic_pointer_cast<ResidualBlock>(any.ptr());
        const auto run = [block](const at::Tensor& input) { return block->forward(input); };
        x = recompute_ ? recompute(run, x, block) : run(x);
    }
    return head_->forward(x.mean({2, 3}));
}

}  // namespace microbatch
