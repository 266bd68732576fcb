#pragma once

#include <algorithm>
#include <cstdio>
#include <memory>
#include <optional>
#include <string>

#include "cli/options/settings.h"
#include "microbatch/data/open.h"
#include "microbatch/run/trainer.h"
#include "microbatch/step/accumulator.h"
#include "microbatch/step/batch_norm_plan.h"

namespace torch::nn {
class Module;
}

namespace microbatch::cli {

/// The opened data and the chosen model: everything needed to create the same job repeatedly.
struct JobPlan {
    Settings settings;
    OpenedData data;
    std::string model;              ///< resolved name
    std::string model_description;  ///< one line, sizes and parameters
    BatchSchedule batches;          ///< over the run
    std::int64_t batch = 0;         ///< the largest of them, at most the length of the run

    /// The samples of such a batch that one process gathers at most.
    std::int64_t share(std::int64_t of) const { return reducer->largest_share(of, std::max<std::int64_t>(grain(), 1)); }

    /// Of the invariant mode; 0 without it.
    std::int64_t grain() const { return settings.invariant ? settings.grain : 0; }
    std::shared_ptr<Reducer> reducer = std::make_shared<LocalReducer>();
    double communication_seconds = 0.0;  ///< of a step
    std::int64_t steps = 0;              ///< of the run if every batch were as large as the first
};

/// A model, its loss and its optimizer, initialized from the seed.
struct Job {
    std::shared_ptr<torch::nn::Module> model;
    Parameters parameters;
    LossFunction loss;
    std::unique_ptr<Optimizer> optimizer;
    std::unique_ptr<Accumulator> accumulator;
};

/// Opens the data and resolves the model, for a run of this length.
/// Errors: ErrorKind::usage for an unknown model, a model that does not match the data, or a flag that it does not
///         have; ErrorKind::bad_data as open_data().
JobPlan open_job(const Settings& settings, Interval length);

/// The same seed gives the same parameters.
Job make_job(const JobPlan& plan);

/// The memory of the --device that may be used to measure a job that does not fit in the budget.
std::int64_t room_to_measure(const Settings& settings, std::int64_t budget_bytes);

/// Creates the job with all the memory of the machine, so that a budget smaller than the parameters can be explained.
/// Restores the budget afterwards.
Job make_job_to_plan(const JobPlan& plan, std::int64_t budget_bytes);

/// Throws ErrorKind::usage if the run is shorter than a batch, because a plan for that batch would not apply.
void require_whole_batch(const JobPlan& plan);

/// Plans the job's batch on the job itself, without side effects: the --micro-batch and --recompute of the settings, or
/// the fastest plan that fits in the budget. `progress` shows what is being measured. A complete table is for readers:
/// see PlannerOptions.
/// Errors: Interrupted if a signal came.
PlanReport plan_job(const JobPlan& plan, const Job& job, std::int64_t budget_bytes, std::FILE* progress,
                    bool whole_table = false);

/// Like plan_job(), with only the trials needed to predict the peak of the whole batch in one piece.
PlanReport plan_native(const JobPlan& plan, const Job& job, std::int64_t budget_bytes);

/// Which layers --batch-norm has replaced, in one line; nullopt if none.
std::optional<std::string> replaced_norms(const JobPlan& plan);

/// "in 4 micro-batches of 16, with recompute".
std::string describe_cut(const Candidate& candidate);

/// Sets torch's threads to --threads, if it was given.
void use_threads(const Settings& settings);

/// The job's loss, which throws Interrupted if a signal arrives, even while a busy machine delays the threads.
LossFunction watched_loss(const Job& job);

/// Mean loss over the first held-out samples, with the model temporarily in evaluation mode: over as many samples as
/// the run was `trained` on, 16 to 1,024 of them, so that evaluating a short run does not take longer than training it.
/// Errors: Interrupted if a signal came, before the next micro-batch.
double held_out_loss(const JobPlan& plan, const Job& job, std::int64_t trained, std::int64_t micro_batch);

/// Prints what the data is, which files were read and skipped, and what is probably wrong with it; labels are `column`
/// columns wide.
void print_data(std::FILE* out, const OpenedData& data, int column);

/// "tokens" or "images": the unit for the speed of training on this data.
const char* speed_unit(const JobPlan& plan);

}  // namespace microbatch::cli
