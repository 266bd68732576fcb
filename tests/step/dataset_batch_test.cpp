// Steps on samples that are loaded when needed.
#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include <vector>

#include "microbatch/data/batch_source.h"
#include "microbatch/memory/budget_allocator.h"
#include "microbatch/run/trainer.h"
#include "support/device_memory.h"
#include "support/errors.h"
#include "support/gradients.h"
#include "support/jobs.h"
#include "support/models.h"
#include "support/one_thread.h"
#include "support/tensors.h"

namespace microbatch {
namespace {

/// Rows of random tokens; counts the samples of the largest fetch.
class Tokens final : public Dataset {
public:
    explicit Tokens(std::int64_t length) : rows_(at::randint(64, {500, length}, at::kLong)) {}

    std::int64_t size() const override { return rows_.size(0); }
    std::int64_t longest_sample() const override { return 3; }
    Batch get(std::span<const std::int64_t> indices) const override {
        largest_fetch = std::max<std::int64_t>(largest_fetch, static_cast<std::int64_t>(indices.size()));
        if (fail_at > 0 && --fail_at == 0) throw std::runtime_error("the disk is gone");
        const at::Tensor index = test::tensor_of(at::ArrayRef<std::int64_t>(indices.data(), indices.size()), at::kLong);
        const at::Tensor rows = rows_.index_select(0, index);
        return {{rows, rows.roll(-1, 1)}};
    }

    mutable std::int64_t largest_fetch = 0;
    mutable std::int64_t fail_at = 0;

private:
    at::Tensor rows_;
};

GptConfig small_gpt() {
    return {.layers = 1, .heads = 2, .width = 16, .length = 16, .vocabulary = 64};
}

TEST(DatasetBatchSteps, GivesTheUpdateOfTheBatchThatIsThere) {
    const Tokens data(16);
    const std::vector<std::int64_t> indices{7, 3, 3, 499, 0};
    test::Job there = test::gpt_job(small_gpt(), {.micro_batch = 2});
    test::Job fetched = test::gpt_job(small_gpt(), {.micro_batch = 2});
    const StepReport expected = there.accumulator->step(data.get(indices), there.loss);
    const StepReport report = fetched.accumulator->step(DatasetBatch(data, indices), fetched.loss);
    EXPECT_EQ(report.loss, expected.loss);
    EXPECT_EQ(report.gradient_norm, expected.gradient_norm);
    EXPECT_EQ(report.micro_batches, 3);
    test::expect_same_bits(test::values_of(fetched.parameters), test::values_of(there.parameters));
}

TEST(DatasetBatchSteps, FetchesAMicroBatchAtATime) {
    const Tokens data(16);
    test::Job job = test::gpt_job(small_gpt(), {.micro_batch = 3});
    Trainer trainer(*job.accumulator, data, job.loss, {.batch = 20, .length = {2, Unit::steps}});
    while (!trainer.done()) EXPECT_EQ(trainer.step().step.micro_batches, 7);
    EXPECT_EQ(data.largest_fetch, 3);
}

TEST(DatasetBatchSteps, AFetchThatFailsUndoesTheStep) {
    const Tokens data(16);
    test::Job job = test::gpt_job(small_gpt(), {.micro_batch = 3}),
              other = test::gpt_job(small_gpt(), {.micro_batch = 3});
    Trainer trainer(*job.accumulator, data, job.loss, {.batch = 20, .length = {3, Unit::steps}});
    Trainer undisturbed(*other.accumulator, data, other.loss, {.batch = 20, .length = {3, Unit::steps}});
    data.fail_at = 4;
    EXPECT_THROW(trainer.step(), std::runtime_error);
    test::expect_no_gradients(job.parameters);
    while (!trainer.done()) trainer.step();
    while (!undisturbed.done()) undisturbed.step();
    test::expect_same_bits(test::values_of(job.parameters), test::values_of(other.parameters));
}

TEST(DatasetBatchSteps, ADatasetThatReturnsAnotherNumberOfSamplesIsAnErrorThatUndoesTheStep) {
    /// Drops the last sample of each fetch from some fetch on.
    struct Dropping final : Dataset {
        explicit Dropping(const Dataset& inner, int from) : inner_(inner), fetches_(from) {}
        std::int64_t size() const override { return inner_.size(); }
        Batch get(std::span<const std::int64_t> indices) const override {
            return inner_.get(fetches_-- > 0 ? indices : indices.first(indices.size() - 1));
        }

    private:
        const Dataset& inner_;
        mutable int fetches_;
    };
    const Tokens data(16);
    for (const int from : {0, 2}) {
        const Dropping dropping(data, from);
        test::Job job = test::gpt_job(small_gpt(), {.micro_batch = 3});
        const test::Named before = job.state();
        const DatasetBatch batch(dropping, {4, 5, 6, 7, 8, 9, 10, 11});
        test::expect_usage_error({"get()", "asked for"}, [&] { job.accumulator->step(batch, job.loss); });
        test::expect_same_bits(job.state(), before);
        test::expect_no_gradients(job.parameters);
        const Dropping other(data, from);
        test::expect_usage_error({"get()", "asked for 3 samples and returned 2"},
                                 [&] { mean_loss(other, 3, job.loss); });
    }
}

// Issue 4's bar: within 1 % from 2 micro-batches to 64, the batch's own samples included.
TEST(DatasetBatchSteps, ThePeakOfARunDoesNotGrowWithTheNumberOfMicroBatches) {
    install_budget_allocator();
    const Tokens data(16);
    double of_two = 0.0;
    for (const std::int64_t count : {2, 5, 64}) {
        test::Job job = test::gpt_job(small_gpt(), {.micro_batch = 4});
        Trainer trainer(*job.accumulator, data, job.loss, {.batch = 4 * count, .length = {3, Unit::steps}});
        test::reset_peak_memory();
        while (!trainer.done()) trainer.step();
        const auto peak = static_cast<double>(test::memory_use().peak_bytes);
        if (count == 2) of_two = peak;
        EXPECT_NEAR(peak, of_two, 0.01 * of_two) << count;
    }
}

TEST(DatasetBatchSteps, PlansWithTheLongestSample) {
    const Tokens data(16);
    const DatasetBatch batch = DatasetBatch::longest(data, 3);
    EXPECT_EQ(batch.size(), 3);
    const Batch wanted = data.get(std::vector<std::int64_t>{3, 3, 3});
    EXPECT_TRUE(at::equal(batch.fetch({0, 3}).fields[0], wanted.fields[0]));
    EXPECT_TRUE(at::equal(batch.fetch({1, 2}).fields[1], wanted.fields[1].narrow(0, 0, 1)));
    test::expect_usage_error({"0"}, [&] { DatasetBatch::longest(data, 0); });
    test::expect_usage_error({"-1"}, [&] { DatasetBatch::longest(data, -1); });
    EXPECT_EQ(DatasetBatch(data, {}).size(), 0);
}

}  // namespace
}  // namespace microbatch
