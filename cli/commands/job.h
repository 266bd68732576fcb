#pragma once

#include <cstdio>
#include <memory>
#include <optional>
#include <string>

#include "cli/options/settings.h"
#include "microbatch/data/open.h"
#include "microbatch/run/trainer.h"
#include "microbatch/step/accumulator.h"
#include "microbatch/step/probe.h"

namespace torch::nn {
class Module;
}

namespace microbatch::cli {

/// The data opened and the model chosen: all that is needed to make the same job any number of times.
struct JobPlan {
    Settings settings;
    OpenedData data;
    std::string model;              ///< resolved name
    std::string model_description;  ///< one line, sizes and parameters
    BatchSchedule batches;          ///< over the run
    std::int64_t batch = 0;         ///< the largest of them; less if the run is shorter than that
    std::int64_t steps = 0;         ///< how many the run would have at the batch of its first step
};

/// A model, its loss and its optimizer, freshly made from the seed.
struct Job {
    std::shared_ptr<torch::nn::Module> model;
    Parameters parameters;
    LossFunction loss;
    std::unique_ptr<Optimizer> optimizer;
    std::unique_ptr<Accumulator> accumulator;
};

/// Opens the data and resolves the model, for a run of this length.
/// Errors: ErrorKind::usage for an unknown model, one that does not go with the data, or a flag it does not have;
///         ErrorKind::bad_data as open_data.
JobPlan open_job(const Settings& settings, Interval length);

/// The same seed makes the same parameters.
Job make_job(const JobPlan& plan);

/// The job, made with what the machine has if the budget is less: so that a budget below the parameters can be
/// explained. The budget that was set comes back.
Job make_job_to_plan(const JobPlan& plan, std::int64_t budget_bytes);

/// Throws ErrorKind::usage where the run is shorter than a batch: what it says of that batch would be of a smaller one.
void require_whole_batch(const JobPlan& plan);

/// Plans the job's batch on the job itself, without a trace: the --micro-batch and --recompute of the settings, or the
/// fastest that fits the budget. On a terminal `progress` shows what is being measured. A whole table is for a reader:
/// see PlannerOptions.
/// Errors: Interrupted if a signal came.
PlanReport plan_job(const JobPlan& plan, const Job& job, std::int64_t budget_bytes, std::FILE* progress,
                    bool whole_table = false);

/// Like plan_job, with as few trials as predict the peak of the whole batch at once.
PlanReport plan_native(const JobPlan& plan, const Job& job, std::int64_t budget_bytes);

/// "in 4 micro-batches of 16, with recompute".
std::string describe_cut(const Candidate& candidate);

/// Sets torch's threads to --threads, if it was given.
void use_threads(const Settings& settings);

/// The job's loss; it throws Interrupted where a signal came, and does not wait for threads that a busy machine does
/// not run.
LossFunction watched_loss(const Job& job);

/// Mean loss over the first held-out samples, the model in evaluation mode and put back after: over as many as the run
/// was `trained` on, 16 to 1,024 of them, so that a short run does not wait longer for it than it trained.
/// Errors: Interrupted if a signal came, before the next micro-batch.
double held_out_loss(const JobPlan& plan, const Job& job, std::int64_t trained, std::int64_t micro_batch);

/// What the data is, what of it was read and left out, and what is likely wrong with it; labels take `column` columns.
void print_data(std::FILE* out, const OpenedData& data, int column);

/// "tokens" or "images": what the speed of this data is counted in.
const char* speed_unit(const JobPlan& plan);

}  // namespace microbatch::cli
