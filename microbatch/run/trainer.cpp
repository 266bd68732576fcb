#include "microbatch/run/trainer.h"

#include <ATen/Context.h>
#include <ATen/core/grad_mode.h>

#include <algorithm>
#include <chrono>
#include <numeric>
#include <utility>

#include "microbatch/core/crc32c.h"
#include "microbatch/core/error.h"
#include "microbatch/core/str_cat.h"
#include "microbatch/model/forward_state.h"

namespace microbatch {
namespace {

// The noise changes as a model trains: the average remembers about 20 measurements, or 200 steps if that is less.
double decay_of_noise(std::int64_t every) {
    return 1.0 - std::clamp(static_cast<double>(every) / 200.0, 0.05, 0.5);
}

}  // namespace

Trainer::Trainer(Accumulator& accumulator, const Dataset& dataset, LossFunction loss, TrainerOptions options)
    : accumulator_(accumulator),
      dataset_(dataset),
      loss_(std::move(loss)),
      options_(std::move(options)),
      at_{Sampler(dataset.size(), options_.seed), NoiseAverage(decay_of_noise(options_.noise_every))} {
    validate_options();
    for (const auto& [name, tensor] : accumulator_.model().buffers()) {
        first_buffers_.push_back({name, tensor.detach().to(at::kMeta)});
    }
    if (options_.guard) gate_.emplace(*options_.guard);
    if (options_.recovery) recovery_.emplace(accumulator_, *options_.recovery);
}

void Trainer::validate_options() const {
    const auto refuse = [](const auto&... what) { throw Error(ErrorKind::usage, what...); };
    if (options_.batch < 1) refuse("the batch is ", options_.batch, "; it must be at least 1");
    if (options_.length.count < 0) refuse("the length of the run is ", to_string(options_.length));
    if (dataset_.tokens_per_sample() < 1) {
        refuse("the dataset has ", dataset_.tokens_per_sample(), " tokens per sample; it must have at least 1");
    }
    if (options_.schedule) validate(*options_.schedule);
    if (options_.batches) validate(*options_.batches);
    if (options_.recovery && !options_.guard) {
        refuse("recovery requires a guard, which detects when the run has diverged");
    }
    if (options_.rate_rule == RateRule::adam_sde || options_.rate_rule == RateRule::beta2_time) {
        refuse("a batch that changes during the run requires the rule none, linear or sqrt; ",
               to_string(options_.rate_rule), " would change the optimizer's betas");
    }
    if (options_.noise_every < 0) refuse("noise_every is ", options_.noise_every, "; it must be at least 0 steps");
}

std::int64_t Trainer::full_batch() const {
    return options_.batches ? batch_at(*options_.batches, at_.progress) : options_.batch;
}

std::int64_t Trainer::samples_left() const {
    const Interval& length = options_.length;
    if (length.unit == Unit::steps) return std::numeric_limits<std::int64_t>::max();
    const std::int64_t per_sample = length.unit == Unit::tokens ? dataset_.tokens_per_sample() : 1;
    const std::int64_t left = length.count - at_.progress.in(length.unit);
    return left / per_sample + (left % per_sample != 0);
}

TrainerReport Trainer::step() {
    if (done()) throw Error(ErrorKind::usage, "the run of ", to_string(options_.length), " is complete");
    const auto started = std::chrono::steady_clock::now();
    const double seconds_before = std::exchange(at_.partial_seconds, 0.0);
    const auto seconds = [&] {
        return seconds_before + std::chrono::duration<double>(std::chrono::steady_clock::now() - started).count();
    };
    TrainerReport report;
    begin_step(report);
    Sampler sampler = at_.sampler;
    std::vector<std::int64_t> samples = sampler.next(report.samples);
    dataset_.arrange(samples);
    const DatasetBatch batch(dataset_, std::move(samples));
    drop_partial_of_another(batch);
    accumulator_.optimizer().set_learning_rate(next_learning_rate());
    seed_rank();
    report.step = accumulator_.step(batch, loss_, step_options(report));
    report.paused = report.step.partial.has_value();
    if (report.paused) {
        partial_ = std::move(report.step.partial);
        partial_warning_ = report.warning;
        report.progress = at_.progress;
        report.seconds = at_.partial_seconds = seconds();
        return report;
    }
    const std::int64_t full = full_batch();
    if (full < at_.last_batch) at_.shrunk_at = at_.progress.steps;
    at_.last_batch = full;
    at_.sampler = sampler;
    at_.progress = report.progress;
    report.diverged = report.step.diverged;
    add_noise(report);
    if (report.diverged) roll_back(report);
    if (accumulator_.is_sharded()) agree_on_snapshots(report);  // a checkpoint has the part of each
    report.seconds = seconds();
    return report;
}

// Dropout of two ranks must not draw the same numbers; the first has those of a single process. They follow from the step,
// so that a checkpoint needs no generator of each rank.
void Trainer::seed_rank() const {
    const int rank = accumulator_.reducer().rank();
    if (rank == 0) return;
    const std::uint64_t numbers[] = {options_.seed, static_cast<std::uint64_t>(at_.progress.steps),
                                     static_cast<std::uint64_t>(rank)};
    at::manual_seed(crc32c({reinterpret_cast<const char*>(numbers), sizeof(numbers)}, 0));
}

Progress Trainer::next_batch() const {
    const std::int64_t samples = next_cut(samples_left(), full_batch());
    const Interval tokens = convert({samples, Unit::samples}, Unit::tokens, samples, dataset_.tokens_per_sample());
    return {1, samples, tokens.count};
}

void Trainer::begin_step(TrainerReport& report) {
    const Progress batch = next_batch();
    report.samples = batch.samples;
    report.progress = at_.progress + batch;
    report.warning = std::exchange(partial_warning_, {});
    // The snapshot of a partial batch was taken before the batch.
    if (!recovery_) return;
    if (!partial_) keep_snapshot(report);
    report.snapshot_bytes = recovery_->memory_bytes();
}

void Trainer::keep_snapshot(TrainerReport& report) {
    report.warning = recovery_->keep(at_.progress.steps, *gate_, options_.reclaimers);
    agree_on_snapshots(report);
}

// All ranks can roll back to the same snapshots, or none can.
void Trainer::agree_on_snapshots(TrainerReport& report) {
    Reducer& reducer = accumulator_.reducer();
    if (!recovery_ || reducer.size() == 1 || recovery_->has_given_up()) return;
    if (reducer.any_rank(recovery_->has_failed())) report.warning = recovery_->give_up();
}

double Trainer::next_learning_rate() const {
    const auto limited = [this](double rate) {
        return recovery_ ? recovery_->limited(rate, at_.progress.steps) : rate;
    };
    if (!options_.schedule) {
        const bool rolled_back = recovery_ && recovery_->times() > 0;
        return rolled_back ? limited(at_.own_rate) : accumulator_.optimizer().learning_rate();
    }
    double rate = learning_rate(*options_.schedule, at_.progress, next_batch());
    if (options_.batches) {
        const std::int64_t first = options_.batches->front().batch;
        rate *= scale_to_batch({.learning_rate = 1.0}, options_.rate_rule, first, full_batch()).learning_rate;
    }
    return limited(rate);
}

StepOptions Trainer::step_options(const TrainerReport& report) {
    const std::int64_t full = full_batch();
    // Smaller batches are noisier: the statistics do not apply to them.
    if (gate_ && full < at_.last_batch) gate_->reset();
    StepOptions how{.measure_noise = options_.noise_every > 0 && at_.progress.steps % options_.noise_every == 0,
                    .before_noise = options_.reclaimers,
                    .stop = options_.stop,
                    .partial = std::exchange(partial_, std::nullopt)};
    if (recovery_) how.before_plan = {{[this] { return recovery_->reclaim_memory(); }, /*counts=*/false}};
    if (gate_ && report.samples == full) how.gate = &*gate_;
    return how;
}

void Trainer::add_noise(TrainerReport& report) {
    if (report.step.noise && report.step.applied) at_.noise.add(*report.step.noise);
    const std::optional<double> weight = at_.noise.noise_batch();
    if (weight && report.step.weight > 0.0) {
        report.noise_batch = *weight * static_cast<double>(report.samples) / report.step.weight;
    }
}

void Trainer::roll_back(TrainerReport& report) {
    if (!recovery_) return;
    if (recovery_->times() == 0) at_.own_rate = accumulator_.optimizer().learning_rate();
    try {
        report.rolled_back_to = retry_on_oom(
            options_.reclaimers, [&] { return recovery_->roll_back(at_.progress.steps, *gate_); }, [] {},
            [](const Reclaimer&, const std::string&) {},
            [](const std::string&) { throw Error(ErrorKind::does_not_fit, "out of memory"); });
    } catch (const Error& error) {
        report.warning = str_cat("the run could not be rolled back: ", error.what());
    }
    if (!report.rolled_back_to) return;
    // The gate of a larger batch would refuse the noise of this one.
    if (*report.rolled_back_to < at_.shrunk_at) gate_->reset();
    report.diverged = !recovery_->may_go_on();
}

bool ends_on_any_rank(const Accumulator& accumulator, const TrainerOptions& options, bool diverged) {
    return accumulator.reducer().any_rank(diverged || (options.stop && options.stop()));
}

// The run was resumed with options that change the batch: it is started again.
void Trainer::drop_partial_of_another(const BatchSource& batch) {
    if (!partial_) return;
    const bool fits = partial_->fingerprint == batch.fingerprint() && partial_->samples < batch.size();
    if (fits && accumulator_.grain() == 0) return;
    restore_forward_state(accumulator_.model(), partial_->before, /*generators=*/true);
    partial_.reset();
}

void Trainer::discard_partial() {
    if (!partial_) return;
    restore_forward_state(accumulator_.model(), partial_->before, /*generators=*/false);
    partial_.reset();
    at_.partial_seconds = 0.0;
}

StepRecord record_of(const TrainerReport& report, const StepMeasures& measures) {
    const StepReport& step = report.step;
    StepRecord record{.step = report.progress.steps,
                      .samples = report.progress.samples,
                      .tokens = report.progress.tokens,
                      .batch = report.samples,
                      .loss = step.loss,
                      .weight = step.weight,
                      .learning_rate = step.learning_rate,
                      .gradient_norm = step.gradient_norm,
                      .micro_batch = step.plan.micro_batch,
                      .micro_batches = step.micro_batches,
                      .recompute = step.plan.recompute,
                      .out_of_memory = step.out_of_memory,
                      .step_seconds = report.seconds,
                      .update_seconds = step.update_seconds,
                      .predicted_step_seconds = measures.predicted_step_seconds,
                      .peak_bytes = measures.peak_bytes,
                      .predicted_peak_bytes = measures.predicted_peak_bytes,
                      .applied = step.applied,
                      .reason = step.reason,
                      .rolled_back_to = report.rolled_back_to,
                      .noise_batch = report.noise_batch};
    if (step.noise) {
        record.gradient_variance = step.noise->variance;
        record.squared_gradient = step.noise->squared_gradient;
    }
    return record;
}

double mean_loss(const Dataset& dataset, std::int64_t micro_batch, const LossFunction& loss, std::int64_t most) {
    at::NoGradGuard no_grad;
    double sum = 0.0;
    double weight = 0.0;
    const std::int64_t size = std::min(dataset.size(), most);
    const std::int64_t count = micro_batch_count(size, micro_batch);
    for (std::int64_t i = 0; i < count; ++i) {
        const Slice slice = micro_batch_slice(size, micro_batch, i);
        std::vector<std::int64_t> indices(static_cast<std::size_t>(slice.size()));
        std::iota(indices.begin(), indices.end(), slice.begin);
        const WeightedLoss result = loss(DatasetBatch(dataset, std::move(indices)).fetch({0, slice.size()}));
        const double own = weight_of(result);
        if (own == 0.0) continue;
        sum += result.sum.item<double>();
        weight += own;
    }
    return weight > 0.0 ? sum / weight : 0.0;
}

}  // namespace microbatch
