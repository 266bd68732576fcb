#include "microbatch/step/gatherer.h"

#include <ATen/core/grad_mode.h>
#include <ATen/ops/count_nonzero.h>
#include <ATen/ops/full.h>

#include <algorithm>
#include <cmath>
#include <limits>

#include "microbatch/core/error.h"
#include "microbatch/core/str_cat.h"
#include "microbatch/optim/clipping.h"

namespace microbatch {

Gatherer::Gatherer(const Parameters& parameters, bool sum_in_product) : sum_in_product_(sum_in_product) {
    track(parameters);
}

void Gatherer::track(const Parameters& parameters) {
    if (state_ != State::idle) throw Error(ErrorKind::usage, "parameters cannot be added while a batch is gathered");
    for (const Parameter& parameter : parameters) {
        const bool low =
            parameter.tensor.defined() && parameter.tensor.is_floating_point() && parameter.tensor.element_size() < 4;
        if (low) {
            throw Error(ErrorKind::usage, str_cat("parameter ", parameter.name, " is ", parameter.tensor.scalar_type(),
                                                  ": sums of gradients stall in it; keep parameters in float32"));
        }
    }
    Parameters all = parameters_;
    all.insert(all.end(), parameters.begin(), parameters.end());
    parameters_ = without_repeats(all);
}

void Gatherer::refuse_stale_gradients() {
    for (const Parameter& parameter : parameters_) {
        at::Tensor& gradient = parameter.tensor.mutable_grad();
        if (!gradient.defined()) continue;
        if (at::count_nonzero(gradient).item<std::int64_t>() != 0) {
            throw Error(ErrorKind::usage, str_cat("parameter ", parameter.name,
                                                  " holds a gradient that is not of this batch; clear it (zero_grad) "
                                                  "before the batch begins"));
        }
    }
}

void Gatherer::require_idle() const {
    if (state_ == State::open) {
        throw Error(ErrorKind::usage, "the batch before was not finished: call finish() after its last micro-batch");
    }
    if (state_ == State::gathered) {
        throw Error(ErrorKind::usage,
                    "the batch before was gathered but neither applied nor discarded: call apply() or discard() first");
    }
}

void Gatherer::begin(bool measure_parts) {
    require_idle();
    refuse_stale_gradients();
    clear();
    gathered_ = {};
    samples_ = 0;
    if (sum_in_product_) in_place_.emplace();
    if (measure_parts) parts_.emplace();
    state_ = State::open;
}

void Gatherer::add(const WeightedLoss& loss) {
    if (state_ != State::open)
        throw Error(ErrorKind::usage, "no batch is open: call begin() before the first micro-batch");
    try {
        add_checked(loss);
    } catch (...) {
        clear();
        throw;
    }
}

void Gatherer::add_checked(const WeightedLoss& loss) {
    validate(loss);
    ++gathered_.micro_batches;
    if (loss.weight == 0.0) return;
    if (!loss.sum.requires_grad()) {
        throw Error(ErrorKind::usage,
                    "the loss depends on no parameter that requires a gradient: is every parameter frozen, or does the "
                    "loss function detach?");
    }
    gathered_.weight += loss.weight;
    if (!std::isfinite(gathered_.weight)) {
        throw Error(ErrorKind::usage, "the weights of the batch add up to more than a double holds; scale them down");
    }
    loss.sum.backward();
    if (parts_) gathered_.parts.add({loss.weight, parts_->added(parameters_) / (loss.weight * loss.weight)});
    const at::Tensor value = loss.sum.detach().to(at::kDouble).reshape({});
    loss_sum_ = loss_sum_.defined() ? loss_sum_.add(value) : value;
}

Gathered Gatherer::finish() {
    if (state_ != State::open) throw Error(ErrorKind::usage, "no batch is open: call begin() before finish()");
    parts_.reset();  // not in the way of the update
    try {
        measure();
    } catch (...) {
        clear();
        throw;
    }
    in_place_.reset();
    state_ = State::gathered;
    return gathered_;
}

void Gatherer::measure() {
    const std::vector<at::Tensor> sums = gradients();
    if (gathered_.weight > 0.0 && sums.empty()) {
        throw Error(ErrorKind::usage,
                    "no parameter got a gradient: are these the parameters of the model that the loss function uses?");
    }
    if (loss_sum_.defined()) gathered_.loss_sum = loss_sum_.item<double>();
    // Its sign says nothing, and would be printed.
    if (std::isnan(gathered_.loss_sum)) gathered_.loss_sum = std::numeric_limits<double>::quiet_NaN();
    if (gathered_.weight > 0.0) gathered_.gradient_norm = joint_norm(sums) / gathered_.weight;
}

Gathered Gatherer::gather(const Batch& batch, const Plan& plan, const LossFunction& loss, bool measure_parts) {
    begin_on(batch, plan, measure_parts);
    add_all(batch, plan, loss, {});
    return finish();
}

void Gatherer::begin_on(const Batch& batch, const Plan& plan, bool measure_parts) {
    if (batch.size() == 0) throw Error(ErrorKind::usage, "the batch is empty: give it at least one sample");
    micro_batch_count(batch.size(), plan.micro_batch);  // refuses a plan that cuts nothing
    begin(measure_parts);
}

bool Gatherer::add_all(const Batch& batch, const Plan& plan, const LossFunction& loss,
                       const std::function<bool()>& pause) {
    const std::int64_t samples = batch.size();
    try {
        while (samples_ < samples) {
            const std::int64_t end = samples_ + next_cut(samples - samples_, plan.micro_batch);
            add(loss_of(loss, batch.slice(samples_, end)));
            samples_ = end;
            if (end < samples && pause && pause()) return false;
        }
    } catch (...) {
        clear();
        throw;
    }
    return true;
}

OpenGather Gatherer::open() const {
    if (state_ != State::open) throw Error(ErrorKind::usage, "no batch is open");
    OpenGather open{.samples = samples_, .so_far = gathered_, .measure_parts = parts_.has_value()};
    if (loss_sum_.defined()) open.so_far.loss_sum = loss_sum_.item<double>();
    for (const Parameter& parameter : parameters_) open.gradients.push_back(parameter.tensor.grad());
    return open;
}

void Gatherer::go_on(const OpenGather& open) {
    const auto fits = [](const Parameter& parameter, const at::Tensor& gradient) {
        return !gradient.defined() || (gradient.sizes() == parameter.tensor.sizes() &&
                                       gradient.scalar_type() == parameter.tensor.scalar_type());
    };
    if (!std::equal(parameters_.begin(), parameters_.end(), open.gradients.begin(), open.gradients.end(), fits)) {
        throw Error(ErrorKind::usage, "the gradients of the batch that was left open are of other parameters");
    }
    begin(open.measure_parts);
    try {
        for (std::size_t i = 0; i < parameters_.size(); ++i) parameters_[i].tensor.mutable_grad() = open.gradients[i];
        gathered_ = open.so_far;
        gathered_.loss_sum = 0.0;
        samples_ = open.samples;
        if (gathered_.weight > 0.0) loss_sum_ = at::full({}, open.so_far.loss_sum, at::kDouble);
        if (parts_) parts_->begin_with(parameters_);
    } catch (...) {
        clear();
        throw;
    }
}

void Gatherer::clear() {
    for (const Parameter& parameter : parameters_) parameter.tensor.mutable_grad() = at::Tensor();
    loss_sum_ = at::Tensor();
    in_place_.reset();
    parts_.reset();
    state_ = State::idle;
}

std::vector<at::Tensor> Gatherer::gradients() const {
    std::vector<at::Tensor> result;
    result.reserve(parameters_.size());
    for (const Parameter& parameter : parameters_) {
        if (parameter.tensor.grad().defined()) result.push_back(parameter.tensor.grad());
    }
    return result;
}

}  // namespace microbatch
