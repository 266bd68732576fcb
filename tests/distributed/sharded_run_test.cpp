// Runs whose optimizer state is sharded: every rank writes its part of a checkpoint, and any number of ranks resumes it.

#include <ATen/ATen.h>
#include <gtest/gtest.h>
#include <torch/optim/adam.h>

#include <algorithm>
#include <fstream>
#include <set>

#include "microbatch/distributed/group_reducer.h"
#include "microbatch/io/safetensors.h"
#include "microbatch/optim/torch_optimizer.h"
#include "microbatch/run/follower.h"
#include "microbatch/run/run.h"
#include "microbatch/run/run_log.h"
#include "support/errors.h"
#include "support/jobs.h"
#include "support/rank_jobs.h"
#include "support/temp_folder.h"
#include "support/tensors.h"

namespace microbatch {
namespace {

using test::failures_of_ranks;
using test::making;

class Rows final : public Dataset {
public:
    std::int64_t size() const override { return inputs_.size(0); }
    Batch get(std::span<const std::int64_t> indices) const override {
        const at::Tensor rows = test::tensor_of(at::IntArrayRef(indices.data(), indices.size()), at::kLong);
        const at::Tensor inputs = inputs_.index_select(0, rows);
        return {{inputs, (inputs.sum(1) > 0).to(at::kLong)}};
    }

private:
    at::Tensor inputs_ = at::randn({40, 6}, test::generator(1), at::kDouble);
};

RunOptions of_steps(std::int64_t steps) {
    RunOptions options;
    options.trainer = {.batch = 7, .length = {steps, Unit::steps}};
    options.trainer.guard = SpikeGuardOptions{};
    options.trainer.recovery = RecoveryOptions{.every = 2, .margin = 1};
    options.checkpoints.every = {2, Unit::steps};
    return options;
}

struct RankRun {
    Rows data;
    std::optional<test::RankJob> rank;

    explicit RankRun(const std::shared_ptr<Reducer>& reducer, bool sharded = true) {
        const std::lock_guard lock(making());
        test::Job job = test::mlp_job({.inputs = 6, .layers = 2, .width = 8, .classes = 2});
        job.model->to(at::kDouble);
        rank.emplace(std::move(job), reducer, Plan{.micro_batch = 2}, sharded);
    }

    Outcome train(const std::filesystem::path& path, bool resume, RunOptions options) {
        RunFolder folder(path, resume);
        Run run(folder, *rank->accumulator, data, rank->job.loss, std::move(options));
        return run.train();
    }

    void use_torch_adam() {
        test::RankJob& own = *rank;
        adam.emplace(tensors_of(own.job.parameters));
        torch_optimizer.emplace(*adam);
        const std::shared_ptr<Reducer> reducer = own.reducer;
        own.accumulator = std::make_unique<Accumulator>(
            own.job.model, *torch_optimizer,
            AccumulatorOptions{
                .plan = {.micro_batch = 2}, .clip_norm = 1.0, .reducer = reducer, .shard_optimizer = true});
    }

    std::optional<torch::optim::Adam> adam;
    std::optional<TorchOptimizer> torch_optimizer;

    void follow(const std::filesystem::path& path, bool resume, const RunOptions& options) {
        RunFolder folder(path, resume, RunAccess::follows);
        microbatch::follow(*rank->accumulator, data, rank->job.loss, options.trainer, folder.state());
    }
};

using Meddle = std::function<void(RankRun&, RunOptions&)>;

/// A run over so many ranks, as a new process each.
std::vector<std::exception_ptr> failures_of_run(int size, const std::filesystem::path& path, const RunOptions& options,
                                                const Meddle& meddle) {
    const bool resume = std::filesystem::exists(path);
    return failures_of_ranks(size, [&](const std::shared_ptr<Group>& group) {
        RankRun run(size > 1 ? std::static_pointer_cast<Reducer>(std::make_shared<GroupReducer>(group))
                             : std::make_shared<LocalReducer>());
        RunOptions own = options;
        if (meddle) meddle(run, own);
        if (group->rank() > 0) return run.follow(path, resume, own);
        run.train(path, resume, own);
    });
}

void train_over(int size, const std::filesystem::path& path, const RunOptions& options, const Meddle& meddle = {}) {
    for (const auto& failure : failures_of_run(size, path, options, meddle)) {
        if (failure) std::rethrow_exception(failure);
    }
}

NamedTensors weights_in(const std::filesystem::path& run) {
    return read_safetensors(run / "model.safetensors");
}

std::set<std::string> files_of_newest(const std::filesystem::path& run) {
    std::filesystem::path newest;
    for (const auto& entry : std::filesystem::directory_iterator(run / "checkpoints")) {
        newest = std::max(newest, entry.path());
    }
    std::set<std::string> names;
    for (const auto& entry : std::filesystem::directory_iterator(newest)) names.insert(entry.path().filename());
    return names;
}

// AdamW in fp64: see ShardedOptimizer.MakesTheUpdatesOfOneProcess.
TEST(ShardedRun, IsResumedByAnyNumberOfProcesses) {
    const test::TempFolder temp;
    train_over(1, temp.path() / "alone", of_steps(15));
    const std::filesystem::path path = temp.path() / "run";
    std::int64_t steps = 0;
    for (const int size : {4, 1, 3, 2, 1}) {
        steps += 3;
        train_over(size, path, of_steps(steps));
        EXPECT_EQ(files_of_newest(path).contains("optimizer.1.safetensors"), size > 1);
        EXPECT_EQ(files_of_newest(path).contains("optimizer.3.safetensors"), size > 3);
    }
    test::expect_agree(weights_in(path), weights_in(temp.path() / "alone"), 1e-9);
}

TEST(ShardedRun, HasInItsCheckpointTheStateOfOneProcess) {
    const test::TempFolder temp;
    train_over(1, temp.path() / "alone", of_steps(5));
    train_over(3, temp.path() / "run", of_steps(5));
    RunFolder alone(temp.path() / "alone", /*resume=*/true), run(temp.path() / "run", /*resume=*/true);
    const auto names = [](const StateDict& state) {
        std::set<std::string> result;
        for (const auto& [name, tensor] : state.tensors()) result.insert(name);
        return result;
    };
    EXPECT_EQ(names(*alone.state()), names(*run.state()));
    EXPECT_TRUE(run.state()->has("recovery/1/optimizer/"));
    for (const auto& [name, tensor] : alone.state()->tensors()) {
        if (!name.starts_with("optimizer/")) continue;
        EXPECT_LE(test::relative_difference(run.state()->tensors().at(name).get(), tensor.get()), 1e-9) << name;
    }
}

// In two steps, the loss is a thousand times what it should be; `first` steps were made before.
Meddle spike(int first) {
    return [first](RankRun& run, RunOptions& own) {
        // Asked before every step, and in a single process between its four micro-batches too.
        const int times_a_step = run.rank->accumulator->reducer().size() == 1 ? 4 : 1;
        const auto asked = std::make_shared<int>(0);
        own.trainer.stop = [asked] { return ++*asked < 0; };
        run.rank->job.loss = [=, real = run.rank->job.loss](const Batch& micro) {
            WeightedLoss loss = real(micro);
            const int step = first + (*asked - 1) / times_a_step;
            if (step == 7 || step == 8) loss.sum = loss.sum * 1e3;
            return loss;
        };
    };
}

RunOptions guarded(std::int64_t steps) {
    RunOptions options = of_steps(steps);
    options.trainer.guard = SpikeGuardOptions{.window = 6, .least = 3, .most_refused = 1};
    return options;
}

void expect_rolled_back_alike(const std::filesystem::path& run, const std::filesystem::path& alone) {
    const auto steps = read_run_log(run).steps;
    EXPECT_TRUE(std::ranges::any_of(steps, [](const StepRecord& one) { return one.rolled_back_to.has_value(); }));
    test::expect_agree(weights_in(run), weights_in(alone), 1e-9);
}

TEST(ShardedRun, RollsBackOnAllWithTheStateOfEach) {
    const test::TempFolder temp;
    train_over(1, temp.path() / "alone", guarded(12), spike(0));
    train_over(3, temp.path() / "run", guarded(12), spike(0));
    expect_rolled_back_alike(temp.path() / "run", temp.path() / "alone");
}

TEST(ShardedRun, RollsBackToTheSnapshotsOfAnotherNumberOfProcesses) {
    for (const auto& [before, after] : {std::pair{1, 3}, std::pair{3, 1}, std::pair{3, 2}}) {
        const test::TempFolder temp;
        train_over(1, temp.path() / "alone", guarded(12), spike(0));
        train_over(before, temp.path() / "run", guarded(7));
        train_over(after, temp.path() / "run", guarded(12), spike(7));
        expect_rolled_back_alike(temp.path() / "run", temp.path() / "alone");
    }
}

// Its state has numbers beside tensors.
TEST(ShardedRun, OfATorchOptimizerIsResumedByAnyNumberOfProcesses) {
    const test::TempFolder temp;
    const auto use_torch = [](RankRun& run, RunOptions&) { run.use_torch_adam(); };
    RunOptions options = of_steps(8);
    options.trainer.guard.reset();
    options.trainer.recovery.reset();
    train_over(1, temp.path() / "alone", options, use_torch);
    for (const auto& [size, steps] : {std::pair{3, 3}, std::pair{2, 5}, std::pair{1, 8}}) {
        options.trainer.length.count = steps;
        train_over(size, temp.path() / "run", options, use_torch);
    }
    test::expect_agree(weights_in(temp.path() / "run"), weights_in(temp.path() / "alone"), 1e-9);
}

TEST(ShardedRun, IsRefusedIfThePartOfARankIsDamagedOrMissing) {
    const test::TempFolder temp;
    for (const bool missing : {true, false}) {
        const std::filesystem::path path = temp.path() / (missing ? "missing" : "damaged");
        RunOptions options = of_steps(2);
        options.checkpoints.every = {0, Unit::steps};
        train_over(3, path, options);
        const std::filesystem::path part = path / "checkpoints" / "step-00000002" / "optimizer.2.safetensors";
        ASSERT_TRUE(std::filesystem::exists(part));
        if (missing) {
            std::filesystem::remove(part);
        } else {
            std::fstream file(part, std::ios::in | std::ios::out);
            file.seekp(-3, std::ios::end);
            file.put('\x55');
        }
        test::expect_error(ErrorKind::bad_data, {"optimizer.2.safetensors"}, [&] { RunFolder(path, /*resume=*/true); });
    }
}

}  // namespace
}  // namespace microbatch
