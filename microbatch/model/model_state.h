#pragma once

#include <ATen/core/Generator.h>
#include <ATen/core/Tensor.h>

#include <vector>

namespace torch::nn {
class Module;
}

namespace microbatch {

/// What a ModelState holds, as tensors.
struct HeldState {
    std::vector<at::Tensor> buffers;     ///< in the model's order
    std::vector<at::Tensor> generators;  ///< the CPU's, then those of the parameters' devices
};

/// A copy of what a forward pass may change beside gradients: the model's buffers and training flags, and torch's
/// generators (the CPU's and those of the devices the parameters are on).
///
/// Threads: none may use the model meanwhile.
/// Cost:    one copy of the buffers, 5 KB a generator.
class ModelState {
public:
    /// Copies what is there now. Without a model only the generators.
    ModelState(torch::nn::Module* model, const std::vector<at::Tensor>& parameters);
    explicit ModelState(torch::nn::Module& model);

    /// Puts everything back, bit for bit.
    void restore();

    /// Puts buffers and training flags back, and lets the generators go on.
    void restore_model();

    /// Puts the generators back, and leaves all else.
    void restore_generators();

    /// True if a buffer holds other values than in the copy.
    bool buffers_changed() const;

    /// The copies themselves, to be written down.
    HeldState held() const;

    /// From now on holds what another one of such a model held.
    /// Errors: ErrorKind::usage if there are not as many buffers or generators, or they are of other dtypes or a
    ///         generator's state is of another size; nothing has changed then.
    void hold(const HeldState& state);

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

/// Puts the state back when it goes out of scope.
class ModelStateScope : public ModelState {
public:
    using ModelState::ModelState;
    ModelStateScope(const ModelStateScope&) = delete;
    ModelStateScope& operator=(const ModelStateScope&) = delete;
    ~ModelStateScope() { restore(); }
};

}  // namespace microbatch
