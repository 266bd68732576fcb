#pragma once

#include <c10/core/Device.h>

#include <cstdint>
#include <optional>
#include <string>

#include "microbatch/core/batch_plan.h"
#include "microbatch/core/batch_schedule.h"
#include "microbatch/core/learning_rate.h"
#include "microbatch/core/schedule.h"
#include "microbatch/core/units.h"

namespace microbatch::cli {

/// The values of the options. A field has the name of its option; its initializer is the default, which --help shows.
struct Settings {
    std::string data, model;                                                    ///< empty model: chosen by the data
    std::optional<std::int64_t> layers, heads, kv_heads, width, inner, length;  ///< empty: the model's own
    std::string norm;                                                           ///< empty: the model's own
    std::optional<double> dropout;

    std::int64_t batch = 64;
    std::string batch_schedule;               ///< empty: the batch is constant
    std::optional<std::int64_t> micro_batch;  ///< empty: auto
    std::string recompute = "auto";
    std::string batch_norm = "auto";
    std::string device = "cpu";
    std::string memory;  ///< empty: four fifths of the free memory

    std::string optimizer = "adamw";
    std::optional<double> lr, final_lr;
    std::string lr_rule;  ///< empty: the optimizer's usual rule, if there is a reference batch
    std::optional<std::int64_t> reference_batch;
    double clip = 1.0;
    std::optional<double> weight_decay, momentum;
    bool nesterov = false;
    std::string schedule = "cosine", warmup = "0 steps", decay;
    std::optional<double> power;

    std::optional<std::int64_t> steps, samples, tokens;  ///< at most one of them

    bool no_guard = false;
    std::int64_t restores = 3;
    std::int64_t noise_every = 20;  ///< steps; 0: never

    std::string checkpoint_every = "100 steps", keep_every;
    std::int64_t keep = 3;
    bool no_checkpoints = false, resume = false, resume_changed = false;

    std::string run, config;
    std::string batches;  ///< for compare; empty: small, accumulated, native
    std::int64_t seeds = 2;
    std::uint64_t seed = 1;
    std::int64_t processes = 1;
    std::string shard_optimizer = "auto";
    bool invariant = false;
    std::int64_t grain = 1;               ///< samples
    std::optional<std::int64_t> threads;  ///< empty: torch's choice
    bool check = false, no_verify = false, quiet = false, json = false;
};

/// The defaults of --lr and --weight-decay.
struct OptimizerDefaults {
    double lr, weight_decay;
};
inline constexpr OptimizerDefaults adamw_defaults{.lr = 1e-3, .weight_decay = 0.1};
inline constexpr OptimizerDefaults sgd_defaults{.lr = 0.05, .weight_decay = 5e-4};
inline constexpr double default_momentum = 0.9;

/// How long `train` and `advise` run by default.
inline constexpr Interval default_length{100, Unit::steps};

/// Sets --batch to the first batch of the --batch-schedule.
/// Errors: ErrorKind::usage if the command line has a different --batch, or the schedule cannot be parsed.
void resolve_batch(Settings& settings, bool batch_given);

/// The --device. Errors: ErrorKind::usage if it is no device, or not here.
at::Device device_of(const Settings& settings);

/// The --memory budget of the --device in bytes; without the flag, four fifths of the memory that is available now,
/// shared by the processes of this machine.
/// Errors: ErrorKind::usage if the device has less.
std::int64_t memory_budget_of(const Settings& settings);

/// The length of the run; without a flag, `fallback`. Errors: ErrorKind::usage if more than one of the flags is given.
Interval length_of(const Settings& settings, Interval fallback);

/// The schedule over `length` for steps of --batch samples. Its intervals have the unit of `length`; rates are scaled
/// by the --lr-rule.
/// Errors: ErrorKind::usage, naming the flag.
Schedule schedule_of(const Settings& settings, Interval length, std::int64_t tokens_per_sample);

/// The batch over a run of this length: the --batch-schedule, or a constant --batch.
/// Errors: ErrorKind::usage, naming the flag.
BatchSchedule batches_of(const Settings& settings, Interval length, std::int64_t tokens_per_sample);

/// The --lr-rule. By default, if there is a --reference-batch or the batch changes, sqrt for adamw and linear for sgd.
RateRule rate_rule_of(const Settings& settings);

/// The optimizer's constants, unscaled, and scaled by the rule for steps of `batch` samples.
/// Errors: ErrorKind::usage, naming the flag, if the rule is undefined.
RateConstants constants_of(const Settings& settings);
RateConstants constants_of(const Settings& settings, std::int64_t batch);

/// The --momentum, --lr and --weight-decay, or the optimizer's defaults.
double momentum_of(const Settings& settings);
double learning_rate_of(const Settings& settings);
double weight_decay_of(const Settings& settings);

/// Throws ErrorKind::usage for options that contradict each other. read() has checked the range of each.
void validate(const Settings& settings);

/// The settings of a run with every choice made: the content of config.toml.
/// Requires: settings.model is known.
Settings resolved(Settings settings, const Plan& cut, Interval length, std::int64_t tokens_per_sample,
                  std::int64_t budget_bytes);

}  // namespace microbatch::cli
