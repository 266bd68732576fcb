#pragma once

#include <cstdio>
#include <memory>
#include <optional>
#include <string>

#include "cli/options/settings.h"
#include "microbatch/data/open.h"
#include "microbatch/run/trainer.h"
#include "microbatch/step/accumulator.h"

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

/// The same seed makes the same parameters. The optimizer's constants are those of steps of `batch` samples; without
/// one, of the settings' batch.
Job make_job(const JobPlan& plan, const Plan& cut = {}, std::optional<std::int64_t> batch = {});

/// Sets torch's threads to --threads, if it was given.
void use_threads(const Settings& settings);

/// What a trained model is: its parameters and buffers, by name.
Parameters weights_of(const Job& job);

/// Thrown where an interrupted command has nothing to keep.
struct Interrupted {};

/// Mean loss over the first held-out samples, the model in evaluation mode and put back after: over as many as the run
/// was `trained` on, 16 to 1,024 of them, so that a short run does not wait longer for it than it trained.
/// Errors: Interrupted if a signal came, before the next micro-batch.
double held_out_loss(const JobPlan& plan, const Job& job, std::int64_t trained, std::int64_t micro_batch);

/// What the data is, what of it was read and left out, and what is likely wrong with it; labels take `column` columns.
void print_data(std::FILE* out, const OpenedData& data, int column);

/// "tokens" or "images": what the speed of this data is counted in.
const char* speed_unit(const JobPlan& plan);

}  // namespace microbatch::cli
