// A partial batch is a value: it knows which batch it belongs to, and can be copied.
#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include <stdexcept>
#include <utility>

#include "microbatch/memory/budget_allocator.h"
#include "support/device_memory.h"
#include "support/errors.h"
#include "support/gradients.h"
#include "support/jobs.h"
#include "support/models.h"
#include "support/one_thread.h"

namespace microbatch {
namespace {

using namespace test;

Job small_job() {
    return mlp_job({.inputs = 4, .layers = 1, .width = 5, .classes = 3}, {.micro_batch = 3});
}

Job norm_job() {
    return resnet_job({.classes = 3, .width = 8, .blocks = 1, .norm = ImageNorm::batch}, {.micro_batch = 3});
}

/// A step of a batch of 7 in 3, 2 and 2, left after so many of them.
PartialBatch left(Job& job, const Batch& batch, int after = 1) {
    StepReport report = job.accumulator->step(batch, job.loss, {.stop = [&] { return --after == 0; }});
    EXPECT_FALSE(report.applied);
    return std::move(report.partial).value();
}

TEST(PartialBatch, IsRefusedByAnotherBatchAndNothingHasChanged) {
    Job job = norm_job();
    const Batch batch = job.make_batch(7), another = job.make_batch(7);
    const PartialBatch partial = left(job, batch);
    EXPECT_EQ(partial.samples, 3);
    Batch changed = batch;
    changed.fields[0] = batch.fields[0].clone();
    changed.fields[0].view({-1})[0].add_(1);
    const Named before = job.state();
    const TensorDataset data(batch);
    const LossFunction never = [](const Batch&) -> WeightedLoss { throw std::runtime_error("called"); };
    const auto refused = [&](const BatchSource& other) {
        expect_usage_error({"partial batch", "another batch"},
                           [&] { job.accumulator->step(other, never, {.partial = partial}); });
        expect_usage_error({"partial batch"}, [&] { job.accumulator->gather(other, never, {.partial = partial}); });
        expect_same_bits(job.state(), before);
        expect_no_gradients(job.parameters);
    };
    refused(TensorBatch(changed));
    refused(TensorBatch(batch.slice(0, 6)));
    refused(TensorBatch(batch.slice(0, 3)));
    refused(TensorBatch(another));
    refused(DatasetBatch(data, {0, 1, 2, 3, 4, 5, 6}));
    EXPECT_TRUE(job.accumulator->step(batch, job.loss, {.partial = partial}).applied);
}

TEST(PartialBatch, OfOtherParametersIsRefused) {
    Job job = small_job(), other = small_job();
    const Batch batch = job.make_batch(7);
    PartialBatch partial = left(job, batch);
    const Named before = other.state();
    expect_usage_error({"other parameters"}, [&] { other.accumulator->step(batch, other.loss, {.partial = partial}); });
    expect_same_bits(other.state(), before);
    partial.so_far.sums[0].sum = at::zeros({1});
    expect_usage_error({"other parameters"}, [&] { job.accumulator->step(batch, job.loss, {.partial = partial}); });
    partial.samples = 7;
    expect_usage_error({"another batch"}, [&] { job.accumulator->step(batch, job.loss, {.partial = partial}); });
}

TEST(PartialBatch, IsAValueThatCanBeResumedAgainFromACopy) {
    for (const int after : {1, 2}) {
        Job job = small_job(), wanted = small_job();
        const Batch batch = job.make_batch(7);
        const StepReport expected = wanted.accumulator->step(batch, wanted.loss);
        const PartialBatch partial = left(job, batch, after);
        int calls = after;
        const LossFunction fails = [&](const Batch& micro) {
            if (++calls == 3) throw std::runtime_error("the disk is gone");
            return job.loss(micro);
        };
        EXPECT_THROW(job.accumulator->step(batch, fails, {.partial = partial}), std::runtime_error);
        const StepReport report = job.accumulator->step(batch, job.loss, {.partial = partial});
        EXPECT_EQ(report.gradient_norm, expected.gradient_norm);
        EXPECT_EQ(report.loss, expected.loss);
        expect_same_bits(values_of(job.parameters), values_of(wanted.parameters));
    }
}

TEST(PartialBatch, TellsHowOftenItRanOutOfMemoryBeforeItWasLeft) {
    install_budget_allocator();
    Job job = small_job();
    const Batch batch = job.make_batch(7);
    int asked = 0;
    test::fail_allocation(15);
    StepReport report = job.accumulator->step(batch, job.loss, {.stop = [&] { return ++asked == 2; }});
    test::fail_allocation(0);
    ASSERT_TRUE(report.partial);
    EXPECT_EQ(report.out_of_memory, 1);
    EXPECT_EQ(report.partial->plan.micro_batch, 1);
    job.accumulator->set_plan({.micro_batch = 3});  // forgets
    report = job.accumulator->step(batch, job.loss, {.partial = std::move(report.partial)});
    EXPECT_TRUE(report.applied);
    EXPECT_EQ(report.out_of_memory, 1);
    EXPECT_EQ(report.micro_batches, 7);  // the plan that it needed is kept for the rest
}

}  // namespace
}  // namespace microbatch
