#include "microbatch/step/accumulator.h"

#include <c10/util/Exception.h>
#include <torch/nn/module.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <unordered_set>
#include <utility>

#include "microbatch/autograd/recompute.h"
#include "microbatch/core/error.h"
#include "microbatch/core/str_cat.h"
#include "microbatch/memory/budget_allocator.h"
#include "microbatch/optim/clipping.h"

namespace microbatch {

std::string_view reason_to_refuse(const Gathered& gathered) {
    if (gathered.weight == 0.0) return "zero weight";
    if (!std::isfinite(gathered.loss_sum)) return "loss is not finite";
    if (!std::isfinite(gathered.gradient_norm)) return "gradient norm is not finite";
    return {};
}

Accumulator::Accumulator(const Parameters& parameters, Optimizer& optimizer, AccumulatorOptions options)
    : gatherer_(parameters, options.sum_in_product), optimizer_(optimizer), options_(options) {
    set_plan(options.plan);
    if (!(options.clip_norm > 0.0)) {
        throw Error(ErrorKind::usage, str_cat("clip_norm is ", options.clip_norm, "; it must be above 0"));
    }
    refuse_unknown_parameters();
}

void Accumulator::set_plan(const Plan& plan) {
    if (plan.micro_batch < 1) {
        throw Error(ErrorKind::usage, str_cat("the micro-batch is ", plan.micro_batch, "; it must be at least 1"));
    }
    if (plan.recompute && recomputable() == nullptr) {
        throw Error(ErrorKind::usage, "the plan recomputes, but the accumulator has no model that offers it");
    }
    options_.plan = plan;
    limits_.clear();
    if (Recomputable* model = recomputable()) model->set_recompute(plan.recompute);
    // The blocks of another plan's sizes would be in the way of this one's.
    release_cached_memory();
}

Recomputable* Accumulator::recomputable() const {
    return dynamic_cast<Recomputable*>(options_.model);
}

void Accumulator::refuse_unknown_parameters() {
    std::vector<at::Tensor> updated = optimizer_.parameters();
    const auto same = [](const at::Tensor& one, const at::Tensor& other) { return one.is_same(other); };
    if (std::equal(updated.begin(), updated.end(), known_.begin(), known_.end(), same)) return;
    std::unordered_set<const void*> known;
    for (const Parameter& parameter : gatherer_.parameters()) known.insert(parameter.tensor.unsafeGetTensorImpl());
    for (const at::Tensor& tensor : updated) {
        if (known.count(tensor.unsafeGetTensorImpl()) == 0) {
            throw Error(ErrorKind::usage, str_cat("the optimizer updates a parameter of shape ", tensor.sizes(),
                                                  " that the accumulator does not know; give it to track()"));
        }
    }
    known_ = std::move(updated);
}

StepReport Accumulator::step(const Batch& batch, const LossFunction& loss, const StepOptions& options) {
    StepOptions how = options;
    std::int64_t lost = 0;
    for (bool again = false;;) {
        const Gathered gathered = gather(batch, loss, how);
        if (paused_) return {.plan = plan_, .out_of_memory = out_of_memory_, .paused = true};
        std::string reason;
        if (how.judge && gathered.weight > 0.0) reason = ask(how.judge, gathered);
        if (reason.empty()) reason = reason_to_refuse(gathered);
        if (!reason.empty()) return discard(reason);
        StepReport report;
        if (try_apply(report)) {
            report.out_of_memory += lost;
            return report;
        }
        // Out of the handler, where what the failed update held is gone. A smaller micro-batch would not help it.
        undo();
        how.judge = {};
        lost += out_of_memory_;
        // A step that the memory was only lent away from is as if it had not been.
        if (how.release_memory && how.release_memory()) continue;
        const bool given_up = how.give_up_memory && how.give_up_memory();
        if (again && !given_up) {
            throw Error(ErrorKind::does_not_fit,
                        str_cat("the optimizer's step ran out of memory, whatever the micro-batch; parameters and "
                                "optimizer are as before it: raise the memory budget, or take an optimizer with less "
                                "state (SGD); ",
                                out_of_memory_message_));
        }
        again = true;
        ++lost;
    }
}

std::string Accumulator::ask(const Judge& judge, const Gathered& gathered) {
    try {
        return judge(gathered);
    } catch (...) {
        undo();
        discard({});
        throw;
    }
}

Gathered Accumulator::gather(const Batch& batch, const LossFunction& loss, const StepOptions& options) {
    refuse_unknown_parameters();
    threads_.poll();
    open(batch, options);
    while (!try_gather(batch, loss, options.pause)) {
        // Out of the handler: an exception that is being handled keeps the tensors of the failed attempt alive.
        undo();
        if (make_room(options)) {
            release_cached_memory();
            continue;
        }
        const std::optional<Plan> smaller = smaller_plan();
        if (!smaller) give_up(str_cat("out of memory with a micro-batch of 1 sample: ", out_of_memory_message_));
        release_cached_memory();
        plan_ = *smaller;
        ++out_of_memory_;
    }
    // Not before it has shown that it can run.
    if (out_of_memory_ > 0 && !paused_) limits_.remember(batch, plan_);
    return gathered_;
}

void Accumulator::open(const Batch& batch, const StepOptions& options) {
    const std::int64_t samples = batch.size();
    const Plan so_far = plan_;
    const bool goes_on = paused_ && gatherer_.samples() < samples;
    if (paused_ && !goes_on) undo();  // of another batch
    if (!goes_on) gatherer_.require_idle();
    plan_ = limits_.within(options_.plan, batch);
    plan_.micro_batch = std::clamp<std::int64_t>(plan_.micro_batch, 1, std::max<std::int64_t>(samples, 1));
    if (!goes_on) {
        out_of_memory_ = 0;
        // One micro-batch alone says nothing of noise.
        measure_parts_ = options.measure_noise && plan_.micro_batch < samples;
    } else if (out_of_memory_ > 0) {
        plan_.micro_batch = std::min(plan_.micro_batch, so_far.micro_batch);
        plan_.recompute = plan_.recompute || so_far.recompute;
    }
}

// What may help before the plan is made smaller, the least loss first.
bool Accumulator::make_room(const StepOptions& options) {
    if (options.release_memory && options.release_memory()) return true;
    if (measure_parts_) {
        measure_parts_ = false;
        return true;
    }
    return options.give_up_memory && options.give_up_memory();
}

void Accumulator::hold_before() {
    std::vector<at::Tensor> tensors;
    for (const Parameter& parameter : parameters()) tensors.push_back(parameter.tensor);
    before_.emplace(options_.model, tensors);
}

bool Accumulator::try_gather(const Batch& batch, const LossFunction& loss, const std::function<bool()>& pause) {
    std::string failure;
    try {
        if (!paused_) hold_before();
        if (Recomputable* model = recomputable()) model->set_recompute(plan_.recompute);
        if (!paused_) gatherer_.begin_on(batch, plan_, measure_parts_);
        paused_ = !gatherer_.add_all(batch, plan_, loss, pause);
        if (paused_) return true;
        gathered_ = gatherer_.finish();
        ready_ = true;
        return true;
    } catch (const c10::OutOfMemoryError& error) {
        out_of_memory_message_ = error.what_without_backtrace();
        return false;
    } catch (const std::exception& error) {
        undo();
        const auto* known = dynamic_cast<const Error*>(&error);
        if (out_of_memory_ == 0 || (known != nullptr && known->kind() == ErrorKind::bad_data)) throw;
        failure = error.what();
    } catch (...) {
        undo();
        throw;
    }
    give_up(str_cat("out of memory, and with a micro-batch of ", plan_.micro_batch,
                    " the loss function fails: ", failure.substr(0, failure.find('\n')), "; ", out_of_memory_message_));
}

std::optional<OpenBatch> Accumulator::open_batch() const {
    if (!paused_) return std::nullopt;
    return OpenBatch{gatherer_.open(), plan_, out_of_memory_, before_->held()};
}

void Accumulator::go_on(const OpenBatch& open) {
    gatherer_.require_idle();
    if (open.plan.micro_batch < 1) throw Error(ErrorKind::usage, "the batch that was left open has no plan");
    hold_before();
    try {
        before_->hold(open.before);
        gatherer_.go_on(open.gathered);
    } catch (...) {
        before_.reset();
        throw;
    }
    plan_ = open.plan;
    out_of_memory_ = open.out_of_memory;
    measure_parts_ = open.gathered.measure_parts;
    paused_ = true;
}

void Accumulator::give_up(const std::string& why) {
    if (Recomputable* model = recomputable()) model->set_recompute(options_.plan.recompute);
    throw Error(ErrorKind::does_not_fit, str_cat(why,
                                                 "; everything is as before the step: raise the memory budget, or take "
                                                 "shorter samples"));
}

bool Accumulator::try_apply(StepReport& report) {
    try {
        report = apply();
        return true;
    } catch (const c10::OutOfMemoryError& error) {
        out_of_memory_message_ = error.what_without_backtrace();
        return false;
    }
}

void Accumulator::undo() {
    if (paused_) gatherer_.clear();
    paused_ = false;
    if (before_) before_->restore();
    before_.reset();
}

std::optional<Plan> Accumulator::smaller_plan() const {
    Plan plan = plan_;
    if (plan.micro_batch > 1) {
        plan.micro_batch /= 2;
        return plan;
    }
    if (plan.recompute || recomputable() == nullptr) return std::nullopt;
    plan.recompute = true;
    return plan;
}

void Accumulator::begin() {
    refuse_unknown_parameters();
    threads_.poll();
    gatherer_.begin();
    before_.reset();
    plan_ = {.micro_batch = 0, .recompute = options_.plan.recompute};
    out_of_memory_ = 0;
    if (Recomputable* model = recomputable()) model->set_recompute(plan_.recompute);
}

void Accumulator::add(const WeightedLoss& loss) {
    gatherer_.add(loss);
}

Gathered Accumulator::finish() {
    threads_.poll();  // a first batch that was streamed or tried may have been slow
    gathered_ = gatherer_.finish();
    ready_ = true;
    return gathered_;
}

StepReport Accumulator::apply() {
    if (!ready_) throw Error(ErrorKind::usage, "nothing is gathered to apply: call gather() or finish() first");
    if (gathered_.weight == 0.0) return discard("zero weight");
    StepReport result = report();
    const auto started = std::chrono::steady_clock::now();
    try {
        optimizer_.step(divisor());
    } catch (const c10::OutOfMemoryError&) {
        gatherer_.clear();
        ready_ = false;
        throw;
    } catch (...) {
        gatherer_.clear();
        before_.reset();
        ready_ = false;
        throw;
    }
    result.update_seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - started).count();
    result.applied = true;
    before_.reset();
    discard({});
    return result;
}

void Accumulator::dry_run_apply() {
    if (!ready_) throw Error(ErrorKind::usage, "nothing is gathered to rehearse with: call gather() or finish() first");
    optimizer_.dry_run(gathered_.weight > 0.0 ? divisor() : 1.0);
}

double Accumulator::divisor() const {
    return gathered_.weight / clip_coefficient(gathered_.gradient_norm, options_.clip_norm);
}

StepReport Accumulator::discard(std::string_view reason) {
    StepReport result = report();
    result.reason = reason;
    gatherer_.clear();
    gathered_ = {};
    ready_ = false;
    paused_ = false;
    if (before_) before_->restore_model();
    before_.reset();
    return result;
}

StepReport Accumulator::report() const {
    return {.loss = gathered_.loss(),
            .weight = gathered_.weight,
            .gradient_norm = gathered_.gradient_norm,
            .learning_rate = optimizer_.learning_rate(),
            .micro_batches = gathered_.micro_batches,
            .plan = plan_,
            .noise = measure_noise(gathered_.parts, gathered_.gradient_norm * gathered_.gradient_norm),
            .out_of_memory = out_of_memory_};
}

}  // namespace microbatch
