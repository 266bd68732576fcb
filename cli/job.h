#pragma once

#include <memory>
#include <string>

#include "cli/settings.h"
#include "microbatch/data/open.h"
#include "microbatch/memory/probe.h"
#include "microbatch/train/accumulator.h"
#include "microbatch/train/trainer.h"

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
    std::int64_t batch = 0;  ///< of the run's first step: less than the settings' if the run is shorter than that
    std::int64_t steps = 0;  ///< how many the run has
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
Job make_job(const JobPlan& plan, std::int64_t micro_batch);

/// Measures a micro-batch on a job of its own, at the job's real batch: first and later micro-batch, first and later
/// step. Throws c10::OutOfMemoryError where it needs more than `most_bytes`.
Measurement measure_micro_batch(const JobPlan& plan, std::int64_t micro_batch, std::int64_t most_bytes);

/// Throws ErrorKind::does_not_fit if the batch's own samples are beyond the budget, and more than the
/// model: no micro-batch could help.
void require_room_for_samples(const JobPlan& plan, std::int64_t budget_bytes);

/// probe_micro_batches for this job, never using more than the budget; only to say what a sample needs that does not
/// fit it goes beyond, as far as the machine has memory. Stops with Interrupted if a signal comes.
Probe probe_job(const JobPlan& plan, std::int64_t budget_bytes);

/// Thrown where an interrupted command has nothing to keep.
struct Interrupted {};

/// Mean loss over the first held-out samples (at most 1,024), the model in evaluation mode and put back after.
double held_out_loss(const JobPlan& plan, const Job& job, std::int64_t micro_batch);

/// "tokens" or "images": what the speed of this data is counted in.
const char* speed_unit(const JobPlan& plan);

}  // namespace microbatch::cli
