// A step that runs out of memory is undone and repeated: its update equals that of the smaller micro-batch, bit for
// bit.
#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include <limits>
#include <map>
#include <stdexcept>
#include <vector>

#include "microbatch/core/error.h"
#include "microbatch/memory/budget_allocator.h"
#include "microbatch/model/recomputable.h"
#include "support/device_memory.h"
#include "support/errors.h"
#include "support/gradients.h"
#include "support/jobs.h"
#include "support/one_thread.h"

namespace microbatch {
namespace {

using test::Named;

using test::Job;

/// A job, and the batch that every step of it gets.
struct Trained {
    Job job;
    Batch batch;

    StepReport step() { return job.accumulator->step(batch, job.loss); }
};

Trained make_gpt(std::int64_t layers, double dropout, const Plan& plan) {
    Job job = test::gpt_job(
        {.layers = layers, .heads = 2, .width = 8, .length = 4, .vocabulary = 16, .dropout = dropout}, plan);
    Batch batch = job.make_batch(6);
    return {std::move(job), std::move(batch)};
}

Trained make_dropping_gpt(std::int64_t micro_batch) {
    return make_gpt(2, 0.2, {.micro_batch = micro_batch});
}

Trained make_recomputed_gpt(std::int64_t micro_batch) {
    return make_gpt(2, 0.2, {.micro_batch = micro_batch, .recompute = true});
}

/// Whose blocks are one operation each, with few allocations.
Trained make_fused_gpt(std::int64_t micro_batch) {
    return make_gpt(5, 0.0, {.micro_batch = micro_batch});
}

Trained make_resnet(std::int64_t micro_batch) {
    Job job = test::resnet_job({.classes = 3, .width = 8, .blocks = 1, .norm = ImageNorm::batch},
                               {.micro_batch = micro_batch});
    Batch batch = job.make_batch(6);
    return {std::move(job), std::move(batch)};
}

/// Whose blocks are one operation each.
Trained make_fused_resnet(std::int64_t micro_batch) {
    Job job = test::resnet_job({.classes = 3, .width = 8, .blocks = 1, .norm = ImageNorm::group},
                               {.micro_batch = micro_batch});
    Batch batch = job.make_batch(6);
    return {std::move(job), std::move(batch)};
}

using Make = Trained (*)(std::int64_t);

/// After one more step, so that the optimizer's state has shown itself.
Named after_one_more(Trained& trained) {
    EXPECT_TRUE(trained.step().applied);
    return trained.job.state();
}

struct Reference {
    Named after_step, after_all;
    std::int64_t live_bytes = 0;
};

/// The job run with a micro-batch from the step on that `before` others come before.
Reference run_uninjected(Make make, std::int64_t first_micro_batch, std::int64_t micro_batch, int before) {
    const std::int64_t live = test::memory_use().live_bytes;
    Trained trained = make(first_micro_batch);
    for (int i = 0; i < before; ++i) trained.step();
    const bool recompute = trained.job.accumulator->plan().recompute;
    trained.job.accumulator->set_plan({.micro_batch = micro_batch, .recompute = recompute});
    trained.step();
    Reference result;
    result.live_bytes = test::memory_use().live_bytes - live;
    result.after_step = trained.job.state();
    result.after_all = after_one_more(trained);
    return result;
}

class Transaction : public ::testing::Test {
protected:
    static void SetUpTestSuite() { install_budget_allocator(); }
    ~Transaction() override { test::fail_allocation(0); }

    // Out of memory at every allocation of the step that comes after `before` others, one after the other.
    void inject_everywhere(Make make, int before) {
        constexpr std::int64_t micro_batch = 4;
        std::map<std::int64_t, Reference> references;
        for (const std::int64_t size : {4, 2}) references[size] = run_uninjected(make, micro_batch, size, before);
        const std::int64_t live = test::memory_use().live_bytes;
        const std::int64_t allocations = count_allocations(make, micro_batch, before);
        for (std::int64_t n = 1; n <= allocations && !HasFailure(); ++n) {
            SCOPED_TRACE(::testing::Message() << "allocation " << n << " of " << allocations);
            Trained trained = make(micro_batch);
            for (int i = 0; i < before; ++i) trained.step();
            test::fail_allocation(n);
            const StepReport report = trained.step();
            test::fail_allocation(0);
            EXPECT_TRUE(report.applied);
            EXPECT_EQ(report.out_of_memory, 1);
            ++(report.plan.micro_batch == micro_batch ? in_apply_ : in_gather_);
            test::expect_no_gradients(trained.job.parameters);
            ASSERT_TRUE(references.contains(report.plan.micro_batch));
            const Reference& reference = references[report.plan.micro_batch];
            EXPECT_EQ(test::memory_use().live_bytes - live, reference.live_bytes);
            test::expect_same_bits(trained.job.state(), reference.after_step);
            test::expect_same_bits(after_one_more(trained), reference.after_all);
        }
        EXPECT_GT(in_gather_, 240);
        if (before == 0) {
            EXPECT_GT(in_apply_, 5);  // makes the optimizer's state
        } else {
            EXPECT_EQ(in_apply_, 0);  // has all it needs
        }
    }

    int in_gather_ = 0;
    int in_apply_ = 0;

private:
    static std::int64_t count_allocations(Make make, std::int64_t micro_batch, int before) {
        Trained trained = make(micro_batch);
        for (int i = 0; i < before; ++i) trained.step();
        const std::int64_t start = test::allocation_count();
        trained.step();
        return test::allocation_count() - start;
    }
};

TEST_F(Transaction, AFirstStepOfAGptRecoversWhereverItRunsOutOfMemory) {
    inject_everywhere(make_dropping_gpt, 0);
}

TEST_F(Transaction, ALaterStepOfAGptRecoversWhereverItRunsOutOfMemory) {
    inject_everywhere(make_dropping_gpt, 1);
}

TEST_F(Transaction, AFirstStepOfBlocksInOneOperationRecoversWhereverItRunsOutOfMemory) {
    inject_everywhere(make_fused_gpt, 0);
}

TEST_F(Transaction, ALaterStepOfBlocksInOneOperationRecoversWhereverItRunsOutOfMemory) {
    inject_everywhere(make_fused_gpt, 1);
}

TEST_F(Transaction, AStepOfAGptThatRecomputesRecoversWhereverItRunsOutOfMemory) {
    inject_everywhere(make_recomputed_gpt, 1);
}

TEST_F(Transaction, AFirstStepOfAResNetRecoversWhereverItRunsOutOfMemory) {
    inject_everywhere(make_resnet, 0);
}

TEST_F(Transaction, ALaterStepOfAResNetRecoversWhereverItRunsOutOfMemory) {
    inject_everywhere(make_resnet, 1);
}

TEST_F(Transaction, AFirstStepOfResidualBlocksInOneOperationRecoversWhereverItRunsOutOfMemory) {
    inject_everywhere(make_fused_resnet, 0);
}

TEST_F(Transaction, ALaterStepOfResidualBlocksInOneOperationRecoversWhereverItRunsOutOfMemory) {
    inject_everywhere(make_fused_resnet, 1);
}

// What a batch of some length needs: activations of a sample grow with it.
Trained make_long(std::int64_t micro_batch, std::int64_t length, std::int64_t samples) {
    Job job = test::gpt_job({.layers = 2, .heads = 2, .width = 32, .length = 64, .vocabulary = 64},
                            {.micro_batch = micro_batch});
    Batch batch = job.make_batch(samples);
    for (at::Tensor& field : batch.fields) field = field.narrow(1, 0, length).contiguous();
    return {std::move(job), std::move(batch)};
}

bool recomputes(const Trained& trained) {
    return dynamic_cast<const Recomputable&>(*trained.job.model).recomputes();
}

std::int64_t peak_of_step(Trained& trained) {
    trained.step();  // makes the optimizer's state
    test::reset_peak_memory();
    trained.step();
    return test::memory_use().peak_bytes;
}

TEST_F(Transaction, ALoweredBudgetMakesTheMicroBatchSmallerAndTheUpdateStaysTheSame) {
    Trained small = make_long(2, 64, 8);
    const std::int64_t needed =
        peak_of_step(small) - test::memory_use().live_bytes;  // above what is live between steps
    small.step();
    Trained large = make_long(2, 64, 8);
    large.step();
    large.step();
    large.job.accumulator->set_plan({.micro_batch = 8});
    {
        const test::BudgetScope budget(test::memory_use().live_bytes + needed);
        const StepReport report = large.step();
        EXPECT_EQ(report.plan.micro_batch, 2);
        EXPECT_EQ(report.micro_batches, 4);
        EXPECT_EQ(report.out_of_memory, 2);
        test::expect_same_bits(large.job.state(), small.job.state());
        EXPECT_EQ(large.step().out_of_memory, 0);  // remembered
    }
}

TEST_F(Transaction, RemembersByShape) {
    Trained trained = make_long(8, 64, 8);
    trained.step();
    Batch shorter = trained.batch, longest = trained.batch;
    for (at::Tensor& field : shorter.fields) field = field.narrow(1, 0, 8).contiguous();
    test::fail_allocation(50);
    EXPECT_EQ(trained.step().plan.micro_batch, 4);
    const auto run = [&](const Batch& batch) { return trained.job.accumulator->step(batch, trained.job.loss).plan; };
    EXPECT_EQ(run(shorter).micro_batch, 8);  // was never too long
    EXPECT_EQ(run(longest).micro_batch, 4);
    test::fail_allocation(50);
    EXPECT_EQ(run(shorter).micro_batch, 4);
    test::fail_allocation(0);
    EXPECT_EQ(run(longest).micro_batch, 4);  // a larger shape is not tried with more than a smaller one
    trained.job.accumulator->set_plan({.micro_batch = 8});
    EXPECT_EQ(run(longest).micro_batch, 8);  // a new plan forgets
}

TEST_F(Transaction, ABatchOfOddSizeIsHalvedDownToOne) {
    Trained trained = make_long(7, 16, 7);
    for (const std::int64_t expected : {3, 1}) {
        test::fail_allocation(50);
        EXPECT_EQ(trained.step().plan.micro_batch, expected);
    }
}

TEST_F(Transaction, AtAMicroBatchOfOneItRecomputesBeforeItGivesUp) {
    Trained trained = make_long(1, 16, 2);
    test::fail_allocation(50);
    const StepReport report = trained.step();
    EXPECT_TRUE(report.plan.recompute);
    EXPECT_EQ(report.plan.micro_batch, 1);
    EXPECT_TRUE(report.applied);
    EXPECT_TRUE(trained.step().plan.recompute);
}

TEST_F(Transaction, WhereNothingIsSmallEnoughItStopsWithTheStateIntact) {
    Trained trained = make_long(4, 64, 4);
    trained.step();
    const Named before = trained.job.state();
    const std::int64_t live = test::memory_use().live_bytes;
    {
        const test::BudgetScope budget(live + 10'000);
        test::expect_error(ErrorKind::does_not_fit, {"a micro-batch of 1 sample"}, [&] { trained.step(); });
        EXPECT_FALSE(recomputes(trained));
    }
    test::expect_same_bits(trained.job.state(), before);
    test::expect_no_gradients(trained.job.parameters);
    EXPECT_EQ(test::memory_use().live_bytes, live);
    const StepReport report = trained.step();  // with the budget back, by the plan as it was
    EXPECT_TRUE(report.applied);
    EXPECT_EQ(report.plan, trained.job.accumulator->plan());
}

TEST_F(Transaction, AModelThatCannotRunASmallerMicroBatchIsNotTiedToIt) {
    Trained trained = make_long(4, 16, 4);
    const LossFunction loss = [&](const Batch& micro) {
        if (micro.size() < 4) throw std::runtime_error("needs 4 samples\nand more words");
        return trained.job.loss(micro);
    };
    const Named before = trained.job.state();
    test::fail_allocation(50);
    test::expect_error(ErrorKind::does_not_fit, {"out of memory", "micro-batch of 2", "needs 4 samples"},
                       [&] { trained.job.accumulator->step(trained.batch, loss); });
    test::expect_same_bits(trained.job.state(), before);
    EXPECT_EQ(trained.job.accumulator->step(trained.batch, loss).plan.micro_batch, 4);
}

TEST_F(Transaction, EachBatchCountsItsOwnRetries) {
    Trained trained = make_long(4, 16, 4);
    test::fail_allocation(50);
    for (const std::int64_t expected : {1, 0, 0}) {
        trained.job.accumulator->gather(trained.batch, trained.job.loss);
        EXPECT_EQ(trained.job.accumulator->apply().out_of_memory, expected);
    }
}

TEST_F(Transaction, AStreamedBatchIsRunByThePlanNotByWhatABatchHadToShrinkTo) {
    Trained trained = make_long(1, 16, 2);
    test::fail_allocation(50);
    EXPECT_TRUE(trained.step().plan.recompute);
    trained.job.accumulator->begin();
    EXPECT_FALSE(recomputes(trained));
    trained.job.accumulator->add(trained.job.loss(trained.batch));
    trained.job.accumulator->finish();
    EXPECT_TRUE(trained.job.accumulator->apply().applied);
}

TEST_F(Transaction, ABatchThatIsNoBatchIsAUsageError) {
    Trained trained = make_long(1, 16, 2);
    test::expect_usage_error({"no dimension"},
                             [&] { trained.job.accumulator->step(Batch{{at::scalar_tensor(1)}}, trained.job.loss); });
}

/// Keeps a mask that grows to the size of what it sees.
struct Masked : torch::nn::Module {
    at::Tensor forward(const at::Tensor& x) {
        if (mask.numel() < x.size(1)) mask.resize_({x.size(1)}).fill_(1);
        return (x * weight * mask).sum();
    }
    at::Tensor weight = register_parameter("weight", at::ones({16}));
    at::Tensor mask = register_buffer("mask", at::zeros({0}));
};

TEST_F(Transaction, ABufferThatGrewIsPutBack) {
    Masked model;
    Sgd optimizer(split_by_decay(parameters_of(model), 0.0), {.learning_rate = 0.1});
    Accumulator accumulator(model, optimizer, {.plan = {.micro_batch = 2}});
    bool fail = true;
    const LossFunction loss = [&](const Batch& micro) -> WeightedLoss {
        const at::Tensor sum = model.forward(micro.fields[0]);
        if (fail) throw std::runtime_error("stop");
        return {sum, 1.0};
    };
    EXPECT_THROW(accumulator.step(Batch{{at::ones({2, 16})}}, loss), std::runtime_error);
    EXPECT_EQ(model.mask.numel(), 0);
    fail = false;
    EXPECT_TRUE(accumulator.step(Batch{{at::ones({2, 16})}}, loss).applied);
    EXPECT_EQ(model.mask.numel(), 16);
}

TEST_F(Transaction, AnOptimizerStepThatDoesNotFitIsNotTriedWithEverySmallerMicroBatch) {
    Trained trained = make_long(4, 8, 4);
    const Named before = trained.job.state();
    int calls = 0;
    const LossFunction loss = [&](const Batch& micro) {
        ++calls;
        return trained.job.loss(micro);
    };
    std::int64_t parameter_bytes = 0;
    for (const Parameter& parameter : trained.job.parameters) parameter_bytes += parameter.tensor.nbytes();
    // Room for gradients and activations, not for two moments.
    const test::BudgetScope budget(test::memory_use().live_bytes + 2 * parameter_bytes + parameter_bytes / 2);
    test::expect_error(ErrorKind::does_not_fit, {"the optimizer's step"},
                       [&] { trained.job.accumulator->step(trained.batch, loss); });
    EXPECT_EQ(calls, 2);
    test::expect_same_bits(trained.job.state(), before);
    EXPECT_FALSE(trained.job.optimizer->has_state());
}

TEST_F(Transaction, AnythingElseThatThrowsIsUndoneAndPassedOn) {
    Trained trained = make_resnet(2);
    trained.step();
    const Named before = trained.job.state();
    int calls = 0;
    const LossFunction loss = [&](const Batch& micro) -> WeightedLoss {
        at::rand({1});
        if (++calls == 3) throw std::runtime_error("the disk is gone");
        return trained.job.loss(micro);
    };
    EXPECT_THROW(trained.job.accumulator->step(trained.batch, loss), std::runtime_error);
    EXPECT_EQ(calls, 3);  // run once, and not again
    test::expect_same_bits(trained.job.state(), before);
    test::expect_no_gradients(trained.job.parameters);
}

TEST_F(Transaction, ARefusedStepLeavesTheBatchStatisticsAlone) {
    Trained trained = make_resnet(2);
    trained.step();
    const Named before = trained.job.state();
    Batch poisoned = trained.batch;
    poisoned.fields[0] = poisoned.fields[0] * std::numeric_limits<float>::quiet_NaN();
    EXPECT_FALSE(trained.job.accumulator->step(poisoned, trained.job.loss).applied);
    test::expect_same_bits(trained.job.state(), before);
}

}  // namespace
}  // namespace microbatch
