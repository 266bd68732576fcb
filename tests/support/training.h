#pragma once

#include <ATen/ATen.h>
#include <torch/nn/modules/batchnorm.h>
#include <torch/nn/modules/container/sequential.h>
#include <torch/nn/modules/linear.h>
#include <torch/optim/adamw.h>
#include <torch/optim/sgd.h>

#include <bit>
#include <cstdint>
#include <filesystem>
#include <memory>
#include <optional>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "microbatch/io/state_json.h"
#include "microbatch/memory/budget_allocator.h"
#include "microbatch/optim/torch_optimizer.h"
#include "microbatch/run/trainer.h"
#include "support/device_memory.h"
#include "support/jobs.h"
#include "support/models.h"

namespace microbatch::test {

/// The options of a run: the same options give the same run.
struct TrainingOptions {
    std::string model = "mlp";        ///< or gpt, where the generator matters; resnet or norm, where the buffers do
    std::string optimizer = "adamw";  ///< or sgd; "torch adamw" and "torch sgd" are torch's own
    Plan plan = {.micro_batch = 3};
    TrainerOptions trainer = {.batch = 7, .length = {1000, Unit::steps}};
    std::set<std::int64_t> spikes = {};              ///< steps, from 0, whose loss is a thousand times what it is
    std::optional<std::int64_t> out_of_memory = {};  ///< before this step; install_budget_allocator() must have counted
    std::filesystem::path snapshots = {};            ///< every run has a folder of its own in it
};

/// A training run with all that belongs to it.
class Training {
public:
    explicit Training(const TrainingOptions& options)
        : options_(options), job_(make(options)), dataset_(job_.make_batch(23), options.model == "gpt" ? 4 : 1) {
        const bool torch_own = options.optimizer.starts_with("torch");
        if (torch_own) replace_optimizer();
        TrainerOptions how = options.trainer;
        if (how.recovery && !options.snapshots.empty()) {
            static int runs = 0;
            how.recovery->folder = options.snapshots / std::to_string(runs++);
            std::filesystem::create_directories(how.recovery->folder);
        }
        trainer_.emplace(*job_.accumulator, dataset_, loss(), std::move(how));
        at::manual_seed(4);
    }
    Training(const Training&) = delete;

    /// One that has nothing in common with another run of these options, until a state is loaded.
    static std::unique_ptr<Training> strange(const TrainingOptions& options) {
        auto run = std::make_unique<Training>(options);
        at::manual_seed(99);
        const at::NoGradGuard no_grad;
        for (const Parameter& one : run->job_.parameters) at::Tensor(one.tensor).normal_();
        for (at::Tensor& buffer : run->job_.model->buffers()) buffer.fill_(3);
        return run;
    }

    /// Resumes another run.
    static std::unique_ptr<Training> from(const TrainingOptions& options, const StateDict& state) {
        std::unique_ptr<Training> run = strange(options);
        load(run->trainer(), StateReader(state));
        return run;
    }

    Trainer& trainer() { return *trainer_; }
    Accumulator& accumulator() { return *job_.accumulator; }
    Optimizer& optimizer() { return *job_.optimizer; }
    Job& job() { return job_; }
    std::int64_t steps() const { return trainer_->progress().steps; }

    TrainerReport step() {
        if (options_.out_of_memory == steps()) fail_allocation(50);
        TrainerReport report = trainer_->step();
        fail_allocation(0);
        return report;
    }

    /// A copy of its state.
    StateDict taken_apart() const {
        StateDict state = state_of(*trainer_);
        state.own();
        return state;
    }

    /// All that a step changes, copied: parameters, buffers, the generator and the optimizer's state.
    Named state() const {
        Named result = job_.state();
        const StateDict optimizer = state_of(*job_.optimizer);
        for (const auto& [name, tensor] : optimizer.tensors()) result.push_back({name, tensor.get().clone()});
        return result;
    }

    /// Called with every micro-batch before its loss is computed.
    std::function<void()> before_loss = [] {};

private:
    static Job make(const TrainingOptions& options) {
        const std::string kind = options.optimizer.ends_with("sgd") ? "sgd" : "adamw";
        if (options.model == "gpt") {
            return gpt_job({.layers = 2, .heads = 2, .width = 8, .length = 4, .vocabulary = 16, .dropout = 0.2},
                           options.plan, kind);
        }
        if (options.model == "resnet") {
            return resnet_job({.classes = 3, .width = 8, .blocks = 1, .norm = ImageNorm::batch}, options.plan, kind);
        }
        if (options.model == "norm") return small_norm_job(options.plan, kind);
        return mlp_job({.inputs = 4, .layers = 1, .width = 5, .classes = 3}, options.plan, kind);
    }

    /// The smallest that has all kinds of tensors.
    static Job small_norm_job(const Plan& plan, const std::string& kind) {
        at::manual_seed(5);
        const auto batch = [](std::int64_t samples) -> Batch {
            const at::Tensor inputs = at::randn({samples, 3});
            return {{inputs, at::randint(2, {samples}, at::kLong)}};
        };
        torch::nn::Sequential model(torch::nn::Linear(3, 2), torch::nn::BatchNorm1d(2), torch::nn::Linear(2, 2));
        at::Tensor& weight = model->at<torch::nn::LinearImpl>(0).weight;
        weight.set_data(weight.detach().t().contiguous().t());  // not in row-major order
        return make_job(model, batch, kind, plan);
    }

    void replace_optimizer() {
        std::vector<at::Tensor> all;
        for (const Parameter& one : job_.parameters) all.push_back(one.tensor);
        if (options_.optimizer.ends_with("sgd")) {
            torch_ = std::make_unique<torch::optim::SGD>(all, torch::optim::SGDOptions(0.01).momentum(0.9));
        } else {
            torch_ = std::make_unique<torch::optim::AdamW>(all, torch::optim::AdamWOptions(1e-3).amsgrad(true));
        }
        job_.accumulator.reset();
        job_.optimizer = std::make_unique<TorchOptimizer>(*torch_);
        job_.accumulator = std::make_unique<Accumulator>(job_.model, *job_.optimizer,
                                                         AccumulatorOptions{.plan = options_.plan, .clip_norm = 1.0});
    }

    LossFunction loss() {
        return [this](const Batch& micro) -> WeightedLoss {
            before_loss();
            WeightedLoss result = job_.loss(micro);
            if (options_.spikes.contains(steps())) result.sum = result.sum * 1000;
            return result;
        };
    }

    TrainingOptions options_;
    std::unique_ptr<torch::optim::Optimizer> torch_;
    Job job_;
    TensorDataset dataset_;
    std::optional<Trainer> trainer_;
};

/// A step, and what it left.
struct Seen {
    TrainerReport report;
    Named state;
    std::string scalars;  ///< all else that the next step depends on
};

inline Seen see_step(Training& run) {
    Seen seen{run.step(), {}, {}};
    seen.state = run.state();
    seen.scalars = scalars_to_json(state_of(run.trainer()));
    return seen;
}

/// The same bits, but for what is time.
inline void expect_same(const TrainerReport& left, const TrainerReport& right) {
    const auto expect_double = [](double one, double other, const char* what) {
        EXPECT_EQ(std::bit_cast<std::uint64_t>(one), std::bit_cast<std::uint64_t>(other))
            << what << ' ' << one << " and " << other;
    };
    expect_double(left.step.loss, right.step.loss, "loss");
    expect_double(left.step.weight, right.step.weight, "weight");
    expect_double(left.step.gradient_norm, right.step.gradient_norm, "gradient norm");
    expect_double(left.step.learning_rate, right.step.learning_rate, "learning rate");
    ASSERT_EQ(left.step.noise.has_value(), right.step.noise.has_value());
    if (left.step.noise) {
        expect_double(left.step.noise->variance, right.step.noise->variance, "variance");
        expect_double(left.step.noise->squared_gradient, right.step.noise->squared_gradient, "squared gradient");
    }
    EXPECT_EQ(left.noise_batch, right.noise_batch);
    EXPECT_EQ(left.step.micro_batches, right.step.micro_batches);
    EXPECT_EQ(left.step.plan, right.step.plan);
    EXPECT_EQ(left.step.out_of_memory, right.step.out_of_memory);
    EXPECT_EQ(left.step.applied, right.step.applied);
    EXPECT_EQ(left.step.reason, right.step.reason);
    EXPECT_EQ(left.paused, right.paused);
    EXPECT_EQ(left.progress, right.progress);
    EXPECT_EQ(left.samples, right.samples);
    EXPECT_EQ(left.diverged, right.diverged);
    EXPECT_EQ(left.rolled_back_to, right.rolled_back_to);
    EXPECT_EQ(left.snapshot_bytes, right.snapshot_bytes);
    EXPECT_EQ(left.warning, right.warning);
}

inline void expect_same(const Seen& left, const Seen& right) {
    expect_same(left.report, right.report);
    expect_same_bits(left.state, right.state);
    EXPECT_EQ(left.scalars, right.scalars);
}

}  // namespace microbatch::test
