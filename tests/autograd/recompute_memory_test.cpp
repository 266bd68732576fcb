// The purpose of recompute: memory; and its state after memory runs out.
#include <ATen/ATen.h>
#include <c10/util/Exception.h>
#include <gtest/gtest.h>
#include <torch/nn/modules/linear.h>

#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "autograd/chain.h"
#include "microbatch/autograd/recompute.h"
#include "microbatch/memory/budget_allocator.h"

namespace microbatch {
namespace {

using namespace test;

/// With the budget allocator, whose bytes are exact.
class RecomputeMemory : public ::testing::Test {
protected:
    static void SetUpTestSuite() { install_budget_allocator(); }

    template <class Call>
    static std::int64_t growth(Call&& call) {
        const std::int64_t before = memory_use().live_bytes;
        reset_peak_memory();
        call();
        return memory_use().peak_bytes - before;
    }
};

TEST_F(RecomputeMemory, IsThatOfOneBlockAndTheInputsOfTheOthers) {
    const auto peak = [](bool on, int length) {
        const auto chain = make_chain(on, length);
        const at::Tensor x = at::randn({2000, width});
        chain->forward(x).sum().backward();  // the gradients exist from now on
        return growth([&] { chain->forward(x).sum().backward(); });
    };
    const double input_bytes = 2000.0 * width * 4;
    const auto per_block = [&](bool on) { return (peak(on, 24) - peak(on, 8)) / 16 / input_bytes; };
    // Kept in plain training: up, norm and tanh at twice the width, dropout's result and mask, the product with scale.
    EXPECT_GT(per_block(false), 6);
    EXPECT_NEAR(per_block(true), 1, 0.1);  // the rest is the generator's state and the buffers
}

TEST_F(RecomputeMemory, HoldsTheGradientOfOneParameterAtATime) {
    std::vector<std::shared_ptr<torch::nn::LinearImpl>> layers;
    const auto all = std::make_shared<torch::nn::Module>();
    for (int i = 0; i < 6; ++i) {
        layers.push_back(all->register_module(std::to_string(i), std::make_shared<torch::nn::LinearImpl>(512, 512)));
    }
    const auto block = [&](at::Tensor x) {
        for (const auto& layer : layers) x = layer->forward(x);
        return x;
    };
    const at::Tensor x = at::randn({1, 512});
    recompute(block, x, all).sum().backward();
    const std::int64_t one_weight = 512 * 512 * 4;
    EXPECT_LT(growth([&] { recompute(block, x, all).sum().backward(); }), 2 * one_weight);
}

TEST_F(RecomputeMemory, IsGivenBackWithEverythingElseAfterAnExceptionInTheSecondRun) {
    const auto chain = make_chain(true);
    const at::Tensor x = input();
    const std::int64_t live = memory_use().live_bytes;
    {
        const at::Tensor y = chain->forward(x).sum();
        chain->parts[1]->norm->eval();
        const Named before = traces(*chain);
        chain->parts[2]->fail = true;
        EXPECT_THROW(y.backward(), std::runtime_error);
        chain->parts[2]->fail = false;
        EXPECT_EQ(chain->parts[2]->runs, 2);
        expect_same_bits(traces(*chain), before);
        EXPECT_FALSE(chain->parts[1]->norm->is_training());
        EXPECT_TRUE(chain->parts[2]->norm->is_training());
    }
    EXPECT_EQ(memory_use().live_bytes, live);
}

TEST_F(RecomputeMemory, CanRunOutAnywhereWithoutATrace) {
    const auto chain = make_chain(true, 2);
    const at::Tensor x = at::randn({400, width}, at::TensorOptions().requires_grad(true));
    const auto clear = [&] {
        chain->zero_grad();
        x.mutable_grad() = at::Tensor();
    };
    const std::int64_t live = memory_use().live_bytes;
    int failures = 0;
    for (bool fits = false; !fits; clear()) {
        EXPECT_EQ(memory_use().live_bytes, live);
        const at::Tensor y = chain->forward(x).square().sum();
        const Named before = buffers_and_generator(*chain);
        try {
            const BudgetScope budget(memory_use().live_bytes + 1 + 4'000 * std::int64_t{failures});
            y.backward();
            fits = true;
        } catch (const c10::OutOfMemoryError&) {
            ++failures;
        }
        expect_same_bits(buffers_and_generator(*chain), before);
    }
    EXPECT_EQ(memory_use().live_bytes, live);
    EXPECT_GT(failures, 50);

    const auto gradients = [&](bool on) {
        const auto fresh = make_chain(on, 2);
        for (std::size_t i = 0; i < fresh->buffers().size(); ++i) fresh->buffers()[i].copy_(chain->buffers()[i]);
        Chain& used = on ? *chain : *fresh;
        at::manual_seed(9);
        used.forward(x).square().sum().backward();
        Named all = traces(used);
        clear();
        return all;
    };
    expect_same_bits(gradients(true), gradients(false));
}

}  // namespace
}  // namespace microbatch
