#pragma once

#include <memory>
#include <optional>
#include <vector>

#include "microbatch/autograd/in_place_gradients.h"
#include "microbatch/core/batch_plan.h"
#include "microbatch/model/model.h"

namespace microbatch {

/// A condition that must hold during a forward and backward pass.
class MicroBatchScope {
public:
    virtual ~MicroBatchScope() = default;

    /// Called before the forward pass of a micro-batch with this plan. May be called again without leave().
    virtual void enter(const Plan& plan) = 0;

    /// Called after the last backward pass, or an exception.
    virtual void leave() {}
};

using MicroBatchScopes = std::vector<std::shared_ptr<MicroBatchScope>>;

/// Weight gradients are accumulated inside the GEMM: see InPlaceGradients.
class InProductSums final : public MicroBatchScope {
public:
    void enter(const Plan&) override {
        if (!sums_) sums_.emplace();
    }
    void leave() override { sums_.reset(); }

private:
    std::optional<InPlaceGradients> sums_;
};

/// The model recomputes its activations if the plan says so. With exact BatchNorm, the batch does that itself.
class ActivationCheckpointing final : public MicroBatchScope {
public:
    explicit ActivationCheckpointing(std::shared_ptr<Model> model) : model_(std::move(model)) {}

    void enter(const Plan& plan) override { set(*model_, plan); }

    static void set(Model& model, const Plan& plan) {
        model.set_checkpointing(plan.recompute && plan.batch_norm != BatchNorm::exact);
    }

private:
    std::shared_ptr<Model> model_;
};

}  // namespace microbatch
