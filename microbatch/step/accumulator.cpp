#include "microbatch/step/accumulator.h"

#include <ATen/ops/randint.h>
#include <ATen/ops/tensor.h>
#include <c10/util/Exception.h>
#include <c10/util/ScopeExit.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <limits>
#include <stdexcept>
#include <unordered_set>

#include "microbatch/autograd/batch_norm_layers.h"
#include "microbatch/core/error.h"
#include "microbatch/memory/meter.h"
#include "microbatch/model/forward_state.h"
#include "microbatch/optim/clipping.h"
#include "microbatch/step/repeatable.h"

namespace microbatch {
namespace {

Reclaimers joined(Reclaimers first, const Reclaimers& second) {
    first.insert(first.end(), second.begin(), second.end());
    return first;
}

// Only the first time: memory that others used may be free again.
Reclaimer once() {
    return {[tried = std::make_shared<bool>(false)] { return !std::exchange(*tried, true); }};
}

std::uint64_t draw_seed() {
    const at::Tensor drawn = at::randint(std::numeric_limits<std::int64_t>::max(), {1}, at::kLong);
    return static_cast<std::uint64_t>(drawn.item<std::int64_t>());
}

}  // namespace

/// A batch that runs, possibly several times.
struct Accumulator::Attempt {
    Slice share = {};  // of the batch, for this process
    Plan plan = {};
    std::int64_t samples = 0;
    bool measure_noise = false;
    MicroBatchCaps caps = {};
    std::optional<PartialBatch> partial = {};
    std::int64_t out_of_memory = 0;
    std::string message = {};  // of the last out-of-memory error
    SampleShape shape = {};    // of the micro-batch that ran last, and its plan
    Plan plan_of_shape = {};
    bool is_agreed = false;  // the processes have told each other how it ended
    bool ran_out = false;    // of memory, in this process
    std::optional<Invariance> invariance = {};
};

/// The batch's gradients do not fit the sums that were made for those of the last one.
struct Accumulator::OutOfRange : std::exception {};

Accumulator::Accumulator(const AnyModel& model, Optimizer& optimizer, AccumulatorOptions options)
    : model_(model.get()),
      gatherer_(model, options.sum_in_product && options.grain == 0, options.precision),
      optimizer_(optimizer),
      options_(std::move(options)) {
    set_plan(options_.plan);
    require_that(options_.grain >= 0, "the grain is ", options_.grain, "; it must be at least 1, or 0 for none");
    require_that(options_.clip_norm > 0.0, "clip_norm is ", options_.clip_norm, "; it must be above 0");
    require_that(
        !optimizer_.is_partial(),
        "the optimizer's state is sharded by another accumulator, and this one cannot know how: make a new one");
    refuse_unknown_parameters();
    if (options_.shard_optimizer) shard_optimizer();
}

void Accumulator::shard_optimizer(bool yes) {
    require_idle();
    if (yes) {
        const std::vector<at::Tensor> own = reducer().divide(optimizer_.parameters());
        if (is_sharded()) optimizer_.update_only(own);
    } else {
        optimizer_.update_all();
        reducer().unite();
    }
}

void Accumulator::require_whole_update() const {
    if (!is_sharing_) return;
    throw Error(
        ErrorKind::lost_rank,
        "the parameters are a mixture of two steps: another rank was lost while it gave its part of the update");
}

void Accumulator::set_plan(const Plan& plan) {
    require_that(plan.micro_batch >= 1, "the micro-batch is ", plan.micro_batch, "; it must be at least 1");
    require_that(!plan.recompute || offers_recompute(plan.batch_norm),
                 "the plan uses recompute, but the accumulator has no model that supports it");
    options_.plan = plan;
    if (options_.grain > 0) options_.plan.micro_batch = options_.grain;
    caps_.clear();
    ActivationCheckpointing::set(*model_, plan);
    // Cached blocks of another plan's sizes would only take memory.
    release_cached_of(device_of(gatherer_.parameters()));
}

std::string Accumulator::fragmentation() const {
    return fragmentation_of(device_of(gatherer_.parameters()));
}

void Accumulator::refuse_unknown_parameters() {
    std::vector<at::Tensor> updated = optimizer_.parameters();
    const auto same = [](const at::Tensor& one, const at::Tensor& other) { return one.is_same(other); };
    if (std::equal(updated.begin(), updated.end(), known_.begin(), known_.end(), same)) return;
    std::unordered_set<const void*> known;
    for (const Parameter& parameter : gatherer_.parameters()) known.insert(parameter.tensor.unsafeGetTensorImpl());
    for (const at::Tensor& tensor : updated) {
        require_that(known.count(tensor.unsafeGetTensorImpl()) != 0, "the optimizer updates a parameter of shape ",
                     tensor.sizes(), " that the accumulator does not know; pass it to track()");
    }
    known_ = std::move(updated);
    if (is_sharded()) optimizer_.update_only(reducer().divide(known_));
}

StepReport Accumulator::step(const BatchSource& batch, const LossFunction& loss, StepOptions options) {
    FiniteGate finite;
    GateChain gates(options.gate == nullptr ? std::vector<StepGate*>{&finite}
                                            : std::vector<StepGate*>{options.gate, &finite});
    std::int64_t lost = 0;
    std::optional<std::pair<Gathered, Judgement>> decided;
    const auto attempt = [&]() -> StepReport {
        decided.reset();
        auto result = gather_batch(batch, loss, options);
        if (auto* partial = std::get_if<PartialBatch>(&result)) {
            const std::int64_t count = partial->out_of_memory;
            return {.plan = partial->plan, .out_of_memory = count, .partial = std::move(*partial)};
        }
        try {
            gathered_ = std::move(std::get<Gathered>(result));
            if (options_.precision->skip(*gathered_)) return discard("overflow");
            decided.emplace(*gathered_, gates.evaluate(*gathered_));
            decided->first.sums.clear();  // nothing holds the gradients longer than the update
            const Judgement& judgement = decided->second;
            StepReport report = judgement.verdict == Verdict::apply ? apply() : discard(judgement.reason);
            report.diverged = judgement.verdict == Verdict::diverged;
            return report;
        } catch (...) {
            drop_gathered();
            const bool may_repeat = is_oom(std::current_exception()) && reducer().size() == 1;
            if (!may_repeat) undo();
            if (may_repeat || !is_oom(std::current_exception())) throw;
            const std::string message = message_of(std::current_exception());
            reducer().abandon(message);  // the others have updated
            throw Error(ErrorKind::does_not_fit, "the optimizer's step ran out of memory: ", message);
        }
    };
    const auto undo_step = [&] {
        undo();
        lost += out_of_memory_;
    };
    // A smaller micro-batch would not help the update.
    StepReport report = retry_on_oom(
        joined(joined(options.before_noise, options.before_plan), {once()}), attempt, undo_step,
        [&](const Reclaimer& helped, const std::string&) { lost += helped.counts ? 1 : 0; },
        [this](const std::string& message) {
            throw Error(ErrorKind::does_not_fit,
                        "the optimizer's step ran out of memory, whatever the micro-batch; parameters and "
                        "optimizer are unchanged: raise the memory budget, or use an optimizer with less "
                        "state (SGD); ",
                        message, fragmentation());
        });
    report.out_of_memory += lost;
    if (report.partial) report.partial->out_of_memory = report.out_of_memory;
    // Outside the attempt: a gate that runs out of memory here must not repeat the update.
    if (decided) gates.record(decided->first, decided->second);
    return report;
}

std::variant<Gathered, PartialBatch> Accumulator::gather(const BatchSource& batch, const LossFunction& loss,
                                                         StepOptions options) {
    return gather_batch(batch, loss, options);
}

const Gathered& Accumulator::gather(const Batch& batch, const LossFunction& loss) {
    StepOptions options;
    gather_batch(TensorBatch(batch), loss, options);
    return *gathered_;
}

std::variant<Gathered, PartialBatch> Accumulator::gather_batch(const BatchSource& batch, const LossFunction& loss,
                                                               StepOptions& options) {
    refuse_unknown_parameters();
    throttle_.poll();
    gatherer_.require_idle();
    Attempt attempt = first_attempt(batch, options);
    require_policy(attempt.plan);
    if (options_.grain > 0) plan_grains(attempt);
    const Reclaimers last_resorts{
        {[&attempt] { return std::exchange(attempt.measure_noise, false); }, /*counts=*/false}};
    const Reclaimers smaller{{[&] { return make_plan_smaller(attempt); }}};
    auto result = retry_on_oom(
        joined(
            joined(joined(agreed(options.before_noise, attempt), last_resorts), agreed(options.before_plan, attempt)),
            smaller),
        [&] { return try_in_range(batch, loss, options.stop, attempt); }, [&] { undo(); },
        [&](const Reclaimer& helped, const std::string& message) {
            attempt.message = message;
            attempt.out_of_memory += helped.counts ? 1 : 0;
        },
        [this](const std::string& message) {
            throw Error(ErrorKind::does_not_fit, "out of memory with ",
                        options_.grain > 0 ? str_cat("a grain of ", options_.grain) : "a micro-batch of 1 sample", ": ",
                        message, fragmentation(),
                        "; the step changed nothing: raise the memory budget, or use shorter "
                        "samples");
        });
    // Only after an attempt with them has succeeded.
    caps_ = std::move(attempt.caps);
    out_of_memory_ = attempt.out_of_memory;
    if (auto* partial = std::get_if<PartialBatch>(&result)) {
        partial->plan = partial->so_far.plan;
        partial->out_of_memory = out_of_memory_;
        partial->before = std::move(*before_);
        before_.reset();
    } else {
        gathered_ = std::get<Gathered>(result);
    }
    return result;
}

Accumulator::Attempt Accumulator::first_attempt(const BatchSource& batch, StepOptions& options) const {
    const std::int64_t grain = std::max<std::int64_t>(options_.grain, 1);
    const Slice share = reducer().share(batch.size(), grain);
    const std::int64_t samples = share.size();
    Attempt attempt{.share = share,
                    .plan = options_.plan,
                    .samples = samples,
                    .caps = caps_,
                    .partial = std::exchange(options.partial, std::nullopt)};
    attempt.plan.micro_batch =
        std::clamp<std::int64_t>(attempt.plan.micro_batch, 1, std::max<std::int64_t>(samples, 1));
    // A single micro-batch does not show noise.
    const bool is_cut = attempt.plan.micro_batch < samples || reducer().size() > 1 || !caps_.empty();
    attempt.measure_noise = options.measure_noise && is_cut && options_.grain == 0;
    require_that(!attempt.partial || options_.grain == 0,
                 "a batch that was left half-way cannot be gathered in grains");
    if (const auto& partial = attempt.partial) {
        gatherer_.require_partial(batch, *partial);
        attempt.measure_noise = partial->measure_noise;
        attempt.out_of_memory = partial->out_of_memory;
        if (partial->out_of_memory > 0) {
            attempt.plan.micro_batch = std::min(attempt.plan.micro_batch, partial->plan.micro_batch);
            attempt.plan.recompute = attempt.plan.recompute || partial->plan.recompute;
        }
    }
    return attempt;
}

// All know the batch's random numbers, and which of its grains are theirs.
void Accumulator::plan_grains(Attempt& attempt) {
    attempt.plan.micro_batch = options_.grain;
    const std::int64_t own = micro_batch_count(attempt.samples, options_.grain);
    const at::Tensor mine = at::tensor({static_cast<std::int64_t>(draw_seed()), own}, at::kLong);
    Invariance how{.grain = options_.grain, .grains = 0, .ranges = ranges_};
    const std::vector<at::Tensor> all = reducer().gather(mine);
    for (std::size_t rank = 0; rank < all.size(); ++rank) {
        const auto* const numbers = all[rank].const_data_ptr<std::int64_t>();
        if (rank == 0) how.seed = static_cast<std::uint64_t>(numbers[0]);
        if (std::cmp_less(rank, reducer().rank())) how.first += numbers[1];
        how.grains += numbers[1];
    }
    attempt.invariance = std::move(how);
}

std::variant<Gathered, PartialBatch> Accumulator::try_in_range(const BatchSource& batch, const LossFunction& loss,
                                                               const StopToken& stop, Attempt& attempt) {
    if (!attempt.invariance) return try_gather(batch, loss, stop, attempt);
    for (int times = 0;; ++times) {
        try {
            auto result = try_gather(batch, loss, stop, attempt);
            ranges_of_gathered_ = attempt.invariance->found;
            prepare_generators(*model_,
                               StateReader(*before_).section("rng"))();  // as they were after the seed was drawn
            return result;
        } catch (const OutOfRange&) {
            require_that(times < 3, "the gradients of a batch are others each time: they have no range to sum them in");
        }
    }
}

void Accumulator::probe_grain(const BatchSource& share, const LossFunction& loss) {
    if (is_probed_ || share.size() == 0) return;
    const auto grain = [&] { return share.fetch({0, std::min(options_.grain, share.size())}); };
    require_repeatable(*model_, gatherer_.parameters(), loss, grain);
    is_probed_ = true;
}

// All have added their grains: whether all sums can hold them.
void Accumulator::require_range(Attempt& attempt) {
    Invariance& how = *attempt.invariance;
    GradientRanges all(how.found.size(), 0.0);
    for (const at::Tensor& one : reducer().gather(at::tensor(how.found, at::kDouble))) {
        for (std::size_t i = 0; i < all.size(); ++i) all[i] = std::max(all[i], one.const_data_ptr<double>()[i]);
    }
    how.found = std::move(all);
    how.ranges.resize(how.found.size(), 0.0);
    if (exceeds(how.found, how.ranges)) {
        how.ranges = how.found;
        throw OutOfRange();
    }
}

void Accumulator::save_ranges(const StateWriter& writer) const {
    if (options_.grain == 0) return;
    const Parameters& parameters = gatherer_.parameters();
    for (std::size_t i = 0; i < ranges_.size(); ++i) {
        writer.put(parameters[i].name, std::isfinite(ranges_[i]) ? ranges_[i] : 0.0);
    }
}

Commit Accumulator::prepare_ranges(const StateReader& reader) {
    GradientRanges ranges;
    for (const Parameter& one : gatherer_.parameters()) {
        ranges.push_back(reader.has(one.name) ? reader.positive(one.name) : 0.0);
    }
    return [this, ranges = std::move(ranges)] { ranges_ = ranges; };
}

std::variant<Gathered, PartialBatch> Accumulator::try_gather(const BatchSource& batch, const LossFunction& loss,
                                                             const StopToken& stop, Attempt& attempt) {
    attempt.shape.clear();
    attempt.plan_of_shape = attempt.caps.within(attempt.plan, {});  // if not even a micro-batch could start
    attempt.is_agreed = attempt.ran_out = false;
    std::optional<PartialBatch> partial = std::exchange(attempt.partial, std::nullopt);
    const SliceOf share(batch, attempt.share);
    const bool is_whole = attempt.samples == batch.size();
    const bool may_stop = reducer().size() == 1 && !attempt.invariance;
    try {
        before_ = partial ? std::move(partial->before) : forward_state(*model_);
        if (attempt.invariance) probe_grain(share, loss);
        return gatherer_.gather(is_whole ? batch : share, loss,
                                {.plan = attempt.plan,
                                 .measure_noise = attempt.measure_noise,
                                 .stop = may_stop ? stop : StopToken{},
                                 .caps = &attempt.caps,
                                 .on_micro_batch =
                                     [&attempt](const SampleShape& shape, const Plan& plan) {
                                         attempt.shape = shape;
                                         attempt.plan_of_shape = plan;
                                     },
                                 .on_added =
                                     [&] {
                                         reserve_for_step();
                                         agree(nullptr, attempt);
                                         if (attempt.invariance) require_range(attempt);
                                     },
                                 .reducer = &reducer(),
                                 .invariance = attempt.invariance ? &*attempt.invariance : nullptr},
                                std::move(partial));
    } catch (...) {
        const std::exception_ptr failure = std::current_exception();
        if (!attempt.is_agreed) {
            auto undo_if_lost = c10::make_scope_exit([this] { undo(); });
            agree(failure, attempt);
            undo_if_lost.release();
        }
        if (is_oom(failure)) throw;
        undo();
        if (attempt.out_of_memory == 0) throw;
        try {
            std::rethrow_exception(failure);
        } catch (const OutOfRange&) {
            throw;
        } catch (const Error& error) {
            if (error.kind() == ErrorKind::bad_data || error.kind() == ErrorKind::lost_rank) throw;
        } catch (const c10::Error&) {
        } catch (const std::runtime_error&) {
        } catch (const std::logic_error&) {
        }  // any other is another language's, and passes as it is
        const std::string why = message_of(failure);
        throw Error(ErrorKind::does_not_fit, "out of memory, and with a micro-batch of ",
                    attempt.plan_of_shape.micro_batch, " the loss function fails: ", why.substr(0, why.find('\n')),
                    "; ", attempt.message,
                    "; the step changed nothing: raise the memory budget, or use shorter samples");
    }
}

// After the processes have agreed, none may fail alone.
void Accumulator::reserve_for_step() {
    if (reducer().size() > 1) optimizer_.reserve(gatherer_.gradients_to_come());
}

// Tells the other processes how the attempt ended here. Returns if it can go on as it would alone; throws if another
// process has failed.
void Accumulator::agree(const std::exception_ptr& failure, Attempt& attempt) {
    attempt.is_agreed = true;
    attempt.ran_out = failure && is_oom(failure);
    std::optional<GatherFailure> mine;
    if (failure) {
        mine = {.out_of_memory = attempt.ran_out,
                .message = message_of(failure),
                .shape = attempt.shape,
                .plan = attempt.plan_of_shape,
                .rank = reducer().rank()};
    }
    const std::optional<GatherFailure> found = reducer().agree(mine);
    if (!found || found->rank == reducer().rank()) return;
    if (!found->out_of_memory) {
        // What ended both processes is told by each.
        if (failure && !attempt.ran_out) return;
        throw Error(ErrorKind::lost_rank, "rank ", found->rank, " has failed: ", found->message);
    }
    // All repeat the batch in the same way.
    attempt.shape = found->shape;
    attempt.plan_of_shape = found->plan;
    if (!failure) TORCH_CHECK_WITH(OutOfMemoryError, false, "rank ", found->rank, ": ", found->message);
}

// What a process can free is its own affair, and may be more or less than another's: those that ran out of memory free
// something, and all repeat the batch if that has helped any. What follows from the batch is the same on all.
Reclaimers Accumulator::agreed(const Reclaimers& own, const Attempt& attempt) {
    if (reducer().size() == 1) return own;
    return {{[this, &attempt, own] {
        const auto helps = [](const Reclaimer& one) { return one.reclaim(); };
        return reducer().any_rank(attempt.ran_out && std::any_of(own.begin(), own.end(), helps));
    }}};
}

void Accumulator::require_policy(const Plan& plan) const {
    require_that(reducer().size() == 1 || plan.batch_norm != BatchNorm::exact,
                 "exact BatchNorm is for one process: over several, choose the policy deferred");
    if (options_.grain == 0 || plan.batch_norm == BatchNorm::frozen) return;
    for (const NamedTensor& buffer : model_->buffers()) {
        require_that(!counts_batches(buffer),
                     "the invariant mode cannot have BatchNorm that moves its running statistics, as ",
                     buffer.name.substr(0, buffer.name.rfind('.')),
                     " does: they depend on the order of the grains; choose the policy frozen, group or rms");
    }
}

// For samples of the shape at which memory ran out, and larger ones.
bool Accumulator::make_plan_smaller(Attempt& attempt) const {
    Plan plan = attempt.plan_of_shape;
    const bool may_recompute = !plan.recompute && offers_recompute(plan.batch_norm);
    // A smaller micro-batch hardly helps an exact batch: the values between its layers are the whole batch's.
    if (may_recompute && plan.batch_norm == BatchNorm::exact && plan.micro_batch < attempt.samples) {
        plan.recompute = true;
    } else if (plan.micro_batch > 1 && options_.grain == 0) {
        plan.micro_batch /= 2;
    } else if (may_recompute) {
        plan.recompute = true;
    } else {
        return false;
    }
    attempt.caps.remember(attempt.shape, plan);
    return true;
}

void Accumulator::drop_gathered() {
    gathered_.reset();
    gatherer_.clear();
}

void Accumulator::undo() {
    if (before_) restore_forward_state(*model_, *before_, /*generators=*/true);
    before_.reset();
    ActivationCheckpointing::set(*model_, options_.plan);
}

void Accumulator::begin(bool measure_noise) {
    require_that(options_.grain == 0, "with a grain, the batch is not streamed: pass it to step() or gather()");
    Plan plan = options_.plan;
    plan.micro_batch = 0;  // the caller's
    open(measure_noise, plan);
}

void Accumulator::open(bool measure_noise, const Plan& plan) {
    refuse_unknown_parameters();
    throttle_.poll();
    gatherer_.begin(measure_noise, plan);
    is_trial_ = false;
    before_.reset();
    out_of_memory_ = 0;
}

void Accumulator::begin_trial(const Plan& plan) {
    open(/*measure_noise=*/false, plan);
    if (options_.grain > 0) {
        const GradientRanges any(gatherer_.parameters().size(),
                                 1.0);  // the range makes no difference to time and memory
        gatherer_.sum_in_any_order(any, 1);
    }
    is_trial_ = true;
}

void Accumulator::gather_trial(const BatchSource& batch, const LossFunction& loss, const Plan& plan,
                               std::function<void(bool first, bool last)> on_piece) {
    throttle_.poll();
    gathered_ = std::get<Gathered>(gatherer_.gather(batch, loss, {.plan = plan, .on_piece = std::move(on_piece)}));
}

void Accumulator::add(const WeightedLoss& loss) {
    gatherer_.add(loss);
}

const Gathered& Accumulator::finish() {
    throttle_.poll();  // a first batch that was streamed or used for planning may have been slow
    // A trial is one process's own.
    gathered_ = gatherer_.finish(is_trial_ ? nullptr : &reducer());
    return *gathered_;
}

StepReport Accumulator::apply() {
    require_that(gathered_.has_value(), "there is no gathered batch to apply: call gather() or finish() first");
    if (gathered_->weight == 0.0) return discard("zero weight");
    StepReport result = report();
    const auto started = std::chrono::steady_clock::now();
    try {
        is_sharing_ = is_sharded();
        optimizer_.step(gathered_->sums, divisor());
        reducer().share_update();
        is_sharing_ = false;
    } catch (...) {
        if (is_oom(std::current_exception())) is_sharing_ = false;                  // nothing has changed
        if (is_sharded()) reducer().abandon(message_of(std::current_exception()));  // the others wait for its part
        drop_gathered();
        if (!is_oom(std::current_exception())) before_.reset();
        throw;
    }
    result.update_seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - started).count();
    result.applied = true;
    ranges_ = ranges_of_gathered_;  // a batch that is refused says nothing of the next one
    before_.reset();
    discard({});
    return result;
}

StepReport Accumulator::hand_over() {
    if (!gathered_) throw Error(ErrorKind::usage, "nothing is gathered to hand over: call gather() or finish() first");
    require_that(!is_sharded(), "the optimizer's state is sharded: it has to make the step, with apply()");
    StepReport result = report();
    const double weight = gathered_->weight;
    gatherer_.hand_over(gathered_->sums, weight > 0.0 ? weight * options_.precision->loss_scale() : 1.0);
    ranges_ = ranges_of_gathered_;
    gathered_.reset();
    before_.reset();
    return result;
}

void Accumulator::dry_run_apply() {
    require_that(gathered_.has_value(), "there is no gathered batch for a dry run: call gather() or finish() first");
    optimizer_.dry_run(gathered_->sums, gathered_->weight > 0.0 ? divisor() : 1.0);
}

double Accumulator::divisor() const {
    return gathered_->weight * options_.precision->loss_scale() /
           clip_coefficient(gathered_->gradient_norm, options_.clip_norm);
}

StepReport Accumulator::discard(std::string_view reason) {
    StepReport result = report();
    result.reason = reason;
    drop_gathered();
    if (before_) restore_forward_state(*model_, *before_, /*generators=*/false);
    before_.reset();
    return result;
}

StepReport Accumulator::report() const {
    const Gathered gathered = gathered_.value_or(Gathered{});
    return {.loss = gathered.loss(),
            .weight = gathered.weight,
            .gradient_norm = gathered.gradient_norm,
            .learning_rate = optimizer_.learning_rate(),
            .micro_batches = gathered.micro_batches,
            .plan = gathered.plan,
            .noise = measure_noise(gathered.parts, gathered.gradient_norm * gathered.gradient_norm),
            .out_of_memory = out_of_memory_};
}

}  // namespace microbatch
