#pragma once

#include <ATen/core/Generator.h>
#include <ATen/core/Tensor.h>

#include <vector>

namespace torch::nn {
class Module;
}

namespace microbatch {

/// Copies what a forward pass may change beside gradients: buffers, training flags, torch's generators (the CPU's and
/// those of the devices the parameters are on). Puts it all back when it goes out of scope.
class ModelStateScope {
public:
    explicit ModelStateScope(torch::nn::Module& model);
    ModelStateScope(const ModelStateScope&) = delete;
    ModelStateScope& operator=(const ModelStateScope&) = delete;
    ~ModelStateScope();

    /// Puts everything back now.
    void restore();

    /// Puts buffers and training flags back, and lets the generators go on.
    void restore_model();

    /// True if a buffer holds other values than at construction.
    bool buffers_changed() const;

private:
    struct Flag {
        torch::nn::Module* module;
        bool training;
    };
    struct Buffer {
        at::Tensor live, copy;
    };
    struct Draws {
        at::Generator generator;
        at::Tensor state;
    };

    std::vector<Flag> flags_;
    std::vector<Buffer> buffers_;
    std::vector<Draws> draws_;
};

}  // namespace microbatch
