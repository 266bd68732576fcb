#include "microbatch/step/exact_batch.h"

#include <ATen/core/grad_mode.h>
#include <ATen/ops/full_like.h>

#include <algorithm>
#include <optional>
#include <string>
#include <utility>

#include "microbatch/autograd/batch_norm_layers.h"
#include "microbatch/autograd/moments.h"
#include "microbatch/core/error.h"
#include "microbatch/model/forward_state.h"
#include "microbatch/runtime/coroutine.h"
#include "microbatch/runtime/generators.h"

namespace microbatch {
namespace {

std::string without_last_part(const std::string& name) {
    return name.substr(0, name.rfind('.'));
}

BatchStatistics statistics_of(const BatchNormCall& call, const Moments& moments) {
    const at::Tensor& like = call.running_mean.defined() ? call.running_mean : call.weight;
    const auto type = like.defined()              ? like.scalar_type()
                      : call.x.element_size() < 4 ? at::kFloat
                                                  : call.x.scalar_type();
    return {.mean = moments.mean.to(type),
            .variance = moments.variance().to(type),
            .count = moments.count,
            .epsilon = call.epsilon};
}

}  // namespace

struct ExactBatch::MicroBatch {
    explicit MicroBatch(const std::vector<at::Device>& devices) : tape(devices) {}

    Tape tape;
    WeightedLoss loss = {};
    std::optional<BatchNormCall> call = {};  // at which it waits
    Moments moments = {};                    // of what waits
    std::optional<Coroutine> run = {};       // last: it ends first
};

ExactBatch::ExactBatch(std::shared_ptr<Model> model, const KeepPlans& plans, const Plan& plan, PieceObserver on_piece)
    : model_(std::move(model)),
      keep_(plan.recompute ? plans.least : plans.all),
      buffers_(model_->buffers()),
      devices_(generator_devices(tensors_of(model_->parameters()))),
      on_piece_(std::move(on_piece)) {}

ExactBatch::~ExactBatch() = default;

void ExactBatch::add(const LossFunction& loss, Batch micro, bool is_last) {
    MicroBatch& one = micro_batches_.emplace_back(devices_);
    TapeHooks hooks{.execute = Coroutine::on_caller,
                    .statistics = [this, &one](const BatchNormCall& call) -> const BatchStatistics& {
                        one.call = call;
                        Coroutine::pause();
                        return statistics_.back();
                    },
                    .is_count = [this](const at::Tensor& tensor) { return is_count(tensor); },
                    .moves_counts = micro_batches_.size() == 1};
    one.run.emplace([this, &one, &loss, hooks = std::move(hooks), micro = std::move(micro)]() mutable {
        one.tape.record(
            [&] {
                one.loss = loss_of(loss, micro);
                micro = {};
                return one.loss.sum;
            },
            std::move(hooks), keep_);
    });
    complete_ = is_last;
    advance(one);
}

void ExactBatch::done_with(const MicroBatch& one) const {
    if (on_piece_) on_piece_(&one == &micro_batches_.front(), complete_ && &one == &micro_batches_.back());
}

bool ExactBatch::is_count(const at::Tensor& tensor) const {
    return std::any_of(buffers_.begin(), buffers_.end(), [&](const NamedTensor& buffer) {
        return buffer.tensor.is_same(tensor) && counts_batches(buffer);
    });
}

void ExactBatch::advance(MicroBatch& one) {
    const at::NoGradGuard no_grad;
    one.call.reset();
    one.run->advance();
    if (one.call) one.moments = moments_of(one.call->x);
    done_with(one);
}

std::string ExactBatch::name_of(const BatchNormCall& call) const {
    for (const NamedTensor& buffer : buffers_) {
        if (buffer.tensor.is_same(call.running_mean)) return without_last_part(buffer.name);
    }
    for (const Parameter& parameter : model_->parameters()) {
        if (parameter.tensor.is_same(call.weight)) return without_last_part(parameter.name);
    }
    return "a BatchNorm without parameters";
}

std::vector<WeightedLoss> ExactBatch::finish_forward() {
    while (!micro_batches_.front().run->ended() || any_waits()) {
        meet();
        for (MicroBatch& one : micro_batches_) advance(one);
    }
    std::vector<WeightedLoss> losses;
    for (MicroBatch& one : micro_batches_) {
        one.run.reset();
        losses.push_back(one.loss);
    }
    return losses;
}

bool ExactBatch::any_waits() const {
    return std::any_of(micro_batches_.begin(), micro_batches_.end(), [](const MicroBatch& one) { return one.call; });
}

// All micro-batches have arrived at a BatchNorm, which must be the same one.
void ExactBatch::meet() {
    Moments moments;
    const std::optional<BatchNormCall>& first = micro_batches_.front().call;
    for (std::size_t i = 0; i < micro_batches_.size(); ++i) {
        const MicroBatch& one = micro_batches_[i];
        const auto name = [this](const auto& call) { return call ? name_of(*call) : "the end"; };
        const bool alike = first && one.call ? one.call->same_layer(*first) : !first && !one.call;
        require_that(alike,
                     "BatchNorm cannot be exact in this model: "
                     "micro-batch 0 comes to ",
                     name(first), ", micro-batch ", i, " to ", name(one.call),
                     ", because which layers run depends on the data; choose the policy deferred");
        moments = pooled(moments, one.moments);
    }
    if (complete_ && moments.count < 2.0) {
        throw TooFewSamples(ErrorKind::usage, name_of(*first),
                            " has a single value per channel in the whole batch, "
                            "which it cannot normalise: use a larger batch, or GroupNorm");
    }
    statistics_.push_back(statistics_of(*first, moments));
    move_running_statistics(first->running_mean, first->running_var, moments, first->momentum);
}

void ExactBatch::backward(double scale) {
    const BackwardFunction run = [this](const auto& roots, const auto& gradients, bool again) {
        model_->backward(roots, gradients, again);
    };
    for (MicroBatch& one : micro_batches_) {
        if (!one.loss.weight.is_known_zero()) one.tape.add_gradient(at::full_like(one.loss.sum, scale));
    }
    BatchNormSums whole;
    for (std::int32_t segment = micro_batches_.front().tape.segments() - 1; segment >= 0; --segment) {
        BatchNormSums next;
        for (MicroBatch& one : micro_batches_) {
            if (segment + 1 < one.tape.segments()) one.tape.finish_barrier(segment + 1, whole);
            next.add(one.tape.differentiate(segment, run));
            done_with(one);
        }
        whole = next;
    }
}

std::uint64_t ExactBatch::fingerprint() const {
    return micro_batches_.front().tape.fingerprint();
}

Program ExactBatch::program() const {
    return micro_batches_.front().tape.program();
}

KeepPlans learn_keep_plans(const std::shared_ptr<Model>& model, const LossFunction& loss, const Batch& micro) {
    const ForwardStateScope before(*model);
    const KeepPlans nothing;
    ExactBatch batch(model, nothing, {});
    batch.add(loss, micro, /*is_last=*/false);
    batch.finish_forward();
    return keep_plans_of(batch.program());
}

}  // namespace microbatch
