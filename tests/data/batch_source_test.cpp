#include "microbatch/data/batch_source.h"

#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include <limits>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "support/errors.h"
#include "support/gradients.h"
#include "support/models.h"
#include "support/one_thread.h"

namespace microbatch {
namespace {

using namespace test;

Batch five() {
    return {{at::arange(10, at::kFloat).view({5, 2}), at::arange(5, at::kLong)}};
}

TEST(TensorBatch, GivesViewsOfTheBatch) {
    const Batch batch = five();
    const TensorBatch source(batch);
    EXPECT_EQ(source.size(), 5);
    const Batch slice = source.fetch({1, 4});
    EXPECT_EQ(slice.size(), 3);
    EXPECT_TRUE(slice.fields[0].is_alias_of(batch.fields[0]));
    EXPECT_TRUE(at::equal(slice.fields[1], at::arange(1, 4, at::kLong)));
    expect_usage_error({"[3, 6)"}, [&] { source.fetch({3, 6}); });
    EXPECT_EQ(TensorBatch(Batch{}).size(), 0);
}

TEST(TensorBatch, RefusesInvalidBatches) {
    expect_usage_error({"no dimension"}, [] { TensorBatch(Batch{{at::scalar_tensor(1)}}); });
    expect_usage_error({"field 1", "3", "5"}, [] { TensorBatch(Batch{{at::zeros({5}), at::zeros({3})}}); });
    expect_usage_error({"undefined"}, [] { TensorBatch(Batch{{at::Tensor()}}); });
}

TEST(TensorBatch, HasAFingerprintOfItsValuesAndShapes) {
    const std::uint32_t print = TensorBatch(five()).fingerprint();
    EXPECT_EQ(TensorBatch(five()).fingerprint(), print);
    const Batch strided{{at::arange(10, at::kFloat).view({5, 2}).t().contiguous().t(), at::arange(5, at::kLong)}};
    EXPECT_EQ(TensorBatch(strided).fingerprint(), print);  // independent of the memory layout
    std::set<std::uint32_t> others{print};
    const auto add = [&](const Batch& batch) { others.insert(TensorBatch(batch).fingerprint()); };
    add(five().slice(0, 4));
    add(five().slice(1, 5));
    add({{five().fields[0]}});
    add({{five().fields[1], five().fields[0]}});
    add({{at::arange(10, at::kFloat).view({5, 1, 2}), five().fields[1]}});
    Batch changed = five();
    changed.fields[0][4][1] = 9.0000010;
    add(changed);
    changed.fields[0] = changed.fields[0].flip(0);
    add(changed);
    EXPECT_EQ(others.size(), 8u);
    EXPECT_EQ(TensorBatch(Batch{{at::ones({2, 3}).requires_grad_()}}).fingerprint(),
              TensorBatch(Batch{{at::ones({2, 3})}}).fingerprint());
}

TEST(DatasetBatch, FetchesTheSamplesInTheirOrder) {
    const TensorDataset data(five());
    const DatasetBatch source(data, {4, 0, 0, 3});
    EXPECT_EQ(source.size(), 4);
    EXPECT_TRUE(at::equal(source.fetch({0, 4}).fields[1], at::tensor({4, 0, 0, 3}, at::kLong)));
    EXPECT_TRUE(at::equal(source.fetch({2, 3}).fields[1], at::zeros({1}, at::kLong)));
}

TEST(DatasetBatch, HasAFingerprintOfItsIndices) {
    const TensorDataset data(five());
    const auto print = [&](std::vector<std::int64_t> indices) {
        return DatasetBatch(data, std::move(indices)).fingerprint();
    };
    EXPECT_EQ(print({1, 2, 3}), print({1, 2, 3}));
    EXPECT_EQ((std::set{print({1, 2, 3}), print({1, 3, 2}), print({1, 2}), print({1, 2, 3, 3}), print({4})}).size(),
              5u);
}

/// Returns more or fewer samples than it is asked for.
class Miscounting final : public Dataset {
public:
    explicit Miscounting(std::int64_t more) : more_(more) {}

    std::int64_t size() const override { return 100; }
    Batch get(std::span<const std::int64_t> indices) const override {
        const std::int64_t count = static_cast<std::int64_t>(indices.size()) + more_;
        return count == 0 ? Batch{} : Batch{{at::ones({count, 2})}};
    }

private:
    std::int64_t more_;
};

TEST(DatasetBatch, RefusesAnotherNumberOfSamplesThanItAskedFor) {
    for (const std::int64_t more : {-2, -1, 1, 7}) {
        const Miscounting data(more);
        const DatasetBatch source(data, {5, 6, 7, 8});
        expect_usage_error({"get()", "2 samples", std::to_string(2 + more)}, [&] { source.fetch({1, 3}); });
    }
    const Miscounting exact(0);
    EXPECT_EQ(DatasetBatch(exact, {5, 6, 7, 8}).fetch({1, 3}).size(), 2);
}

TEST(BatchSource, AsManyTokensAreNeverMoreTokens) {
    EXPECT_EQ(as_many_tokens(4, 12, 12), 4);
    EXPECT_EQ(as_many_tokens(4, 12, 5), 9);
    EXPECT_EQ(as_many_tokens(1, 3, 7), 1);
    EXPECT_EQ(as_many_tokens(4, 0, 0), 4);  // empty samples
    constexpr std::int64_t most = std::numeric_limits<std::int64_t>::max();
    EXPECT_EQ(as_many_tokens(most, 12, 5), most);
}

TEST(BatchSource, FetchesEverySampleTwice) {
    const TensorBatch batch({{at::arange(3), at::arange(6).view({3, 2})}});
    const Batch twice = batch.fetch_twice();
    EXPECT_TRUE(at::equal(twice.fields[0], at::tensor({0, 1, 2, 0, 1, 2}, at::kLong)));
    EXPECT_TRUE(at::equal(twice.fields[1], at::arange(6).view({3, 2}).repeat({2, 1})));
}

}  // namespace
}  // namespace microbatch
