#include "cli/commands/strategy.h"

#include <c10/util/Exception.h>
#include <fmt/format.h>
#include <torch/nn/module.h>

#include <algorithm>
#include <nlohmann/json.hpp>

#include "cli/commands/process.h"
#include "cli/options/config.h"
#include "cli/print/output.h"
#include "microbatch/analysis/curvature.h"
#include "microbatch/analysis/gradient_variance.h"
#include "microbatch/core/error.h"
#include "microbatch/io/file_system.h"
#include "microbatch/io/safetensors.h"
#include "microbatch/memory/budget_allocator.h"

namespace microbatch::cli {
namespace {

constexpr std::int64_t variance_batches = 8;
constexpr std::int64_t curvature_samples = 32;
constexpr LanczosOptions lanczos{.most_products = 15, .tolerance = 0.01};

// A number of the child's output, or a word such as nan.
double number_of(const nlohmann::json& value) {
    return value.is_number() ? value.get<double>() : std::numeric_limits<double>::quiet_NaN();
}

// Intervals refer to the user's batch: a warmup of "5 steps" has the same number of samples for every strategy.
Settings settings_of(const JobPlan& plan, std::int64_t samples, std::uint64_t seed, const Strategy& strategy) {
    Settings settings = plan.settings;
    const Schedule schedule = schedule_of(settings, {samples, Unit::samples}, plan.data.train->tokens_per_sample());
    settings.warmup = to_string(schedule.warmup);
    if (schedule.shape == ScheduleShape::wsd) settings.decay = to_string(schedule.decay);
    settings.batch = strategy.batch;
    settings.seed = seed;
    settings.no_verify = true;
    settings.noise_every = 0;  // otherwise the copy of the gradients would count in the peak
    settings.restores = 0;
    return settings;
}

void load_weights(const std::filesystem::path& folder, const Job& job) {
    const std::filesystem::path file = folder / "model.safetensors";
    copy_by_name(read_safetensors(file), weights_of(*job.accumulator), file.string());
}

void measure_variance(const JobPlan& plan, const Job& job, Strategy& strategy) {
    Sampler sampler(plan.data.train->size(), plan.settings.seed + 1);
    strategy.variance =
        gradient_variance(
            job.parameters, variance_batches, [&] { return plan.data.train->get(sampler.next(strategy.batch)); },
            strategy.plan, watched_loss(job))
            .variance;
}

// The same samples for every strategy, in a quarter of its micro-batch: two backward passes need more memory than one.
void measure_curvature(const JobPlan& plan, const Job& job, Strategy& strategy) {
    Sampler sampler(plan.data.train->size(), plan.settings.seed + 2);
    const Batch batch =
        plan.data.train->get(sampler.next(std::min<std::int64_t>(curvature_samples, plan.data.train->size())));
    const std::int64_t micro_batch = std::clamp<std::int64_t>(strategy.plan.micro_batch / 4, 1, batch.size());
    job.model->eval();
    const LossFunction loss = watched_loss(job);
    strategy.losses_along = losses_along(job.parameters, distances(), 1, batch, micro_batch, loss);
    try {
        strategy.curvature = largest_curvature(job.parameters, batch, micro_batch, loss, lanczos).largest_eigenvalue;
    } catch (const Error&) {
        strategy.curvature.reset();  // not finite at these parameters
    } catch (const c10::Error&) {
        strategy.curvature.reset();  // an operator that cannot be differentiated twice
    }
    job.model->train();
}

/// A temporary folder, deleted by the destructor.
struct Scratch {
    std::filesystem::path path;

    explicit Scratch(std::filesystem::path at) : path(std::move(at)) { std::filesystem::create_directories(path); }
    Scratch(const Scratch&) = delete;
    Scratch& operator=(const Scratch&) = delete;
    ~Scratch() {
        std::error_code ignored;
        std::filesystem::remove_all(path, ignored);
    }
};

void add_result(const ChildResult& result, Strategy& strategy) {
    const bool first = strategy.held_out.empty();
    const auto document = nlohmann::json::parse(result.output, nullptr, /*allow_exceptions=*/false);
    const bool diverged = result.exit_code == static_cast<int>(ErrorKind::stopped);
    if (!document.is_object() || (result.exit_code != 0 && !diverged)) {
        strategy.failure = !result.error.empty() ? result.error
                           : result.exit_code > 128
                               ? fmt::format("its process was ended by signal {}", result.exit_code - 128)
                               : fmt::format("its process ended with exit code {} and no message", result.exit_code);
        return;
    }
    strategy.diverged = strategy.diverged || diverged;
    strategy.held_out.push_back(number_of(document["held_out_loss"]));
    strategy.peak_bytes = std::max<std::int64_t>(first ? 0 : strategy.peak_bytes, document["peak_bytes"]);
    if (!first) return;
    strategy.ran = true;
    strategy.step_seconds = document["step_seconds"];
    strategy.seconds = document["seconds"];
    strategy.plan = {document["micro_batch"], document["recompute"]};
}

}  // namespace

const std::vector<double>& distances() {
    static const std::vector<double> all = [] {
        std::vector<double> result;
        for (int i = -10; i <= 10; ++i) result.push_back(0.1 * i);
        return result;
    }();
    return all;
}

std::filesystem::path folder_of(const std::filesystem::path& folder, const Strategy& strategy, std::uint64_t seed) {
    std::string name = fmt::format("{}-{}", strategy.name, seed);
    std::replace(name.begin(), name.end(), ' ', '-');
    return folder / name;
}

void train_in_child(std::FILE* out, const JobPlan& plan, std::int64_t samples, std::uint64_t seed,
                    const std::filesystem::path& folder, Strategy& strategy) {
    print(out, "{}: batch {} in micro-batches of {}, seed {}\n", strategy.name, strategy.batch,
          std::min(strategy.plan.micro_batch, strategy.batch), seed);
    const std::filesystem::path run = folder_of(folder, strategy, seed);
    const Scratch given(folder / "given");
    const std::filesystem::path config = given.path / "config.toml";
    Plan cut = strategy.plan;
    cut.micro_batch = std::min(cut.micro_batch, strategy.batch);
    write_whole(config, config_text(resolved(settings_of(plan, samples, seed, strategy), cut, {samples, Unit::samples},
                                             plan.data.train->tokens_per_sample(), strategy.memory_bytes)));
    add_result(run_child({"train", "--config", config.string(), "--run", run.string(), "--json", "--quiet",
                          "--no-checkpoints"},
                         out),
               strategy);
    if (!strategy.failure.empty()) print(out, "{} did not finish: {}\n", strategy.name, strategy.failure);
}

void measure_at_the_end(std::FILE* out, const JobPlan& plan, const std::filesystem::path& folder, const Strategy& at,
                        std::vector<Strategy>& strategies) {
    const BudgetScope lifted(no_budget);
    const Job job = make_job(plan);
    print(out, "gradient variance over {} batches of each size, curvature over {} samples\n", variance_batches,
          curvature_samples);
    if (at.ran) load_weights(folder_of(folder, at, plan.settings.seed), job);
    for (Strategy& each : strategies) {
        if (each.ran) measure_variance(plan, job, each);
        if (interrupted()) throw Interrupted();
    }
    for (Strategy& each : strategies) {
        if (!each.ran || each.diverged) continue;
        load_weights(folder_of(folder, each, plan.settings.seed), job);
        measure_curvature(plan, job, each);
    }
}

}  // namespace microbatch::cli
