#include "microbatch/train/accumulator.h"

#include <ATen/core/grad_mode.h>
#include <ATen/ops/_foreach_div.h>

#include <cmath>
#include <unordered_set>

#include "microbatch/core/error.h"
#include "microbatch/core/text.h"
#include "microbatch/optim/clipping.h"

namespace microbatch {

std::string_view reason_to_refuse(const Gathered& gathered) {
    if (gathered.weight == 0.0) return "zero weight";
    if (!std::isfinite(gathered.loss_sum)) return "loss is not finite";
    if (!std::isfinite(gathered.gradient_norm)) return "gradient norm is not finite";
    return {};
}

Accumulator::Accumulator(const Parameters& parameters, Optimizer& optimizer, AccumulatorOptions options)
    : gatherer_(parameters), optimizer_(optimizer), options_(options) {
    set_plan(options.plan);
    if (!(options.clip_norm > 0.0)) {
        throw Error(ErrorKind::usage, text("clip_norm is ", options.clip_norm, "; it must be above 0"));
    }
    refuse_unknown_parameters();
}

void Accumulator::set_plan(const Plan& plan) {
    if (plan.micro_batch < 1) {
        throw Error(ErrorKind::usage, text("the micro-batch is ", plan.micro_batch, "; it must be at least 1"));
    }
    options_.plan = plan;
}

void Accumulator::refuse_unknown_parameters() const {
    std::unordered_set<const void*> known;
    for (const Parameter& parameter : gatherer_.parameters()) known.insert(parameter.tensor.unsafeGetTensorImpl());
    for (const at::Tensor& tensor : optimizer_.parameters()) {
        if (known.count(tensor.unsafeGetTensorImpl()) == 0) {
            throw Error(ErrorKind::usage, text("the optimizer updates a parameter of shape ", tensor.sizes(),
                                               " that the accumulator does not know; give it to track()"));
        }
    }
}

StepReport Accumulator::step(const Batch& batch, const LossFunction& loss) {
    const Gathered gathered = gather(batch, loss);
    const std::string_view reason = reason_to_refuse(gathered);
    return reason.empty() ? apply() : discard(reason);
}

Gathered Accumulator::gather(const Batch& batch, const LossFunction& loss) {
    refuse_unknown_parameters();
    gathered_ = gatherer_.gather(batch, options_.plan, loss);
    ready_ = true;
    return gathered_;
}

void Accumulator::begin() {
    refuse_unknown_parameters();
    gatherer_.begin();
}

void Accumulator::add(const WeightedLoss& loss) {
    gatherer_.add(loss);
}

Gathered Accumulator::finish() {
    gathered_ = gatherer_.finish();
    ready_ = true;
    return gathered_;
}

StepReport Accumulator::apply() {
    if (!ready_) throw Error(ErrorKind::usage, "nothing is gathered to apply: call gather() or finish() first");
    if (gathered_.weight == 0.0) return discard("zero weight");
    StepReport result = report();
    try {
        at::NoGradGuard no_grad;
        const double divisor = gathered_.weight / clip_coefficient(gathered_.gradient_norm, options_.clip_norm);
        if (divisor != 1.0) at::_foreach_div_(gatherer_.gradients(), divisor);
        optimizer_.step();
    } catch (...) {
        discard({});
        throw;
    }
    result.applied = true;
    discard({});
    return result;
}

StepReport Accumulator::discard(std::string_view reason) {
    StepReport result = report();
    result.reason = reason;
    gatherer_.clear();
    gathered_ = {};
    ready_ = false;
    return result;
}

StepReport Accumulator::report() const {
    return {.loss = gathered_.loss(),
            .weight = gathered_.weight,
            .gradient_norm = gathered_.gradient_norm,
            .learning_rate = optimizer_.learning_rate(),
            .micro_batches = gathered_.micro_batches};
}

}  // namespace microbatch
