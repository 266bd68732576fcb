#pragma once

namespace microbatch {

/// A torch::nn::Module that can run its blocks with `recompute`; make_model() detects it by dynamic_cast.
class Recomputable {
public:
    virtual ~Recomputable() = default;

    /// Applies to every later forward; off by default.
    virtual void set_recompute(bool on) = 0;
    virtual bool recomputes() const = 0;
};

}  // namespace microbatch
