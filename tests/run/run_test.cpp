#include "microbatch/run/run.h"

#include <ATen/ATen.h>
#include <gtest/gtest.h>
#include <torch/nn/modules/linear.h>

#include <fstream>
#include <limits>
#include <memory>
#include <string>

#include "microbatch/io/safetensors.h"
#include "microbatch/optim/sgd.h"
#include "microbatch/run/run_log.h"
#include "support/temp_folder.h"
#include "support/tensors.h"

namespace microbatch {
namespace {

class Rows final : public Dataset {
public:
    std::int64_t size() const override { return inputs_.size(0); }
    Batch get(std::span<const std::int64_t> indices) const override {
        const at::Tensor rows = test::tensor_of(at::IntArrayRef(indices.data(), indices.size()), at::kLong);
        const at::Tensor inputs = inputs_.index_select(0, rows);
        return {{inputs, inputs.sum(1, /*keepdim=*/true)}};
    }

private:
    at::Tensor inputs_ = (at::manual_seed(1), at::randn({40, 3}));
};

/// A job that is the same each time it is created, as in a new process.
struct Process {
    Rows data;
    torch::nn::Linear model{nullptr};
    std::unique_ptr<Sgd> optimizer;
    std::unique_ptr<Accumulator> accumulator;
    double loss_scale = 1.0;

    explicit Process(double learning_rate = 0.01) {
        at::manual_seed(2);
        model = torch::nn::Linear(3, 1);
        optimizer = std::make_unique<Sgd>(split_by_decay(parameters_of(model), 0.0),
                                          SgdOptions{.learning_rate = learning_rate, .momentum = 0.9});
        accumulator = std::make_unique<Accumulator>(model, *optimizer, AccumulatorOptions{.plan = {.micro_batch = 2}});
    }

    Outcome train(const std::filesystem::path& path, RunOptions options, bool resume = true) {
        RunFolder folder(path, resume);
        const LossFunction loss = [this](const Batch& micro) -> WeightedLoss {
            const at::Tensor error = model->forward(micro.fields[0]) - micro.fields[1];
            return {error.square().sum() * loss_scale, static_cast<double>(micro.size())};
        };
        Run run(folder, *accumulator, data, loss, std::move(options));
        return run.train();
    }
};

RunOptions of_steps(std::int64_t steps) {
    RunOptions options;
    options.trainer = {.batch = 7, .length = {steps, Unit::steps}};
    options.checkpoints.every = {2, Unit::steps};
    return options;
}

TEST(Run, ResumedAfterEveryMicroBatchMakesTheSameBits) {
    const test::TempFolder temp;
    Process whole;
    whole.train(temp.path() / "whole", of_steps(5));
    for (int stop_after = 1; stop_after < 16; ++stop_after) {
        const std::filesystem::path path = temp.path() / std::to_string(stop_after);
        int processes = 0;
        for (bool done = false; !done; ++processes) {
            Process process;
            RunOptions options = of_steps(5);
            int asked = 0;
            options.trainer.stop = [&] { return ++asked > stop_after; };
            done = !process.train(path, options).interrupted;
            ASSERT_LT(processes, 100);
        }
        EXPECT_EQ(test::read_file(path / "model.safetensors"),
                  test::read_file(temp.path() / "whole" / "model.safetensors"));
        const LoggedRun log = read_run_log(path), all = read_run_log(temp.path() / "whole");
        ASSERT_EQ(log.steps.size(), all.steps.size());
        for (std::size_t i = 0; i < all.steps.size(); ++i) {
            EXPECT_EQ(log.steps[i].loss, all.steps[i].loss);
            EXPECT_EQ(log.steps[i].gradient_norm, all.steps[i].gradient_norm);
        }
    }
}

TEST(Run, WritesItsConfigurationAndKeepsItsNotes) {
    const test::TempFolder temp;
    RunOptions options = of_steps(2);
    options.config = "batch = 7\n";
    options.notes.put("threads", std::int64_t{3});
    Process().train(temp.path() / "run", options);
    EXPECT_EQ(test::read_file(temp.path() / "run" / "config.toml"), "batch = 7\n");
    RunFolder folder(temp.path() / "run", /*resume=*/true);
    ASSERT_TRUE(folder.state());
    EXPECT_EQ(StateReader(*folder.state()).section("notes").count("threads"), 3);
}

TEST(Run, InAFolderThatHasARunIsRefusedUnlessItIsResumed) {
    const test::TempFolder temp;
    Process().train(temp.path() / "run", of_steps(2));
    EXPECT_THROW(RunFolder(temp.path() / "run"), Error);
    EXPECT_TRUE(RunFolder(temp.path() / "run", /*resume=*/true).state());
}

TEST(Run, DoesNotOverwriteWeightsThatNoCheckpointBelongsTo) {
    const test::TempFolder temp;
    std::filesystem::create_directories(temp.path() / "run");
    std::ofstream(temp.path() / "run" / "model.safetensors") << "somebody's";
    EXPECT_THROW(RunFolder(temp.path() / "run", /*resume=*/true), Error);
    EXPECT_EQ(test::read_file(temp.path() / "run" / "model.safetensors"), "somebody's");
}

TEST(Run, ThatDivergesDoesNotOverwriteTheWeightsOfTheFinishedRun) {
    const test::TempFolder temp;
    Process().train(temp.path() / "run", of_steps(4));
    const std::string weights = test::read_file(temp.path() / "run" / "model.safetensors");
    Process diverging;
    diverging.loss_scale = std::numeric_limits<double>::quiet_NaN();
    const Outcome outcome = diverging.train(temp.path() / "run", of_steps(40));
    EXPECT_TRUE(outcome.diverged());
    EXPECT_EQ(test::read_file(temp.path() / "run" / "model.safetensors"), weights);
}

TEST(Run, KeepsAHealthyCheckpointThroughStepsThatAreAllRefused) {
    const test::TempFolder temp;
    RunOptions options = of_steps(4);
    options.trainer.guard = SpikeGuardOptions{};
    Process().train(temp.path() / "run", options);
    options = of_steps(12);
    options.trainer.guard = SpikeGuardOptions{};
    options.checkpoints.every = {1, Unit::steps};
    Process refused;
    refused.loss_scale = std::numeric_limits<double>::quiet_NaN();
    refused.train(temp.path() / "run", options);
    RunFolder folder(temp.path() / "run", /*resume=*/true);
    EXPECT_GT(StateReader(*folder.state()).section("data").count("steps"), 4);
    ASSERT_TRUE(folder.use_healthy());
    EXPECT_EQ(StateReader(*folder.state()).section("data").count("steps"), 4);
}

TEST(Run, WithoutAHealthyCheckpointThereIsAWarningThatTheWeightsAreThoseOfADivergence) {
    const test::TempFolder temp;
    RunOptions options = of_steps(6);
    options.trainer.guard = SpikeGuardOptions{};
    Process refused;
    refused.loss_scale = std::numeric_limits<double>::quiet_NaN();
    refused.train(temp.path() / "run", options);
    RunFolder folder(temp.path() / "run", /*resume=*/true);
    EXPECT_FALSE(folder.use_healthy());
    ASSERT_EQ(folder.warnings().size(), 1U);
    EXPECT_NE(folder.warnings()[0].find("no checkpoint is from before the divergence"), std::string::npos);
}

/// A place in data that is read in order, as Rows are not.
struct Place final : Stateful {
    std::int64_t at = 0;

    void save(const StateWriter& writer) const override { writer.put("at", at); }
    Commit prepare(const StateReader& reader) override {
        return [this, next = reader.count("at")] { at = next; };
    }
};

TEST(Run, KeepsTheStateOfDataThatIsNotDrawnByIndexAlone) {
    const test::TempFolder temp;
    Place place;
    RunOptions options = of_steps(2);
    options.trainer.data_state = &place;
    place.at = 14;
    Process().train(temp.path() / "run", options);
    place.at = 0;
    options.trainer.length = {4, Unit::steps};
    Process().train(temp.path() / "run", options);
    EXPECT_EQ(place.at, 14);
}

TEST(Run, WhoseDataHasAStateIsNotResumedFromACheckpointWithoutOne) {
    const test::TempFolder temp;
    Process().train(temp.path() / "run", of_steps(2));
    Place place;
    RunOptions options = of_steps(4);
    options.trainer.data_state = &place;
    EXPECT_THROW(Process().train(temp.path() / "run", options), Error);
}

TEST(Run, ReportsMissingLinesOfTheLog) {
    const test::TempFolder temp;
    Process().train(temp.path() / "run", of_steps(4));
    std::filesystem::remove(temp.path() / "run" / "metrics.jsonl");
    RunFolder folder(temp.path() / "run", /*resume=*/true);
    Process process;
    microbatch::Run run(
        folder, *process.accumulator, process.data, [](const Batch&) { return WeightedLoss{}; }, of_steps(6));
    EXPECT_EQ(run.missing_lines(), 4);
}

}  // namespace
}  // namespace microbatch
