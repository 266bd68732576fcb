#pragma once

#include <cstdint>
#include <optional>
#include <string>

#include "microbatch/core/batch_schedule.h"
#include "microbatch/core/learning_rate.h"
#include "microbatch/core/schedule.h"
#include "microbatch/core/units.h"

namespace microbatch::cli {

/// What the flags say, as they were written. The names are the flags' own.
struct Settings {
    std::string model, data;
    std::optional<std::int64_t> layers, heads, width;
    std::int64_t length = 0;  ///< tokens a sample; 0: the model's own
    std::string norm;
    double dropout = 0.0;

    std::int64_t batch = 64;
    std::string batch_schedule;  ///< empty: the batch stays
    std::string micro_batch = "auto";
    std::string recompute = "auto";
    std::optional<std::string> memory;
    std::string steps, samples, tokens;

    std::string optimizer = "adamw";
    std::optional<double> lr;
    std::optional<double> final_lr;
    std::string lr_rule;  ///< empty: what goes with the optimizer, where there is a reference batch
    std::optional<std::int64_t> reference_batch;
    std::string schedule = "cosine";
    std::string warmup = "0 steps";
    std::string decay;
    std::optional<double> power;
    double clip = 1.0;
    std::optional<double> weight_decay;
    std::optional<double> momentum;
    bool nesterov = false;

    std::int64_t seed = 1;
    std::int64_t threads = 0;  ///< 0: torch's own choice
    bool no_verify = false;
    bool no_guard = false;
    std::int64_t restores = 3;
    std::int64_t noise_every = 20;  ///< steps; 0: never
    std::string checkpoint_every = "100 steps";
    std::int64_t keep = 3;
    std::string keep_every;  ///< empty: none
    bool no_checkpoints = false;
    bool resume = false;
    bool resume_changed = false;
    std::string run, config;
    bool json = false;
    bool quiet = false;
};

/// The --batch is that of the schedule's first stage.
/// Errors: ErrorKind::usage if the command line had a --batch that differs, or the schedule cannot be read.
void resolve_batch(Settings& settings, bool batch_given);

/// The --memory budget in bytes; without the flag four fifths of what the machine has available now.
std::int64_t memory_budget_of(const Settings& settings);

/// The --micro-batch, or none for auto. Errors: ErrorKind::usage unless it is from 1 to the batch.
std::optional<std::int64_t> micro_batch_of(const Settings& settings);

/// How long to train; `fallback` if no flag says.
/// Errors: ErrorKind::usage if more than one of --steps, --samples and --tokens is given, or it is not above 0.
Interval length_of(const Settings& settings, Interval fallback);

/// The schedule over `length` for steps of `batch` samples: intervals in length's unit, a step of theirs being one of
/// the --batch; rates by the --lr-rule.
/// Errors: ErrorKind::usage, naming the flag.
Schedule schedule_of(const Settings& settings, Interval length, std::int64_t tokens_per_sample, std::int64_t batch);

/// The batch over a run of this length: the --batch-schedule, or the --batch alone.
/// Errors: ErrorKind::usage, naming the flag.
BatchSchedule batches_of(const Settings& settings, Interval length, std::int64_t tokens_per_sample);

/// The --lr-rule, or the optimizer's usual one where there is a --reference-batch or the batch changes: sqrt for adamw,
/// linear for sgd.
RateRule rate_rule_of(const Settings& settings);

/// The optimizer's constants before the rule, and by the rule for steps of `batch` samples.
/// Errors: ErrorKind::usage, naming the flag, where the rule has no answer.
RateConstants constants_of(const Settings& settings);
RateConstants constants_of(const Settings& settings, std::int64_t batch);

/// The --momentum, --lr and --weight-decay, or what the optimizer starts from without them.
double momentum_of(const Settings& settings);
double learning_rate_of(const Settings& settings);
double weight_decay_of(const Settings& settings);

/// Throws ErrorKind::usage for flags that are out of range or contradict each other.
void validate(const Settings& settings);

}  // namespace microbatch::cli
