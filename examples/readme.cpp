// The example of the README, verbatim between the two marks, with the data that the README omits.
#include <cstdio>

#include "microbatch/microbatch.h"

int main() {
    at::manual_seed(1);
    std::vector<microbatch::Batch> batches;
    for (int i = 0; i < 40; ++i) {
        const at::Tensor images = at::randn({100, 784});
        batches.push_back({{images, images.narrow(1, 0, 10).argmax(1)}});
    }

    // README begins
    microbatch::Mlp model(microbatch::MlpConfig{.inputs = 784, .classes = 10});  // or any torch::nn module
    const auto parameters = microbatch::parameters_of(model);
    microbatch::AdamW optimizer(microbatch::split_by_decay(parameters, 0.1), {.learning_rate = 1e-3});
    microbatch::Accumulator accumulator(model, optimizer, {.plan = {.micro_batch = 16}, .clip_norm = 1.0});

    auto loss = [&](const microbatch::Batch& micro) -> microbatch::WeightedLoss {
        const at::Tensor logits = model->forward(micro.fields[0]);
        return {microbatch::cross_entropy_sum(logits, micro.fields[1]),  // the sum over the micro-batch
                microbatch::count_targets(micro.fields[1])};             // and what it is averaged over
    };
    for (const microbatch::Batch& batch : batches) {  // 100 samples: six micro-batches of 16 and one of 4
        const microbatch::StepReport report = accumulator.step(batch, loss);
        std::printf("loss %.4f, gradient norm %.4f\n", report.loss, report.gradient_norm);
    }
    // README ends
    return accumulator.gather(batches.front(), loss).loss() < 2.0 ? 0 : 1;  // guessing gives ln 10 = 2.30
}
