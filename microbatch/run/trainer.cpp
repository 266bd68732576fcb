#include "microbatch/run/trainer.h"

#include <ATen/core/grad_mode.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <chrono>
#include <limits>
#include <numeric>
#include <utility>
#include <vector>

#include "microbatch/core/error.h"
#include "microbatch/core/str_cat.h"
#include "microbatch/step/lazy_batch.h"

namespace microbatch {
namespace {

// Noise changes as a model trains: the average remembers some 20 measures, or 200 steps where that is less.
double decay_of_noise(std::int64_t every) {
    return 1.0 - std::clamp(static_cast<double>(every) / 200.0, 0.05, 0.5);
}

}  // namespace

Trainer::Trainer(Accumulator& accumulator, const Dataset& dataset, LossFunction loss, TrainerOptions options)
    : accumulator_(accumulator),
      dataset_(dataset),
      loss_(loss_on(dataset, std::move(loss))),
      options_(std::move(options)),
      sampler_(dataset.size(), options_.seed),
      noise_(decay_of_noise(options_.noise_every)) {
    validate_options();
    if (options_.guard) guard_.emplace(*options_.guard);
    if (options_.recovery) recovery_.emplace(accumulator_, *options_.recovery);
}

void Trainer::validate_options() const {
    const auto refuse = [](const auto&... what) { throw Error(ErrorKind::usage, str_cat(what...)); };
    if (options_.batch < 1) refuse("the batch is ", options_.batch, "; it must be at least 1");
    if (options_.length.count < 0) refuse("the length of the run is ", to_string(options_.length));
    if (dataset_.tokens_per_sample() < 1) {
        refuse("the dataset has ", dataset_.tokens_per_sample(), " tokens per sample; it must have at least 1");
    }
    if (options_.schedule) validate(*options_.schedule);
    if (options_.batches) validate(*options_.batches);
    if (options_.recovery && !options_.guard) refuse("recovery needs a guard that says when the run has diverged");
    if (options_.rate_rule == RateRule::adam_sde || options_.rate_rule == RateRule::beta2_time) {
        refuse("a batch that changes during the run goes with the rules none, linear and sqrt; ",
               to_string(options_.rate_rule), " would have to change the optimizer's betas");
    }
    if (options_.noise_every < 0) refuse("noise_every is ", options_.noise_every, "; it must be at least 0 steps");
}

std::int64_t Trainer::full_batch() const {
    return options_.batches ? batch_at(*options_.batches, progress_) : options_.batch;
}

std::int64_t Trainer::samples_left() const {
    const Interval& length = options_.length;
    if (length.unit == Unit::steps) return std::numeric_limits<std::int64_t>::max();
    const std::int64_t per_sample = length.unit == Unit::tokens ? dataset_.tokens_per_sample() : 1;
    const std::int64_t left = length.count - progress_.in(length.unit);
    return left / per_sample + (left % per_sample != 0);
}

TrainerReport Trainer::step() {
    if (done()) throw Error(ErrorKind::usage, str_cat("the run of ", to_string(options_.length), " is done"));
    const auto started = std::chrono::steady_clock::now();
    const auto seconds = [&] {
        return open_seconds_ + std::chrono::duration<double>(std::chrono::steady_clock::now() - started).count();
    };
    const SamplerState position = sampler_.state();
    TrainerReport report;
    begin_step(report);
    const Progress batch{1, report.samples, report.progress.tokens - progress_.tokens};
    std::optional<Evaluated> evaluated;
    try {
        const Batch samples = next_samples(report.samples);
        set_learning_rate(batch);
        report.step = accumulator_.step(samples, loss_, step_options(report, evaluated));
    } catch (...) {
        sampler_.restore(position);
        open_seconds_ = 0.0;
        throw;
    }
    report.paused = report.step.paused;
    if (report.paused) {
        sampler_.restore(position);
        open_warning_ = report.warning;
        report.progress = progress_;
        report.seconds = open_seconds_ = seconds();
        return report;
    }
    record(evaluated, report.step.applied);
    report.diverged = evaluated && evaluated->judgement.verdict == Verdict::diverged;
    progress_ = report.progress;
    add_noise(report);
    if (report.diverged) go_back(report);
    report.seconds = seconds();
    open_seconds_ = 0.0;
    return report;
}

void Trainer::begin_step(TrainerReport& report) {
    report.samples = std::min(full_batch(), samples_left());
    const Interval tokens =
        convert({report.samples, Unit::samples}, Unit::tokens, report.samples, dataset_.tokens_per_sample());
    report.progress = progress_ + Progress{1, report.samples, tokens.count};
    report.warning = std::exchange(open_warning_, {});
    // The snapshot before a batch that was left open was taken before it.
    if (!recovery_) return;
    if (!accumulator_.is_paused()) report.warning = recovery_->keep(progress_.steps, *guard_, options_.release_memory);
    report.snapshot_bytes = recovery_->memory_bytes();
}

Batch Trainer::next_samples(std::int64_t count) {
    const std::vector<std::int64_t> indices = sampler_.next(count);
    while (true) {
        try {
            return lazy_batch(indices);
        } catch (const c10::OutOfMemoryError&) {
            if (options_.release_memory && options_.release_memory()) continue;
            if (!recovery_ || !recovery_->give_up_memory()) throw;
        }
    }
}

void Trainer::set_learning_rate(const Progress& batch) {
    Optimizer& optimizer = accumulator_.optimizer();
    const double factor = recovery_ ? recovery_->rate_factor(progress_.steps) : 1.0;
    if (options_.schedule) {
        double rate = learning_rate(*options_.schedule, progress_, batch) * factor;
        if (options_.batches) {
            rate *= scale_to_batch({.learning_rate = 1.0}, options_.rate_rule, options_.batches->front().batch,
                                   full_batch())
                        .learning_rate;
        }
        optimizer.set_learning_rate(rate);
    } else if (recovery_ && recovery_->times() > 0) {
        optimizer.set_learning_rate(own_rate_ * factor);
    }
}

StepOptions Trainer::step_options(const TrainerReport& report, std::optional<Evaluated>& evaluated) {
    StepOptions how{.release_memory = options_.release_memory, .pause = options_.pause};
    if (recovery_) how.give_up_memory = [this] { return recovery_->give_up_memory(); };
    how.measure_noise = options_.noise_every > 0 && progress_.steps % options_.noise_every == 0;
    if (guard_ && report.samples == full_batch()) {
        how.judge = [this, &evaluated](const Gathered& gathered) { return evaluate(gathered, evaluated); };
    }
    return how;
}

std::string Trainer::evaluate(const Gathered& gathered, std::optional<Evaluated>& evaluated) const {
    // Smaller batches are noisier: what was usual says nothing of them.
    const SpikeGuard fresh(*options_.guard);
    const SpikeGuard& guard = batch_shrinks() ? fresh : *guard_;
    evaluated = {gathered.loss(), gathered.gradient_norm, guard.evaluate(gathered.loss(), gathered.gradient_norm)};
    return evaluated->judgement.reason;
}

void Trainer::record(const std::optional<Evaluated>& evaluated, bool applied) {
    if (guard_ && batch_shrinks()) {
        guard_.emplace(*options_.guard);
        shrunk_at_ = progress_.steps;
    }
    last_batch_ = full_batch();
    if (evaluated) guard_->record(evaluated->loss, evaluated->gradient_norm, applied);
}

void Trainer::add_noise(TrainerReport& report) {
    if (report.step.noise && report.step.applied) noise_.add(*report.step.noise);
    const std::optional<double> weight = noise_.noise_batch();
    if (weight && report.step.weight > 0.0) {
        report.noise_batch = *weight * static_cast<double>(report.samples) / report.step.weight;
    }
}

void Trainer::go_back(TrainerReport& report) {
    if (!recovery_) return;
    if (recovery_->times() == 0) own_rate_ = accumulator_.optimizer().learning_rate();
    for (bool again = true; again;) {
        again = false;
        try {
            report.went_back_to = recovery_->go_back(progress_.steps, *guard_);
        } catch (const Error& error) {
            report.warning = str_cat("no way back: ", error.what());
        } catch (const c10::OutOfMemoryError&) {
            again = options_.release_memory && options_.release_memory();
            if (!again) report.warning = "no way back: out of memory";
        }
    }
    if (!report.went_back_to) return;
    // The guard of a larger batch would refuse the noise of this one.
    if (*report.went_back_to < shrunk_at_) guard_.emplace(*options_.guard);
    report.diverged = !recovery_->may_go_on();
}

double mean_loss(const Dataset& dataset, std::int64_t micro_batch, const LossFunction& loss) {
    at::NoGradGuard no_grad;
    double sum = 0.0;
    double weight = 0.0;
    const std::int64_t count = micro_batch_count(dataset.size(), micro_batch);
    for (std::int64_t i = 0; i < count; ++i) {
        const Slice slice = micro_batch_slice(dataset.size(), micro_batch, i);
        std::vector<std::int64_t> indices(static_cast<std::size_t>(slice.size()));
        std::iota(indices.begin(), indices.end(), slice.begin);
        const WeightedLoss result = loss(dataset.get(indices));
        validate(result);
        if (result.weight == 0.0) continue;
        sum += result.sum.item<double>();
        weight += result.weight;
    }
    return weight > 0.0 ? sum / weight : 0.0;
}

}  // namespace microbatch
