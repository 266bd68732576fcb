#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <gtest/gtest.h>

#include <vector>

#include "microbatch/memory/budget_allocator.h"
#include "microbatch/models/gpt.h"
#include "microbatch/ops/cross_entropy.h"
#include "support/one_thread.h"

namespace microbatch {
namespace {

Gpt make(const GptConfig& config) {
    at::manual_seed(1);
    return Gpt(config);
}

at::Tensor random_tokens(const GptConfig& config) {
    return at::randint(0, config.vocabulary, {8, config.length}, at::kLong);
}

at::Tensor loss_on_tokens(Gpt& model, const at::Tensor& tokens) {
    return cross_entropy_sum(model->forward(tokens), tokens.roll(-1, 1));
}

TEST(GptRecompute, ChangesNoBitWithDropout) {
    const GptConfig config = {.layers = 3, .heads = 2, .width = 16, .length = 12, .vocabulary = 19, .dropout = 0.1};
    const auto train = [&](bool on) {
        Gpt model = make(config);
        model->set_recompute(on);
        EXPECT_EQ(model->recomputes(), on);
        std::vector<at::Tensor> all;
        for (int micro_batch = 0; micro_batch < 3; ++micro_batch) {
            const at::Tensor loss = loss_on_tokens(model, random_tokens(config));
            loss.backward();
            all.push_back(loss.detach());
        }
        for (const at::Tensor& parameter : model->parameters()) all.push_back(parameter.grad());
        all.push_back(at::rand({1}));  // the generator is where it would have been
        return all;
    };
    for (const int threads : {1, 2}) {
        at::set_num_threads(threads);
        const auto plain = train(false), recomputed = train(true);
        for (std::size_t i = 0; i < plain.size(); ++i) EXPECT_TRUE(at::equal(recomputed[i], plain[i])) << i;
    }
    at::set_num_threads(1);
}

TEST(GptRecompute, KeepsOneInputABlock) {
    install_budget_allocator();
    const auto peak = [](std::int64_t layers, bool on) {
        const GptConfig config = {.layers = layers, .heads = 2, .width = 32, .length = 64, .vocabulary = 16};
        Gpt model = make(config);
        model->set_recompute(on);
        const at::Tensor tokens = random_tokens(config);
        loss_on_tokens(model, tokens).backward();  // the gradients exist from now on
        const std::int64_t before = memory_use().live_bytes;
        reset_peak_memory();
        loss_on_tokens(model, tokens).backward();
        return static_cast<double>(memory_use().peak_bytes - before);
    };
    const double input_bytes = 8 * 64 * 32 * 4;
    const auto per_block = [&](bool on) { return (peak(12, on) - peak(4, on)) / 8 / input_bytes; };
    // The input, 3 of qkv, attention, what is between, 4 before gelu; 2 heads' and 4 norms' numbers for 32 wide tokens.
    EXPECT_NEAR(per_block(false), 10 + 6.0 / 32, 0.02);
    // The generator's 5 kB are another 0.08.
    EXPECT_NEAR(per_block(true), 1.08, 0.02);
}

}  // namespace
}  // namespace microbatch
