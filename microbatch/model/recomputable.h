#pragma once

namespace microbatch {

/// A torch::nn::Module that can run its blocks by `recompute`; make_model() finds it by dynamic_cast.
class Recomputable {
public:
    virtual ~Recomputable() = default;

    /// Every forward from now on; off at first.
    virtual void set_recompute(bool on) = 0;
    virtual bool recomputes() const = 0;
};

}  // namespace microbatch
