// Your own module, data and loss: Microbatch only needs tensors.
#include <torch/nn/modules/linear.h>

#include <cstdio>

#include "microbatch/microbatch.h"

struct TwoLayersImpl : torch::nn::Module {
    torch::nn::Linear first = register_module("first", torch::nn::Linear(8, 64));
    torch::nn::Linear second = register_module("second", torch::nn::Linear(64, 1));
    at::Tensor forward(const at::Tensor& x) { return second(at::tanh(first(x))); }
};
TORCH_MODULE(TwoLayers);

int main() {
    at::manual_seed(7);
    const at::Tensor inputs = at::randn({100, 8});
    const microbatch::Batch batch{{inputs, inputs.square().sum(1, /*keepdim=*/true)}};  // one step: 100 samples

    TwoLayers model;
    auto loss = [&model](const microbatch::Batch& micro) -> microbatch::WeightedLoss {
        const at::Tensor error = model(micro.fields[0]) - micro.fields[1];
        return {error.square().sum(), static_cast<double>(micro.size())};  // the sum, and what it is averaged over
    };
    const microbatch::Verification check = microbatch::verify(*model, batch, loss, /*micro_batch=*/16);
    std::printf("the gradient %s on how the batch is split\n", check.ok() ? "does not depend" : "depends");

    const auto parameters = microbatch::parameters_of(model);
    microbatch::AdamW optimizer(microbatch::split_by_decay(parameters, 0.01), {.learning_rate = 1e-2});
    microbatch::Accumulator accumulator(model, optimizer, {.plan = {.micro_batch = 16}, .clip_norm = 10.0});
    const double first = accumulator.step(batch, loss).loss;  // six micro-batches of 16 and one of 4
    double last = first;
    for (int step = 1; step < 200; ++step) last = accumulator.step(batch, loss).loss;
    std::printf("loss %.3f at the first step, %.3f at the last\n", first, last);
    return check.ok() && last < 0.1 * first ? 0 : 1;
}
