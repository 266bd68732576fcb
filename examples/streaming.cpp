// A loop that forms its own micro-batches, of sizes that it does not know beforehand: begin, add, finish, apply.
// Here the loss counts words of sentences of different lengths, so the micro-batches weigh differently.
#include <cmath>
#include <cstdio>
#include <string>

#include "microbatch/microbatch.h"

// apply() steps whatever the gradients are, so ask first. A comparison alone would let NaN pass.
std::string reason_to_refuse(const microbatch::Gathered& gathered) {
    const std::string reason = microbatch::FiniteGate().evaluate(gathered).reason;
    if (!reason.empty()) return reason;
    return gathered.gradient_norm > 1e3 ? "gradient norm too large" : "";
}

int main() {
    at::manual_seed(7);
    microbatch::Gpt model(microbatch::GptConfig{.layers = 1, .heads = 2, .width = 32, .length = 16, .vocabulary = 50});
    const auto parameters = microbatch::parameters_of(model);
    microbatch::AdamW optimizer(microbatch::split_by_decay(parameters, 0.0), {.learning_rate = 1e-2});
    microbatch::Accumulator accumulator(model, optimizer, {.clip_norm = 1.0});

    double first = 0.0, last = 0.0;
    int refused = 0;
    for (int step = 0; step < 60; ++step) {
        const double bad = step == 20 ? NAN : 1.0;  // one batch on the way is corrupted
        accumulator.begin();
        for (const std::int64_t length : {16, 5, 9}) {  // three micro-batches, 4 sentences each
            const at::Tensor words = at::arange(length + 1).add(step % 10).repeat({4, 1});
            const at::Tensor targets = words.narrow(1, 1, length);
            const at::Tensor logits = model->forward(words.narrow(1, 0, length));
            accumulator.add({bad * microbatch::cross_entropy_sum(logits, targets), microbatch::count_targets(targets)});
        }
        const std::string reason = reason_to_refuse(accumulator.finish());  // all is known, nothing has changed yet
        if (!reason.empty()) {
            accumulator.discard(reason);
            std::printf("step %d refused: %s\n", step, reason.c_str());
            ++refused;
            continue;
        }
        last = accumulator.apply().loss;
        if (step == 0) first = last;
    }
    std::printf("loss %.3f at the first step, %.3f at the last\n", first, last);
    return last < 0.5 * first && refused == 1 ? 0 : 1;
}
