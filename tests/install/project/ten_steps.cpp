#include <microbatch/microbatch.h>

#include <cstdio>

int main() {
    at::manual_seed(1);
    microbatch::Mlp model(microbatch::MlpConfig{.inputs = 4, .layers = 1, .width = 16, .classes = 2});
    const at::Tensor inputs = at::randn({50, 4});
    const microbatch::Batch batch{{inputs, inputs.select(1, 0).gt(0).to(at::kLong)}};
    auto loss = [&model](const microbatch::Batch& micro) -> microbatch::WeightedLoss {
        return {microbatch::cross_entropy_sum(model->forward(micro.fields[0]), micro.fields[1]),
                static_cast<double>(micro.size())};
    };
    const auto parameters = microbatch::parameters_of(model);
    microbatch::AdamW optimizer(microbatch::split_by_decay(parameters, 0.01), {.learning_rate = 0.05});
    microbatch::Accumulator accumulator(parameters, optimizer, {.plan = {.micro_batch = 7}});
    double first = 0.0, last = 0.0;
    for (int step = 0; step < 10; ++step) {
        last = accumulator.step(batch, loss).loss;
        if (step == 0) first = last;
    }
    std::printf("loss %.4f -> %.4f\n", first, last);
    return last < 0.7 * first ? 0 : 1;
}
