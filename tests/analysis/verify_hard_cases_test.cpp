// Cases in which verify() could easily name the wrong cause, or none.
#include <ATen/ops/randn_like.h>
#include <gtest/gtest.h>

#include "analysis/net.h"
#include "microbatch/analysis/verify.h"
#include "support/errors.h"

namespace microbatch {
namespace {

using test::expect_usage_error;
using test::losses;
using test::Net;
using test::some_batch;
using Causes = std::vector<Cause>;

TEST(VerifyHardCases, NoiseThatTheLossAddsIsNotCalledCoupling) {
    Net net;
    const LossFunction noisy = [&](const Batch& b) {
        Batch shaken = b;
        shaken.fields[0] = b.fields[0] + 0.1 * at::randn_like(b.fields[0]);
        return WeightedLoss{losses(net, shaken).sum(), static_cast<double>(b.size())};
    };
    // Consecutive draws are the same for the split batch; new draws for every call are not.
    const LossFunction noisy_pairs = [&](const Batch& b) {
        at::randn_like(b.fields[0]);
        return noisy(b);
    };
    const Verification found = verify(net, some_batch(), noisy_pairs, 3);
    EXPECT_EQ(found.causes, Causes{Cause::randomness});
}

TEST(VerifyHardCases, EqualMicroBatchesDoNotHideAMeanOfMeans) {
    Net net;
    const LossFunction mean = [&](const Batch& b) { return WeightedLoss{losses(net, b).mean(), 1.0}; };
    const Batch four = some_batch().slice(0, 4);
    for (const std::int64_t micro_batch : {1, 2}) {
        const Verification found = verify(net, four, mean, micro_batch);
        EXPECT_TRUE(found.differences.empty());
        EXPECT_EQ(found.causes, Causes{Cause::averaged_loss});
        EXPECT_FALSE(found.ok());
    }
}

TEST(VerifyHardCases, ABatchOfWeightZeroIsNoProofOfAnything) {
    Net net;
    const LossFunction masked = [&](const Batch& b) { return WeightedLoss{losses(net, b).sum() * 0, 0.0}; };
    expect_usage_error({"weight 0"}, [&] { verify(net, some_batch(), masked, 3); });
    for (const at::Tensor& parameter : net.parameters()) EXPECT_FALSE(parameter.grad().defined());
}

TEST(VerifyHardCases, AModelThatReadsARunningBufferIsNotCalledRandom) {
    struct Running : torch::nn::Module {
        at::Tensor scale = register_buffer("scale", at::ones({1}));
        at::Tensor weight = register_parameter("weight", at::ones({1}));
    } model;
    const LossFunction loss = [&](const Batch& b) {
        at::Tensor sum = (b.fields[0].square().sum() * model.weight * model.scale.clone()).sum();
        at::NoGradGuard no_grad;
        model.scale.mul_(1.5);
        return WeightedLoss{sum, static_cast<double>(b.size())};
    };
    const Verification found = verify(model, some_batch(), loss, 3);
    EXPECT_FALSE(found.ok());
    EXPECT_EQ(std::count(found.causes.begin(), found.causes.end(), Cause::randomness), 0);
    EXPECT_EQ(std::count(found.causes.begin(), found.causes.end(), Cause::batch_statistics), 1);
}

}  // namespace
}  // namespace microbatch
