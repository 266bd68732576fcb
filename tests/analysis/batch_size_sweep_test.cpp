#include "microbatch/analysis/batch_size_sweep.h"

#include "microbatch/optim/sgd.h"
#include "support/errors.h"
#include "support/gradients.h"
#include "support/models.h"

namespace microbatch {
namespace {

using namespace test;

struct Training {
    std::shared_ptr<TanhMlp> model = make_mlp(1);
    Parameters parameters = parameters_of(model);
    Sgd optimizer{{{.parameters = parameters}}, {.learning_rate = 0.02, .momentum = 0.9}};
    Accumulator accumulator{parameters, optimizer, {.plan = {4}}};
    TensorDataset dataset{rows()};
    LossFunction loss = weighted_squares(model);

    static Batch rows() {
        Batch batch = regression_batch(64, 1);
        batch.fields[2].fill_(1.0);
        return batch;
    }
    at::Tensor momentum() const { return state_of(optimizer).tensors().begin()->second.get(); }
    std::vector<Branch> branches(BranchOptions options) { return branch_by_batch(accumulator, dataset, loss, options); }
};

TEST(Branches, TheFirstIsTheBaseAndTheRateFollowsTheBatch) {
    Training run;
    const std::vector<Branch> found =
        run.branches({.batch = 4, .factors = {1, 2, 4}, .samples = 256, .rule = RateRule::linear});
    ASSERT_EQ(found.size(), 3u);
    for (std::size_t i = 0; i < 3; ++i) {
        const auto factor = static_cast<double>(1 << i);
        EXPECT_EQ(found[i].batch, 4 << i);
        EXPECT_DOUBLE_EQ(found[i].learning_rate, 0.02 * factor);
        EXPECT_TRUE(std::isfinite(found[i].loss));
    }
    EXPECT_TRUE(found[0].as_good);
}

TEST(Branches, LeavesTheJobUnchanged) {
    Training run;
    run.accumulator.step(regression_batch(8, 2), run.loss);
    const Named before = values_of(run.parameters);
    const at::Tensor momentum = run.momentum().clone();
    run.branches({.batch = 4, .samples = 128});
    expect_same_bits(values_of(run.parameters), before);
    EXPECT_TRUE(at::equal(run.momentum(), momentum));
    EXPECT_EQ(run.optimizer.learning_rate(), 0.02);
    int steps = 0;
    EXPECT_THROW(run.branches({.batch = 4,
                               .samples = 128,
                               .on_step =
                                   [&](std::int64_t) {
                                       if (++steps == 7) throw std::runtime_error("enough");
                                   }}),
                 std::runtime_error);
    expect_same_bits(values_of(run.parameters), before);
    EXPECT_EQ(run.optimizer.learning_rate(), 0.02);
}

TEST(Branches, ABatchTooLargeForItsRateIsNotAsGoodNorIsALargerOne) {
    Training run;
    // Without noise a larger batch has only fewer steps to go; at the same rate it falls behind.
    const std::vector<Branch> found =
        run.branches({.batch = 8, .factors = {1, 2, 4, 8}, .samples = 512, .rule = RateRule::none, .tolerance = 1e-4});
    EXPECT_TRUE(found[0].as_good);
    EXPECT_GT(found[3].loss, found[0].loss + 1e-4);
    EXPECT_FALSE(found[3].as_good);
}

TEST(Branches, RefusesInvalidOptions) {
    Training run;
    expect_usage_error({"must be 1"}, [&] { run.branches({.batch = 4, .factors = {}}); });
    expect_usage_error({"must be 1"}, [&] { run.branches({.batch = 4, .factors = {2}}); });
    expect_usage_error({"increase"}, [&] { run.branches({.batch = 4, .factors = {1, 4, 4}}); });
    expect_usage_error({"batch", "0"}, [&] { run.branches({.batch = 0}); });
    expect_usage_error({"31", "32"}, [&] { run.branches({.batch = 4, .samples = 31}); });
}

}  // namespace
}  // namespace microbatch
