// Smaller plans that samples of some shapes needed apply only to those samples.
#include "microbatch/step/micro_batch_caps.h"

#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <memory>
#include <numeric>
#include <string>
#include <vector>

#include "microbatch/io/state_json.h"
#include "microbatch/memory/budget_allocator.h"
#include "microbatch/model/recomputable.h"
#include "support/device_memory.h"
#include "support/errors.h"
#include "support/gradients.h"
#include "support/jobs.h"
#include "support/one_thread.h"
#include "support/states.h"
#include "support/tensors.h"

namespace microbatch {
namespace {

using namespace test;

const SampleShape longer{{16}, {16}}, shorter{{4}, {4}};

TEST(SampleShape, IsThatOfOneSampleFieldByField) {
    EXPECT_EQ(shape_of({{at::zeros({7, 3, 2}), at::zeros({7}), at::zeros({7, 5})}}), (SampleShape{{3, 2}, {}, {5}}));
    EXPECT_EQ(shape_of({}), SampleShape{});
}

TEST(MicroBatchCaps, HoldForTheShapeAndLargerOnes) {
    MicroBatchCaps caps;
    EXPECT_TRUE(caps.empty());
    const Plan plan{.micro_batch = 8};
    EXPECT_EQ(caps.within(plan, longer), plan);
    caps.remember(longer, {.micro_batch = 2, .recompute = true});
    EXPECT_EQ(caps.within(plan, longer), (Plan{.micro_batch = 2, .recompute = true}));
    EXPECT_EQ(caps.within(plan, {{16}, {17}}), (Plan{.micro_batch = 2, .recompute = true}));
    EXPECT_EQ(caps.within({.micro_batch = 1}, longer), (Plan{.micro_batch = 1, .recompute = true}));
    for (const SampleShape& other : {shorter, SampleShape{{16}, {15}}, SampleShape{{16}}, SampleShape{{16}, {16}, {1}},
                                     SampleShape{{16, 1}, {16}}, SampleShape{}}) {
        EXPECT_EQ(caps.within(plan, other), plan);
    }
    caps.clear();
    EXPECT_EQ(caps.within(plan, longer), plan);
}

TEST(MicroBatchCaps, OfSeveralShapesAddUp) {
    MicroBatchCaps caps;
    caps.remember(shorter, {.micro_batch = 4});
    caps.remember(longer, {.micro_batch = 1, .recompute = true});
    EXPECT_EQ(caps.within({.micro_batch = 8}, shorter), (Plan{.micro_batch = 4}));
    EXPECT_EQ(caps.within({.micro_batch = 8}, {{8}, {8}}), (Plan{.micro_batch = 4}));
    EXPECT_EQ(caps.within({.micro_batch = 8}, longer), (Plan{.micro_batch = 1, .recompute = true}));
}

TEST(MicroBatchCaps, AreAsManyAsTheShapesAreDifferent) {
    MicroBatchCaps caps;
    for (const std::int64_t size : {32, 16, 8, 4, 2, 1}) caps.remember(longer, {.micro_batch = size});
    EXPECT_EQ(StateReader(state_of(caps)).count("caps"), 1);
    caps.remember(shorter, {.micro_batch = 1});  // implies the one of the longer
    EXPECT_EQ(StateReader(state_of(caps)).count("caps"), 1);
    caps.remember(longer, {.micro_batch = 1, .recompute = true});
    EXPECT_EQ(StateReader(state_of(caps)).count("caps"), 2);
    caps.remember({}, {.micro_batch = 1, .recompute = true});  // of all
    EXPECT_EQ(StateReader(state_of(caps)).count("caps"), 1);
    EXPECT_EQ(caps.within({.micro_batch = 8}, {{1}, {1}}), (Plan{.micro_batch = 1, .recompute = true}));
}

TEST(MicroBatchCaps, AreSavedAndLoadedAlsoThroughJson) {
    MicroBatchCaps caps, other;
    caps.remember({{3, 2}, {}}, {.micro_batch = 4});
    caps.remember(longer, {.micro_batch = 1, .recompute = true});
    StateDict read;
    read_scalars(scalars_to_json(state_of(caps)), "state.json", read);
    other.remember(shorter, {.micro_batch = 1});
    load(other, StateReader(read));
    expect_same(state_of(other), state_of(caps));
    EXPECT_EQ(other.within({.micro_batch = 8}, shorter), (Plan{.micro_batch = 8}));
}

TEST(MicroBatchCaps, AStateThatTheyCannotHaveIsRefusedAndChangesNothing) {
    MicroBatchCaps caps;
    caps.remember(longer, {.micro_batch = 2});
    const StateDict good = state_of(caps);
    const auto refused = [&](const std::vector<std::string>& words, const StateDict& state) {
        expect_error(ErrorKind::bad_data, words, [&] { caps.prepare(StateReader(state)); });
        expect_same(state_of(caps), good);
    };
    const auto set = [&](const char* name, const StateScalar& value) { return with(good, name, value); };
    for (const auto& [name, value] : good.scalars()) refused({name, "missing"}, without(good, name));
    refused({"caps", "-1"}, set("caps", std::int64_t{-1}));
    refused({"caps"}, set("caps", std::int64_t{1} << 60));  // allocates no memory for them
    refused({"1/"}, set("caps", std::int64_t{2}));
    refused({"0/micro_batch", "0"}, set("0/micro_batch", std::int64_t{0}));
    refused({"0/recompute"}, set("0/recompute", std::int64_t{1}));
    refused({"0/fields"}, set("0/fields", std::int64_t{1} << 60));
    refused({"0/2", "missing"}, set("0/fields", std::int64_t{3}));
    refused({"0/0", "-16"}, set("0/0", std::vector<std::int64_t>{-16}));
}

/// Token samples of two lengths: the first `short_ones` are of 4 tokens, the others of 16; a fetch is padded to its
/// longest.
class TwoLengths final : public Dataset {
public:
    explicit TwoLengths(std::int64_t short_ones) : short_ones_(short_ones) {
        at::manual_seed(1);
        tokens_ = at::randint(16, {12, 16}, at::kLong);
    }

    std::int64_t size() const override { return tokens_.size(0); }
    Batch get(std::span<const std::int64_t> indices) const override {
        const bool all_short =
            std::all_of(indices.begin(), indices.end(), [this](std::int64_t index) { return index < short_ones_; });
        const at::Tensor rows = tokens_.index_select(
            0, test::tensor_of(at::ArrayRef<std::int64_t>(indices.data(), indices.size()), at::kLong));
        const at::Tensor inputs = rows.narrow(1, 0, all_short ? 4 : 16).contiguous();
        return {{inputs, inputs.roll(-1, 1)}};
    }

private:
    std::int64_t short_ones_;
    at::Tensor tokens_;
};

Job make(const Plan& plan) {
    return gpt_job({.layers = 1, .heads = 2, .width = 8, .length = 16, .vocabulary = 16, .dropout = 0.2}, plan);
}

using Sizes = std::vector<std::int64_t>;

/// Long samples for which the model is too large, unless they come alone (or, `alone` false, are recomputed).
struct Tight {
    Job& job;
    bool alone = true;
    Sizes sizes = {};                   // of the micro-batches that were run in the last attempt
    std::vector<bool> recomputed = {};  // and whether their blocks were recomputed

    LossFunction loss() {
        return [this](const Batch& micro) {
            const bool recomputes = dynamic_cast<const Recomputable&>(*job.model).recomputes();
            const bool is_long = micro.fields[0].size(1) > 4;
            if (is_long && (micro.size() > 1 || (!alone && !recomputes))) {
                sizes.clear();
                recomputed.clear();
                test::fail_allocation(1);
            } else {
                sizes.push_back(micro.size());
                recomputed.push_back(recomputes);
            }
            return job.loss(micro);
        };
    }
};

class CapsWithinABatch : public ::testing::Test {
protected:
    static void SetUpTestSuite() { install_budget_allocator(); }
    ~CapsWithinABatch() override { test::fail_allocation(0); }
};

std::vector<std::int64_t> first(std::int64_t count) {
    std::vector<std::int64_t> indices(static_cast<std::size_t>(count));
    std::iota(indices.begin(), indices.end(), 0);
    return indices;
}

/// What a loop that cuts the batch itself into these micro-batches makes of a job.
void stream(Job& job, const Dataset& data, const Sizes& sizes) {
    job.accumulator->begin();
    std::int64_t begin = 0;
    for (const std::int64_t size : sizes) {
        const DatasetBatch batch(data, first(begin + size));
        job.accumulator->add(job.loss(batch.fetch({begin, begin + size})));
        begin += size;
    }
    job.accumulator->finish();
    EXPECT_TRUE(job.accumulator->apply().applied);
}

TEST_F(CapsWithinABatch, ShortSamplesKeepTheLargerMicroBatchAndTheUpdateHasTheBitsOfThatCut) {
    const TwoLengths data(8);
    Job job = make({.micro_batch = 4}), other = make({.micro_batch = 4});
    Tight tight{job};
    const DatasetBatch batch(data, first(12));
    at::manual_seed(5);
    StepReport report = job.accumulator->step(batch, tight.loss());
    EXPECT_TRUE(report.applied);
    EXPECT_EQ(tight.sizes, (Sizes{4, 4, 1, 1, 1, 1}));
    EXPECT_EQ(report.micro_batches, 6);
    EXPECT_EQ(report.out_of_memory, 2);  // 4, then 2
    EXPECT_EQ(report.plan.micro_batch, 1);
    at::manual_seed(5);
    stream(other, data, {4, 4, 1, 1, 1, 1});
    expect_same_bits(job.state(), other.state());
    // Remembered: the next batch does not run out of memory, and one of short samples is not split at all.
    at::manual_seed(6);
    tight.sizes.clear();
    report = job.accumulator->step(batch, tight.loss());
    EXPECT_EQ(report.out_of_memory, 0);
    EXPECT_EQ(tight.sizes, (Sizes{4, 4, 1, 1, 1, 1}));
    tight.sizes.clear();
    report = job.accumulator->step(DatasetBatch(data, first(8)), tight.loss());
    EXPECT_EQ(tight.sizes, (Sizes{4, 4}));
    EXPECT_EQ(report.plan.micro_batch, 4);
    at::manual_seed(6);
    stream(other, data, {4, 4, 1, 1, 1, 1});
    stream(other, data, {4, 4});
    expect_same_bits(job.state(), other.state());
}

TEST_F(CapsWithinABatch, OnlyLongSamplesAreRecomputed) {
    const TwoLengths data(4);
    Job job = make({.micro_batch = 1}), other = make({.micro_batch = 1});
    Tight tight{job, /*alone=*/false};
    at::manual_seed(5);
    const StepReport report = job.accumulator->step(DatasetBatch(data, first(6)), tight.loss());
    EXPECT_EQ(report.out_of_memory, 1);
    EXPECT_TRUE(report.plan.recompute);
    EXPECT_EQ(tight.recomputed, (std::vector<bool>{false, false, false, false, true, true}));
    at::manual_seed(5);
    stream(other, data, {1, 1, 1, 1, 1, 1});
    expect_same_bits(job.state(), other.state());  // recompute keeps every bit
}

TEST_F(CapsWithinABatch, AShortSampleThatIsPaddedToALongOneIsRunAsOne) {
    const TwoLengths data(4);
    Job job = make({.micro_batch = 4});
    job.accumulator->caps().remember(longer, {.micro_batch = 2});
    Sizes sizes;
    const LossFunction loss = [&](const Batch& micro) {
        sizes.push_back(micro.size());
        return job.loss(micro);
    };
    job.accumulator->step(DatasetBatch(data, {0, 1, 2, 4, 5, 3, 0, 1}), loss);
    EXPECT_EQ(sizes, (Sizes{2, 2, 2, 2}));
    sizes.clear();
    job.accumulator->step(DatasetBatch(data, {0, 1, 2, 3, 4, 5, 0, 1, 2, 3}), loss);
    EXPECT_EQ(sizes, (Sizes{4, 2, 4}));
}

TEST_F(CapsWithinABatch, ABatchThatGivesUpIsForgotten) {
    const TwoLengths data(4);
    Job job = make({.micro_batch = 4});
    const DatasetBatch batch(data, first(8));
    const LossFunction never = [&](const Batch& micro) {
        if (micro.fields[0].size(1) > 4) test::fail_allocation(1);
        return job.loss(micro);
    };
    expect_error(ErrorKind::does_not_fit, {"a micro-batch of 1 sample"}, [&] { job.accumulator->step(batch, never); });
    EXPECT_TRUE(job.accumulator->caps().empty());
    const StepReport report = job.accumulator->step(batch, job.loss);
    EXPECT_EQ(report.micro_batches, 2);
    EXPECT_EQ(report.out_of_memory, 0);
}

TEST_F(CapsWithinABatch, MemoryThatRunsOutBeforeTheFirstMicroBatchCapsAllAndEndsInAnError) {
    const TwoLengths data(4);
    Job job = make({.micro_batch = 4});
    const DatasetBatch batch(data, first(8));
    {
        const test::BudgetScope budget(test::memory_use().live_bytes +
                                       1);  // not even the generator's state can be copied
        expect_error(ErrorKind::does_not_fit, {"a micro-batch of 1 sample"},
                     [&] { job.accumulator->step(batch, job.loss); });
    }
    EXPECT_TRUE(job.accumulator->caps().empty());
    test::fail_allocation(1);
    const StepReport report = job.accumulator->step(batch, job.loss);
    EXPECT_EQ(report.out_of_memory, 1);
    EXPECT_EQ(report.plan.micro_batch, 2);
    EXPECT_EQ(report.micro_batches, 4);
}

TEST_F(CapsWithinABatch, NoiseIsMeasuredWhereACapCutsABatchThatThePlanDoesNot) {
    const TwoLengths data(4);
    Job job = make({.micro_batch = 8});
    job.accumulator->caps().remember(longer, {.micro_batch = 2});
    const auto noise = [&](const DatasetBatch& batch) {
        return job.accumulator->step(batch, job.loss, {.measure_noise = true}).noise;
    };
    EXPECT_TRUE(noise(DatasetBatch(data, first(8))));
    EXPECT_FALSE(noise(DatasetBatch(data, first(4))));  // of one micro-batch
}

}  // namespace
}  // namespace microbatch
