// A run that can be stopped at any instant: checkpoints are written in the background, and it resumes bit-for-bit.
#include <torch/nn/modules/container/sequential.h>
#include <torch/nn/modules/dropout.h>
#include <torch/nn/modules/linear.h>

#include <cstdio>
#include <filesystem>
#include <optional>

#include "microbatch/microbatch.h"

class Squares : public microbatch::Dataset {  // y is the mean of the squares of x
public:
    std::int64_t size() const override { return inputs_.size(0); }
    microbatch::Batch get(std::span<const std::int64_t> indices) const override {
        const at::Tensor rows = at::tensor(at::IntArrayRef(indices.data(), indices.size()), at::kLong);
        const at::Tensor inputs = inputs_.index_select(0, rows);
        return {{inputs, inputs.square().mean(1, /*keepdim=*/true)}};
    }

private:
    at::Tensor inputs_ = (at::manual_seed(1), at::randn({300, 16}));
};

// Trains until `most` more steps are made, or to the end: then it returns the last loss. Called again, it resumes.
std::optional<double> train(const std::filesystem::path& folder, std::int64_t most) {
    const Squares data;
    torch::nn::Sequential model(torch::nn::Linear(16, 64), torch::nn::Dropout(0.1), torch::nn::Linear(64, 1));
    const auto loss = [&model](const microbatch::Batch& micro) -> microbatch::WeightedLoss {
        return {(model->forward(micro.fields[0]) - micro.fields[1]).square().sum(), static_cast<double>(micro.size())};
    };
    const auto parameters = microbatch::parameters_of(model);
    microbatch::AdamW optimizer(microbatch::split_by_decay(parameters, 0.01), {.learning_rate = 1e-2});
    microbatch::Accumulator accumulator(model, optimizer, {.plan = {.micro_batch = 6}});
    microbatch::Trainer trainer(accumulator, data, loss, {.batch = 32, .length = {60, microbatch::Unit::steps}});

    microbatch::CheckpointStore store(folder);  // the newest three stay
    if (const auto newest = store.newest()) load(trainer, microbatch::StateReader(*newest));
    double last = 0.0;
    for (std::int64_t step = 0; step < most && !trainer.done(); ++step) {
        last = trainer.step().step.loss;
        // Copied here, written by a thread; one that is not finished yet is not waited for.
        if (trainer.progress().steps % 10 == 0 && !store.is_busy()) store.save(state_of(trainer));
        for (const std::string& warning : store.warnings()) std::fprintf(stderr, "%s\n", warning.c_str());
    }
    return trainer.done() ? std::optional(last) : std::nullopt;
}

int main() {
    const auto folder = std::filesystem::temp_directory_path() / "microbatch-example-checkpoints";
    std::filesystem::remove_all(folder);
    const std::optional<double> undisturbed = train(folder / "whole", 60);
    std::optional<double> ended;
    int processes = 0;
    for (; !ended; ++processes) ended = train(folder / "ended", 25);
    std::printf("loss at the end %.9g, and of the run that took %d processes %.9g\n", *undisturbed, processes, *ended);
    std::filesystem::remove_all(folder);
    return *ended == *undisturbed ? 0 : 1;
}
