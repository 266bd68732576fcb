// A whole run like those of the command: a folder with a log, checkpoints and weights, resumed wherever it was stopped.
#include <torch/nn/modules/linear.h>

#include <cstdio>
#include <filesystem>

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

// Trains until it is done, or for `most` steps; called again, it resumes.
microbatch::Outcome train(const std::filesystem::path& path, std::int64_t most) {
    const Squares data;
    at::manual_seed(2);
    torch::nn::Linear model(16, 1);
    const auto loss = [&model](const microbatch::Batch& micro) -> microbatch::WeightedLoss {
        const at::Tensor error = at::softplus(model->forward(micro.fields[0])) - micro.fields[1];
        return {error.square().sum(), static_cast<double>(micro.size())};
    };
    microbatch::AdamW optimizer(microbatch::split_by_decay(microbatch::parameters_of(model), 0.01));
    microbatch::Accumulator accumulator(model, optimizer, {.plan = {.micro_batch = 6}, .clip_norm = 1.0});

    microbatch::RunFolder folder(path, /*resume=*/true);  // locked against other processes
    std::int64_t asked = 0;                               // once before every micro-batch but a step's first
    microbatch::RunOptions options;
    options.trainer = {.batch = 32, .length = {60, microbatch::Unit::steps}, .guard = microbatch::SpikeGuardOptions{}};
    options.trainer.stop = [&] { return ++asked > 6 * most; };
    options.checkpoints.every = {10, microbatch::Unit::steps};
    microbatch::Run run(folder, accumulator, data, loss, options);
    return run.train();  // metrics.jsonl, events for TensorBoard, checkpoints/, model.safetensors
}

int main() {
    const auto folder = std::filesystem::temp_directory_path() / "microbatch-example-run";
    std::filesystem::remove_all(folder);
    const microbatch::Outcome whole = train(folder / "whole", 60);
    microbatch::Outcome ended;
    int processes = 0;
    do {
        ended = train(folder / "ended", 25);
        ++processes;
    } while (ended.interrupted);
    std::printf("loss %.9g, and of the run that took %d processes %.9g\n", whole.last.step.loss, processes,
                ended.last.step.loss);
    std::filesystem::remove_all(folder);
    return ended.last.step.loss == whole.last.step.loss && processes > 1 ? 0 : 1;
}
