// One run with a deliberate spike, guarded or not; one line of JSON. `bench/spikes` runs them all.
//   spike_case MODEL SPIKE guarded|unguarded STEPS SEED
// MODEL is gpt (0.8M parameters), resnet (0.2M, group norm), or gpt-mini or resnet-mini, which take a second.
// SPIKE is none, or at two fifths of the run:
//   poison   all targets of a batch are random, and its loss is a thousand times what it was
//   rate     the optimizer takes one step at a hundred times its rate
//   nan      one number of one gradient is NaN
//   sample   one sample of a batch has a weight of ten thousand
// Unguarded is the loop that everybody writes: it takes every step. Gradients are not clipped in either, so that what a
// spike does is seen.
#include <ATen/Context.h>
#include <ATen/Functions.h>
#include <ATen/Parallel.h>
#include <fmt/format.h>
#include <torch/nn/module.h>

#include <functional>
#include <limits>
#include <memory>
#include <nlohmann/json.hpp>
#include <span>
#include <string>
#include <vector>

#include "microbatch/data/batch_source.h"
#include "microbatch/data/open.h"
#include "microbatch/io/json.h"
#include "microbatch/models/gpt.h"
#include "microbatch/models/resnet.h"
#include "microbatch/ops/cross_entropy.h"
#include "microbatch/optim/adamw.h"
#include "microbatch/optim/sgd.h"
#include "microbatch/run/trainer.h"

namespace {

using namespace microbatch;
using Json = nlohmann::ordered_json;

/// What goes wrong, and when.
struct Spike {
    std::string kind;
    std::int64_t step = 0;  // counted from 0
    std::int64_t now = 0;   // the current step
    int micro_batch = 0;    // of the step

    bool is(const char* name) const { return kind == name && now == step; }
};

/// Takes one step at a hundred times the rate.
class SpikedOptimizer final : public Optimizer {
public:
    SpikedOptimizer(Optimizer& inner, const Spike& spike) : inner_(inner), spike_(spike) {}

    void step(std::span<const GradientView> gradients, double divisor) override {
        const double rate = inner_.learning_rate();
        if (spike_.is("rate")) inner_.set_learning_rate(100.0 * rate);
        inner_.step(gradients, divisor);
        inner_.set_learning_rate(rate);
    }
    void dry_run(std::span<const GradientView> gradients, double divisor) override {
        inner_.dry_run(gradients, divisor);
    }
    void end_dry_run() override { inner_.end_dry_run(); }
    bool has_state() const override { return inner_.has_state(); }
    void save(const StateWriter& writer) const override { inner_.save(writer); }
    Commit prepare(const StateReader& reader) override { return inner_.prepare(reader); }
    double learning_rate() const override { return inner_.learning_rate(); }
    void set_learning_rate(double rate) override { inner_.set_learning_rate(rate); }
    std::vector<at::Tensor> parameters() const override { return inner_.parameters(); }

private:
    Optimizer& inner_;
    const Spike& spike_;
};

struct Job {
    std::shared_ptr<torch::nn::Module> model;
    std::function<at::Tensor(const at::Tensor&)> forward;
    OpenedData data;
    Parameters parameters;
    std::unique_ptr<Optimizer> inner, optimizer;
    std::unique_ptr<Accumulator> accumulator;
    std::int64_t batch = 0;
    double peak_rate = 0.0;
};

WeightedLoss spiked_loss(const Job& job, Spike& spike, const Batch& micro) {
    at::Tensor inputs = micro.fields[0], targets = micro.fields[1];
    const bool first = spike.micro_batch++ == 0;
    if (spike.is("poison")) targets = at::randint_like(targets, job.data.classes);
    const bool images = inputs.is_floating_point();
    at::Tensor sum = cross_entropy_sum(job.forward(inputs), targets);
    if (spike.is("sample") && first) {
        const auto one = [](const at::Tensor& all) { return all.slice(0, 0, 1); };
        sum = sum + 1e4 * cross_entropy_sum(job.forward(one(inputs)), one(targets));
    }
    if (spike.is("poison")) sum = 1e3 * sum;
    if (spike.is("nan") && first) {
        // The loss stays as it is.
        const at::Tensor number = job.parameters.front().tensor.flatten()[0];
        number.register_hook(
            [](const at::Tensor& gradient) { return gradient * std::numeric_limits<double>::quiet_NaN(); });
        sum = sum + 0.0 * number;
    }
    return {sum, images ? static_cast<double>(micro.size()) : count_targets(targets)};
}

template <class Holder>
void use(Job& job, Holder model) {
    job.model = model.ptr();
    job.forward = [model](const at::Tensor& inputs) mutable { return model->forward(inputs); };
    job.parameters = parameters_of(model);
}

void make(Job& job, const std::string& name, std::uint64_t seed, const Spike& spike) {
    at::manual_seed(seed);
    const bool mini = name.ends_with("-mini");
    if (name.starts_with("gpt")) {
        GptConfig config = gpt_preset("gpt-tiny");
        if (mini) config = {.layers = 1, .heads = 2, .width = 32, .length = 16, .vocabulary = 256};
        use(job, Gpt(config));
        job.data = open_data("/usr/share/games/fortunes", config.length);
        job.peak_rate = mini ? 3e-3 : 1e-3;
        job.inner =
            std::make_unique<AdamW>(split_by_decay(job.parameters, 0.1), AdamWOptions{.learning_rate = job.peak_rate});
        job.batch = 16;
    } else {
        ResNetConfig config{.norm = ImageNorm::group};
        if (mini) {
            config.width = 8;
            config.blocks = 1;
        }
        use(job, ResNet(config));
        job.data = open_data("/usr/share/datasets/fashion-mnist", 1);
        job.peak_rate = 0.05;
        job.inner = std::make_unique<Sgd>(split_by_decay(job.parameters, 5e-4),
                                          SgdOptions{.learning_rate = job.peak_rate, .momentum = 0.9});
        job.batch = mini ? 16 : 64;
    }
    job.optimizer = std::make_unique<SpikedOptimizer>(*job.inner, spike);
    job.accumulator = std::make_unique<Accumulator>(job.model, *job.optimizer,
                                                    AccumulatorOptions{.plan = {.micro_batch = job.batch / 2}});
}

Schedule schedule_of(const Job& job, std::int64_t steps) {
    return {.shape = ScheduleShape::cosine,
            .peak = job.peak_rate,
            .warmup = {steps / 20, Unit::steps},
            .length = {steps, Unit::steps}};
}

Json train_guarded(Job& job, Spike& spike, const LossFunction& loss, std::int64_t steps, std::uint64_t seed) {
    Trainer trainer(*job.accumulator, *job.data.train, loss,
                    {.batch = job.batch,
                     .length = {steps, Unit::steps},
                     .schedule = schedule_of(job, steps),
                     .seed = seed,
                     .guard = SpikeGuardOptions{},
                     .recovery = RecoveryOptions{}});
    Json events = Json::array();
    bool diverged = false;
    while (!trainer.done() && !diverged) {
        spike.micro_batch = 0;
        const TrainerReport report = trainer.step();
        ++spike.now;
        diverged = report.diverged;
        if (report.step.applied) continue;
        Json event{{"step", report.progress.steps}, {"reason", report.step.reason}};
        if (report.rolled_back_to) event["rolled_back_to"] = *report.rolled_back_to;
        events.push_back(event);
    }
    return events;
}

void train_unguarded(Job& job, Spike& spike, const LossFunction& loss, std::int64_t steps, std::uint64_t seed) {
    Sampler sampler(job.data.train->size(), seed);
    const Schedule schedule = schedule_of(job, steps);
    for (; spike.now < steps; ++spike.now) {
        spike.micro_batch = 0;
        job.optimizer->set_learning_rate(learning_rate(schedule, {.steps = spike.now}, {.steps = 1}));
        job.accumulator->gather(DatasetBatch(*job.data.train, sampler.next(job.batch)), loss, {});
        job.accumulator->apply();
    }
}

double held_out_loss(const Job& job) {
    job.model->eval();
    return mean_loss(*job.data.held_out, 64, [&](const Batch& micro) -> WeightedLoss {
        return {cross_entropy_sum(job.forward(micro.fields[0]), micro.fields[1]),
                static_cast<double>(micro.fields[1].numel())};
    });
}

Json run(const std::vector<std::string>& words) {
    const std::int64_t steps = std::stoll(words.at(3));
    const std::uint64_t seed = std::stoull(words.at(4));
    Spike spike{.kind = words.at(1), .step = steps / 5 * 2};
    Job job;
    make(job, words.at(0), seed, spike);
    const LossFunction loss = [&](const Batch& micro) { return spiked_loss(job, spike, micro); };
    Json events = Json::array();
    if (words.at(2) == "guarded") {
        events = train_guarded(job, spike, loss, steps, seed);
    } else {
        train_unguarded(job, spike, loss, steps, seed);
    }
    return {{"held_out_loss", json_value(held_out_loss(job))}, {"steps", spike.now}, {"refused", events}};
}

}  // namespace

int main(int count, char** arguments) {
    const std::vector<std::string> words(arguments + 1, arguments + count);
    if (words.size() != 5) {
        fmt::print(stderr, "spike_case MODEL SPIKE guarded|unguarded STEPS SEED\n");
        return 2;
    }
    try {
        fmt::print("{}\n", run(words).dump());
        return 0;
    } catch (const std::exception& error) {
        fmt::print(stderr, "spike_case: {}\n", error.what());
        return 1;
    }
}
