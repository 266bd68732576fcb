// One process, one measurement, one line of JSON; `bench/memory` runs them all and makes the tables.
//   memory_case peak   MODEL OPTIMIZER MICRO_BATCH RECOMPUTE   predicted from micro-batches of 1 and 2, then measured
//   memory_case choice MODEL BATCH BUDGET                      the plan, then every plan's time, interleaved
//   memory_case activations MODEL                              one micro-batch of 1 with recompute: peak less fixed
//   parts
// MODEL is gpt-tiny, gpt-small, gpt2, resnet, resnet-batch (batch norm) or mlp; gpt-small@128 sets the tokens a sample.
#include <ATen/Functions.h>
#include <fmt/format.h>
#include <torch/nn/module.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <fstream>
#include <functional>
#include <memory>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "microbatch/core/units.h"
#include "microbatch/memory/budget_allocator.h"
#include "microbatch/models/gpt.h"
#include "microbatch/models/mlp.h"
#include "microbatch/models/resnet.h"
#include "microbatch/ops/cross_entropy.h"
#include "microbatch/ops/linear_cross_entropy.h"
#include "microbatch/optim/adamw.h"
#include "microbatch/optim/sgd.h"
#include "microbatch/step/probe.h"

namespace {

using namespace microbatch;
using Json = nlohmann::ordered_json;

constexpr std::int64_t all_memory = std::int64_t{22} << 30;

struct Job {
    std::shared_ptr<torch::nn::Module> model;
    Parameters parameters;
    LossFunction loss;
    std::function<Batch(std::int64_t)> batch;
    std::unique_ptr<Optimizer> optimizer;
    std::unique_ptr<Accumulator> accumulator;
};

void use_gpt(Job& job, const std::string& name) {
    GptConfig config = gpt_preset(name.substr(0, name.find('@')));
    if (name.find('@') != std::string::npos) config.length = std::stoll(name.substr(name.find('@') + 1));
    Gpt model(config);
    job.model = model.ptr();
    job.loss = [model, wide = config.vocabulary >= 4096](const Batch& micro) mutable -> WeightedLoss {
        const at::Tensor &tokens = micro.fields[0], &targets = micro.fields[1];
        return {wide ? linear_cross_entropy_sum(model->hidden(tokens), model->head_weight(), targets)
                     : cross_entropy_sum(model->forward(tokens), targets),
                count_targets(targets)};
    };
    job.batch = [config](std::int64_t samples) -> Batch {
        const auto draw = [&] { return at::randint(config.vocabulary, {samples, config.length}, at::kLong); };
        return {{draw(), draw()}};
    };
}

template <class Holder>
void use_images(Job& job, Holder model) {
    job.model = model.ptr();
    job.loss = [model](const Batch& micro) mutable -> WeightedLoss {
        return {cross_entropy_sum(model->forward(micro.fields[0]), micro.fields[1]), static_cast<double>(micro.size())};
    };
    job.batch = [](std::int64_t samples) -> Batch {
        return {{at::randn({samples, 1, 28, 28}), at::randint(10, {samples}, at::kLong)}};
    };
}

Job make_job(const std::string& name, const std::string& optimizer) {
    at::manual_seed(1);
    Job job;
    if (name == "mlp") {
        use_images(job, Mlp(MlpConfig{.inputs = 784, .classes = 10}));
    } else if (name.starts_with("resnet")) {
        use_images(job, ResNet(ResNetConfig{.norm = name == "resnet-batch" ? ImageNorm::batch : ImageNorm::group}));
    } else {
        use_gpt(job, name);
    }
    job.parameters = parameters_of(*job.model);
    const auto groups = split_by_decay(job.parameters, 0.1);
    if (optimizer == "sgd") {
        job.optimizer = std::make_unique<Sgd>(groups, SgdOptions{.learning_rate = 1e-3, .momentum = 0.9});
    } else {
        job.optimizer = std::make_unique<AdamW>(groups, AdamWOptions{.learning_rate = 1e-4});
    }
    job.accumulator = std::make_unique<Accumulator>(job.model, *job.optimizer, AccumulatorOptions{.clip_norm = 1.0});
    return job;
}

std::int64_t resident_bytes(const std::string& key) {
    std::ifstream status("/proc/self/status");
    std::string word;
    std::int64_t kibibytes = 0;
    while (status >> word) {
        if (word == key + ":" && status >> kibibytes) return kibibytes * 1024;
    }
    return 0;
}

double seconds_of(const std::function<void()>& work) {
    const auto started = std::chrono::steady_clock::now();
    work();
    return std::chrono::duration<double>(std::chrono::steady_clock::now() - started).count();
}

double median(std::vector<double> values) {
    std::sort(values.begin(), values.end());
    return values[values.size() / 2];
}

std::int64_t count(const Parameters& parameters) {
    std::int64_t total = 0;
    for (const Parameter& parameter : parameters) total += parameter.tensor.numel();
    return total;
}

struct PeakRun {
    Job job;
    PlanReport report = {};
    std::int64_t measured_bytes = 0;
};

// Planned from micro-batches of 1 and 2; then two steps of two micro-batches: all four phases.
PeakRun run_to_peak(const std::string& model, const std::string& optimizer, const Plan& plan) {
    PeakRun run{.job = make_job(model, optimizer)};
    const Batch batch = run.job.batch(2 * plan.micro_batch);
    run.report = plan_batch(*run.job.accumulator, batch, run.job.loss,
                            {.budget_bytes = all_memory,
                             .recompute = plan.recompute ? Recompute::always : Recompute::never,
                             .most_steps = 0.0,
                             .least_seconds = 0.0});
    run.job.accumulator->set_plan(plan);
    reset_peak_memory();
    for (int step = 0; step < 2; ++step) run.job.accumulator->step(batch, run.job.loss);
    run.measured_bytes = memory_use().peak_bytes;
    return run;
}

// The code, the kernels that oneDNN makes for each shape, the buffers of torch's libraries and what else such a job
// brings in for good are not the allocator's: they are there after a first run. The largest resident size begins anew.
std::int64_t resident_when_warm(const std::string& model, const std::string& optimizer, const Plan& plan) {
    run_to_peak(model, optimizer, plan);
    release_cached_memory();
    std::ofstream("/proc/self/clear_refs") << "5";
    return resident_bytes("VmRSS");
}

Json measure_peak(const std::string& model, const std::string& optimizer, const Plan& plan) {
    const std::int64_t resident_before = resident_when_warm(model, optimizer, plan);
    const PeakRun run = run_to_peak(model, optimizer, plan);
    const auto row = std::find_if(run.report.candidates.begin(), run.report.candidates.end(),
                                  [&plan](const Candidate& one) { return one.plan == plan; });
    if (row == run.report.candidates.end() || row->time_measured) return {{"error", "the micro-batch was probed"}};
    return {{"model", model},
            {"parameters", count(run.job.parameters)},
            {"optimizer", optimizer},
            {"micro_batch", plan.micro_batch},
            {"recompute", plan.recompute},
            {"predicted_bytes", row->peak_bytes()},
            {"measured_bytes", run.measured_bytes},
            {"activation_bytes", parts_of(run.report, *row).activations},
            {"resident_bytes", resident_bytes("VmHWM") - resident_before}};
}

// Every plan of the report that fits, timed one by one: they take turns, and the first step of a turn does not count.
Json measure_choice(const std::string& model, std::int64_t samples, std::int64_t budget) {
    const Job job = make_job(model, "adamw");
    const Batch batch = job.batch(samples);
    const PlanReport report = plan_batch(*job.accumulator, batch, job.loss, {.budget_bytes = budget});
    std::vector<Candidate> plans;
    for (const Candidate& one : report.candidates) {
        if (one.fits) plans.push_back(one);
    }
    std::vector<std::vector<double>> seconds(plans.size());
    for (int round = 0; round < 3; ++round) {
        for (std::size_t i = 0; i < plans.size(); ++i) {
            job.accumulator->set_plan(plans[i].plan);
            for (int step = 0; step < 4; ++step) {
                const double taken = seconds_of([&] { job.accumulator->step(batch, job.loss); });
                if (step > 0) seconds[i].push_back(taken);
            }
        }
    }
    Json rows = Json::array();
    double best = 1e300;
    for (const auto& each : seconds) best = std::min(best, median(each));
    for (std::size_t i = 0; i < plans.size(); ++i) {
        const Candidate& plan = plans[i];
        rows.push_back({{"micro_batch", plan.plan.micro_batch},
                        {"recompute", plan.plan.recompute},
                        {"chosen", plan.plan == report.choice().plan},
                        {"peak_bytes", plan.peak_bytes()},
                        {"predicted_seconds", plan.step_seconds},
                        {"time_measured", plan.time_measured},
                        {"measured_seconds", median(seconds[i])},
                        {"over_best", median(seconds[i]) / best}});
    }
    return {{"model", model},
            {"batch", samples},
            {"budget_bytes", budget},
            {"why", report.why},
            {"measuring_seconds", report.spent_seconds},
            {"plans", rows}};
}

// What a step holds beyond parameters, gradients and optimizer state, with one sample a micro-batch.
Json measure_activations(const std::string& model) {
    Json rows = Json::array();
    for (const bool recompute : {false, true}) {
        const Job job = make_job(model, "adamw");
        const Batch batch = job.batch(2);
        job.accumulator->set_plan({.micro_batch = 1, .recompute = recompute});
        std::vector<double> seconds;
        reset_peak_memory();
        for (int step = 0; step < 3; ++step) {
            seconds.push_back(seconds_of([&] { job.accumulator->step(batch, job.loss); }));
        }
        const std::int64_t parameters = 4 * count(job.parameters);
        rows.push_back({{"recompute", recompute},
                        {"parameter_bytes", parameters},
                        {"peak_bytes", memory_use().peak_bytes},
                        {"activation_bytes", memory_use().peak_bytes - 4 * parameters},
                        {"step_seconds", median(seconds)}});
    }
    return {{"model", model}, {"rows", rows}};
}

}  // namespace

int main(int argument_count, char** argument_values) {
    const std::vector<std::string> words(argument_values + 1, argument_values + argument_count);
    install_budget_allocator();
    Json result;
    if (words.size() == 5 && words[0] == "peak") {
        result = measure_peak(words[1], words[2],
                              {.micro_batch = std::stoll(words[3]), .recompute = words[4] == "recompute"});
    } else if (words.size() == 4 && words[0] == "choice") {
        result = measure_choice(words[1], std::stoll(words[2]), parse_bytes(words[3]));
    } else if (words.size() == 2 && words[0] == "activations") {
        result = measure_activations(words[1]);
    } else {
        fmt::print(stderr, "usage: see the head of bench/memory_case.cpp\n");
        return 2;
    }
    fmt::print("{}\n", result.dump());
    return 0;
}
