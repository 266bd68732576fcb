#include "microbatch/train/trainer.h"

#include <ATen/core/grad_mode.h>

#include <algorithm>
#include <chrono>
#include <numeric>
#include <utility>
#include <vector>

#include "microbatch/core/error.h"
#include "microbatch/core/text.h"
#include "microbatch/train/lazy_batch.h"

namespace microbatch {

Trainer::Trainer(Accumulator& accumulator, const Dataset& dataset, LossFunction loss, TrainerOptions options)
    : accumulator_(accumulator),
      dataset_(dataset),
      loss_(loss_on(dataset, std::move(loss))),
      options_(options),
      sampler_(dataset.size(), options.seed) {
    if (options_.batch < 1) {
        throw Error(ErrorKind::usage, text("the batch is ", options_.batch, "; it must be at least 1"));
    }
    if (options_.length.count < 0) {
        throw Error(ErrorKind::usage, text("the length of the run is ", to_string(options_.length)));
    }
    if (dataset_.tokens_per_sample() < 1) {
        throw Error(ErrorKind::usage, text("the dataset has ", dataset_.tokens_per_sample(),
                                           " tokens per sample; it must have at least 1"));
    }
    if (options_.schedule) validate(*options_.schedule);
    if (options_.guard) guard_.emplace(*options_.guard);
}

std::int64_t Trainer::next_batch() const {
    const Interval& length = options_.length;
    if (length.unit == Unit::steps) return options_.batch;
    const std::int64_t per_sample = length.unit == Unit::tokens ? dataset_.tokens_per_sample() : 1;
    const std::int64_t left = length.count - progress_.in(length.unit);
    return std::min(options_.batch, left / per_sample + (left % per_sample != 0));
}

TrainerReport Trainer::step() {
    if (done()) throw Error(ErrorKind::usage, text("the run of ", to_string(options_.length), " is done"));
    const auto started = std::chrono::steady_clock::now();
    const SamplerState position = sampler_.state();
    const std::optional<SpikeGuard> guard = guard_;
    TrainerReport report;
    report.samples = next_batch();
    const Interval tokens =
        convert({report.samples, Unit::samples}, Unit::tokens, options_.batch, dataset_.tokens_per_sample());
    const Progress batch{1, report.samples, tokens.count};
    report.progress = progress_ + batch;
    try {
        const Batch samples = lazy_batch(sampler_.next(report.samples));
        if (options_.schedule) {
            accumulator_.optimizer().set_learning_rate(microbatch::learning_rate(*options_.schedule, progress_, batch));
        }
        Judge judge;
        // A smaller batch is noisier: what is usual says nothing of it.
        if (guard_ && report.samples == options_.batch) {
            judge = [&](const Gathered& gathered) { return judge_by_guard(gathered, report.diverged); };
        }
        report.step = accumulator_.step(samples, loss_, judge);
    } catch (...) {
        sampler_.restore(position);
        guard_ = guard;
        throw;
    }
    progress_ = report.progress;
    report.seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - started).count();
    return report;
}

std::string Trainer::judge_by_guard(const Gathered& gathered, bool& diverged) {
    Judgement judgement = guard_->judge(gathered.loss(), gathered.gradient_norm);
    diverged = judgement.verdict == Verdict::diverged;
    return std::move(judgement.reason);
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
