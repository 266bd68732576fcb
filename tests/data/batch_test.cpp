#include "microbatch/data/batch.h"

#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include <limits>

#include "support/errors.h"

namespace microbatch {
namespace {

using test::expect_usage_error;

constexpr std::int64_t largest = std::numeric_limits<std::int64_t>::max();
constexpr std::int64_t smallest = std::numeric_limits<std::int64_t>::min();

Batch seven() {
    return {{at::arange(21, at::kFloat).view({7, 3}), at::arange(7, at::kLong)}};
}

TEST(Batch, CountsTheFirstDimension) {
    EXPECT_EQ(Batch{}.size(), 0);
    EXPECT_EQ(seven().size(), 7);
    EXPECT_EQ((Batch{{at::zeros({0, 3}), at::zeros({0})}}).size(), 0);
    EXPECT_EQ((Batch{{at::zeros({1, 5, 2})}}).size(), 1);
}

TEST(Batch, RefusesFieldsOfDifferentLengths) {
    expect_usage_error({"7", "5"}, [] { Batch{{at::zeros({7}), at::zeros({5})}}.size(); });
    expect_usage_error({"7", "0"}, [] { Batch{{at::zeros({7}), at::zeros({0, 3})}}.size(); });
    expect_usage_error({"undefined"}, [] { Batch{{at::Tensor()}}.size(); });
    expect_usage_error({"undefined"}, [] { Batch{{at::zeros({7}), at::Tensor()}}.size(); });
    expect_usage_error({"dimension"}, [] { Batch{{at::scalar_tensor(1)}}.size(); });
    expect_usage_error({"dimension"}, [] { Batch{{at::zeros({1}), at::scalar_tensor(1)}}.size(); });
}

TEST(Batch, ErrorsNameTheFieldAtFault) {
    expect_usage_error({"2"}, [] { Batch{{at::zeros({7}), at::zeros({7}), at::Tensor()}}.size(); });
}

TEST(Batch, SlicesEveryFieldAlongItsFirstDimension) {
    const Batch part = seven().slice(2, 5);
    ASSERT_EQ(part.fields.size(), 2u);
    EXPECT_EQ(part.size(), 3);
    EXPECT_TRUE(at::equal(part.fields[0], at::arange(6, 15, at::kFloat).view({3, 3})));
    EXPECT_TRUE(at::equal(part.fields[1], at::arange(2, 5, at::kLong)));
}

TEST(Batch, SlicesAreViews) {
    const Batch batch = seven();
    const Batch part = batch.slice(2, 5);
    EXPECT_EQ(part.fields[0].const_data_ptr<float>(), batch.fields[0].const_data_ptr<float>() + 6);
    part.fields[1].fill_(-1);
    EXPECT_EQ(batch.fields[1].sum().item<std::int64_t>(), 0 + 1 - 3 + 5 + 6);
}

TEST(Batch, SlicesFieldsThatAreNotContiguous) {
    const at::Tensor columns = at::arange(21, at::kFloat).view({3, 7}).t();
    const Batch part = Batch{{columns}}.slice(6, 7);
    EXPECT_TRUE(at::equal(part.fields[0], at::tensor({6.f, 13.f, 20.f}).view({1, 3})));
}

TEST(Batch, SlicesEverythingAndNothing) {
    EXPECT_EQ(seven().slice(0, 7).size(), 7);
    EXPECT_EQ(seven().slice(0, 0).size(), 0);
    EXPECT_EQ(seven().slice(7, 7).size(), 0);
    EXPECT_EQ(seven().slice(7, 7).fields[0].size(1), 3);
    EXPECT_EQ(Batch{}.slice(0, 0).size(), 0);
}

TEST(Batch, RefusesSlicesOutsideIt) {
    const std::pair<std::int64_t, std::int64_t> wrong[] = {
        {-1, 2}, {5, 3}, {0, 8}, {8, 8}, {-3, -1}, {0, largest}, {smallest, 0}, {smallest, 7}, {largest, smallest}};
    for (const auto& [begin, end] : wrong) {
        expect_usage_error({std::to_string(begin), std::to_string(end), "7"},
                           [&, b = begin, e = end] { seven().slice(b, e); });
    }
    expect_usage_error({"1", "0"}, [] { Batch{}.slice(0, 1); });
}

TEST(Batch, RefusesToSliceFieldsOfDifferentLengths) {
    expect_usage_error({"7", "5"}, [] { Batch{{at::zeros({7}), at::zeros({5})}}.slice(0, 1); });
}

}  // namespace
}  // namespace microbatch
