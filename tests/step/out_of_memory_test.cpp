// A budget that runs out anywhere in a step: the step leaves no trace, and the next one is not affected.
#include <ATen/ops/randn.h>
#include <c10/util/Exception.h>
#include <gtest/gtest.h>
#include <torch/nn/modules/linear.h>

#include "microbatch/analysis/gradient_variance.h"
#include "microbatch/analysis/verify.h"
#include "microbatch/core/error.h"
#include "microbatch/memory/budget_allocator.h"
#include "microbatch/optim/sgd.h"
#include "microbatch/step/accumulator.h"
#include "support/device_memory.h"
#include "support/gradients.h"
#include "support/one_thread.h"

namespace microbatch {
namespace {

class OutOfMemory : public ::testing::Test {
protected:
    static void SetUpTestSuite() { install_budget_allocator(); }

    OutOfMemory() {
        batch.fields = {at::randn({6, 512})};
        loss = [this](const Batch& micro) -> WeightedLoss {
            return {model->forward(micro.fields[0]).square().sum(), static_cast<double>(micro.size())};
        };
    }

    // Tries the call with every budget from what is live now up, in small steps, until one is enough.
    template <class Call>
    int failures_until_it_fits(Call call) {
        const std::int64_t live = test::memory_use().live_bytes;
        for (int failures = 0;; ++failures) {
            const test::BudgetScope budget(live + 1 + 20'000 * std::int64_t{failures});
            bool failed = false;
            try {
                call();
            } catch (const c10::OutOfMemoryError&) {
                failed = true;
            } catch (const Error& error) {
                EXPECT_EQ(error.kind(), ErrorKind::does_not_fit) << error.what();
                failed = true;
            }
            if (!failed) return failures;
            for (const at::Tensor& parameter : model->parameters()) EXPECT_FALSE(parameter.grad().defined());
            EXPECT_EQ(test::memory_use().live_bytes, live);
        }
    }

    torch::nn::Linear model{512, 512};
    Batch batch;
    LossFunction loss;
};

TEST_F(OutOfMemory, LeavesNoGradientWhereverItStrikes) {
    const Parameters parameters = parameters_of(model);
    Sgd optimizer(split_by_decay(parameters, 0.0), {.learning_rate = 0.0});
    Accumulator accumulator(parameters, optimizer, {.plan = {.micro_batch = 4}});
    EXPECT_GT(failures_until_it_fits([&] { accumulator.step(batch, loss); }), 50);
    EXPECT_TRUE(accumulator.step(batch, loss).applied);
}

TEST_F(OutOfMemory, LeavesNoTraceOfVerify) {
    EXPECT_GT(failures_until_it_fits([&] { EXPECT_TRUE(verify(*model, batch, loss, 4).ok()); }), 50);
}

TEST_F(OutOfMemory, LeavesNoTraceOfAVariance) {
    const auto next = [&] { return batch; };
    EXPECT_GT(failures_until_it_fits([&] { gradient_variance(parameters_of(model), 2, next, {}, loss); }), 50);
}

}  // namespace
}  // namespace microbatch
