#include "microbatch/models/resnet.h"

#include <torch/nn/init.h>
#include <torch/nn/modules/activation.h>
#include <torch/nn/modules/batchnorm.h>
#include <torch/nn/modules/conv.h>
#include <torch/nn/modules/normalization.h>

#include <memory>
#include <string>

#include "microbatch/core/error.h"
#include "microbatch/core/text.h"
#include "microbatch/models/require.h"

namespace microbatch {

namespace {

using torch::nn::Sequential;

constexpr std::int64_t norm_groups = 8;
constexpr int stages = 3;

/// Adds a convolution that keeps the image's size (divided by `stride`) and its norm, called convN and normN.
void add_convolution(Sequential& layers, const std::string& number, std::int64_t inputs, std::int64_t outputs,
                     std::int64_t kernel, std::int64_t stride, ImageNorm norm) {
    // Without bias: the norm behind it has one.
    torch::nn::Conv2d convolution(
        torch::nn::Conv2dOptions(inputs, outputs, kernel).stride(stride).padding(kernel / 2).bias(false));
    torch::nn::init::kaiming_normal_(convolution->weight, 0, torch::kFanOut, torch::kReLU);
    layers->push_back("conv" + number, convolution);
    if (norm == ImageNorm::batch) {
        layers->push_back("norm" + number, torch::nn::BatchNorm2d(outputs));
    } else {
        layers->push_back("norm" + number, torch::nn::GroupNorm(norm_groups, outputs));
    }
}

class ResidualBlock : public torch::nn::Module {
public:
    ResidualBlock(std::int64_t inputs, std::int64_t outputs, std::int64_t stride, ImageNorm norm)
        : residual_(register_module("residual", Sequential())), shortcut_(register_module("shortcut", Sequential())) {
        add_convolution(residual_, "1", inputs, outputs, 3, stride, norm);
        residual_->push_back("relu", torch::nn::ReLU());
        add_convolution(residual_, "2", outputs, outputs, 3, 1, norm);
        if (inputs != outputs || stride != 1) add_convolution(shortcut_, "1", inputs, outputs, 1, stride, norm);
    }

    at::Tensor forward(const at::Tensor& x) {
        return at::relu(residual_->forward(x) + (shortcut_->is_empty() ? x : shortcut_->forward(x)));
    }

private:
    Sequential residual_;
    Sequential shortcut_;
};

void require_valid(const ResNetConfig& config) {
    require_size("resnet", "channels", config.channels);
    require_size("resnet", "classes", config.classes);
    require_size("resnet", "width", config.width);
    require_size("resnet", "blocks", config.blocks);
    if (config.norm == ImageNorm::group && config.width % norm_groups != 0) {
        throw Error(ErrorKind::usage, text("resnet: width ", config.width, " is not a multiple of the ", norm_groups,
                                           " groups of group norm; give such a width or norm batch"));
    }
}

}  // namespace

std::string_view to_string(ImageNorm norm) {
    return norm == ImageNorm::batch ? "batch" : "group";
}

ImageNorm parse_image_norm(std::string_view name) {
    if (name == "batch") return ImageNorm::batch;
    if (name == "group") return ImageNorm::group;
    throw Error(ErrorKind::usage, text("no image norm is called \"", name, "\"; there are batch and group"));
}

ResNetImpl::ResNetImpl(const ResNetConfig& config) : config_(config) {
    require_valid(config);
    stem_ = register_module("stem", Sequential());
    add_convolution(stem_, "1", config.channels, config.width, 3, 1, config.norm);
    stem_->push_back("relu", torch::nn::ReLU());
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
    if (images.dim() != 4 || images.size(1) != config_.channels) {
        throw Error(ErrorKind::usage, text("resnet: images of shape ", images.sizes(), "; give [samples, ",
                                           config_.channels, ", height, width] or set channels"));
    }
    at::Tensor x = stem_->forward(images);
    for (const auto& any : *blocks_) {
        const auto block = std::dynamic_pointer_cast<ResidualBlock>(any.ptr());
        const auto run = [block](const at::Tensor& input) { return block->forward(input); };
        x = recompute_ ? recompute(run, x, block) : run(x);
    }
    return head_->forward(x.mean({2, 3}));
}

}  // namespace microbatch
