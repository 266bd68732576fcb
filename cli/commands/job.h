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

/// The opened data and the chosen model: everything needed to create the same job repeatedly.
struct JobPlan {
    Settings settings;
    OpenedData data;
    std::string model;              ///< resolved name
    std::string model_description;  ///< one line, sizes and parameters
    BatchSchedule batches;          ///< over the run
    std::int64_t batch = 0;         ///< the largest of them, at most the length of the run
    std::int64_t steps = 0;         ///< of the run if every batch were as large as the first
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

/// The same seed gives the same parameters. The optimizer's constants are for steps of `batch` samples; if not given,
/// of the settings' batch.
Job make_job(const JobPlan& plan, const Plan& cut = {}, std::optional<std::int64_t> batch = {});

/// Sets torch's threads to --threads, if it was given.
void use_threads(const Settings& settings);

/// The parameters and buffers of a trained model, by name.
Parameters weights_of(const Job& job);

/// Thrown if a command is interrupted and has nothing to save.
struct Interrupted {};

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
