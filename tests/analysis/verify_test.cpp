#include "microbatch/analysis/verify.h"

#include <ATen/CPUGeneratorImpl.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <set>
#include <stdexcept>
#include <string>
#include <vector>

#include "analysis/net.h"
#include "microbatch/model/parameters.h"
#include "support/errors.h"
#include "support/gradients.h"

namespace microbatch {
namespace {

using test::averaged;
using test::count;
using test::expect_usage_error;
using test::losses;
using test::Net;
using test::samples;
using test::some_batch;
using test::summed;
using Causes = std::vector<Cause>;

bool has(const Verification& found, Cause cause) {
    return std::find(found.causes.begin(), found.causes.end(), cause) != found.causes.end();
}

/// A verdict that something is wrong, with parameters named, largest difference first, none below the tolerance.
void expect_differences(const Verification& found) {
    EXPECT_FALSE(found.ok());
    EXPECT_FALSE(found.differences.empty());
    for (std::size_t i = 0; i < found.differences.size(); ++i) {
        EXPECT_GT(found.differences[i].relative, found.tolerance) << found.differences[i].parameter;
        if (i == 0) continue;
        EXPECT_GE(found.differences[i - 1].relative, found.differences[i].relative);
    }
}

class EveryCut : public ::testing::TestWithParam<std::int64_t> {};
INSTANTIATE_TEST_SUITE_P(Verify, EveryCut, ::testing::Values(1, 2, 3, 4));

TEST_P(EveryCut, FindsNothingInAModelWithoutMistakes) {
    for (const auto& [type, epsilon] : {std::pair{at::kFloat, 0x1p-23}, {at::kDouble, 0x1p-52}}) {
        Net net;
        net.to(type);
        const LossFunction masked = [&](const Batch& b) -> WeightedLoss {
            return {(losses(net, b) * b.fields[2]).sum(), b.fields[2].sum().item<double>()};
        };
        for (const LossFunction& loss : {summed(net), masked}) {
            const Verification found = verify(net, some_batch(type), loss, GetParam());
            EXPECT_TRUE(found.ok());
            EXPECT_EQ(found.tolerance, std::sqrt(epsilon));
            EXPECT_LT(found.loss_difference, 10 * epsilon);  // rounding of five sums
        }
    }
}

TEST_P(EveryCut, FindsALossThatIsAveragedAlready) {
    Net net;
    const LossFunction constant_weight = [&](const Batch& b) { return WeightedLoss{losses(net, b).sum(), 1.0}; };
    for (const auto& loss : {averaged(net), constant_weight}) {
        const Verification found = verify(net, some_batch(), loss, GetParam());
        expect_differences(found);
        EXPECT_EQ(found.causes, Causes{Cause::averaged_loss});
        EXPECT_EQ(found.differences.size(), 4u);
        EXPECT_GT(found.loss_difference, 0.1);
    }
    if (GetParam() == 1) return;  // five micro-batches of one sample: the mean of their means is right
    const LossFunction weight_one = [&](const Batch& b) { return WeightedLoss{losses(net, b).mean(), 1.0}; };
    const Verification found = verify(net, some_batch(), weight_one, GetParam());
    expect_differences(found);
    EXPECT_EQ(found.causes, Causes{Cause::averaged_loss});
}

TEST(Verify, TakesHalfOfTheDigitsOfTheDtypeAsTolerance) {
    // The gradient depends on the split by about 2 millionths: far below fp32's 3e-4, far above fp64's 1e-8.
    Net net;
    const LossFunction loss = [&](const Batch& b) {
        return WeightedLoss{losses(net, b).sum() * (1 + 1e-6 * count(b)), count(b)};
    };
    EXPECT_TRUE(verify(net, some_batch(), loss, 3).ok());
    net.to(at::kDouble);
    const Verification found = verify(net, some_batch(at::kDouble), loss, 3);
    expect_differences(found);
    EXPECT_EQ(found.differences.size(), 4u);
}

TEST_P(EveryCut, FindsAMeanOverRaggedMasks) {
    Net net;
    const LossFunction loss = [&](const Batch& b) -> WeightedLoss {
        const at::Tensor counted = b.fields[2].sum().clamp_min(1);
        return {(losses(net, b) * b.fields[2]).sum() / counted, count(b)};
    };
    const Verification found = verify(net, some_batch(), loss, GetParam());
    expect_differences(found);
    EXPECT_EQ(found.causes.at(0), Cause::averaged_loss);
}

TEST(Verify, FindsBatchStatisticsOnlyInTrainingMode) {
    Net net(true);
    Verification found = verify(net, some_batch(), summed(net), 3);
    expect_differences(found);
    EXPECT_EQ(found.causes, Causes{Cause::batch_statistics});
    net.eval();
    EXPECT_TRUE(verify(net, some_batch(), summed(net), 3).ok());
}

TEST(Verify, FindsRandomnessOnlyInTrainingMode) {
    Net net(false, true);
    for (const std::int64_t micro_batch : {2, 3}) {
        const Verification found = verify(net, some_batch(), summed(net), micro_batch);
        expect_differences(found);
        EXPECT_EQ(found.causes, Causes{Cause::randomness});
    }
    net.eval();
    EXPECT_TRUE(verify(net, some_batch(), summed(net), 3).ok());
}

TEST(Verify, FindsSamplesThatTheLossMixes) {
    Net net;
    const LossFunction in_batch_negatives = [&](const Batch& b) -> WeightedLoss {
        const at::Tensor z = net.forward(b.fields[0]);
        const at::Tensor own = at::arange(b.size(), at::kLong);
        return {at::cross_entropy_loss(at::mm(z, at::sin(z).t()), own, {}, at::Reduction::Sum), count(b)};
    };
    for (const std::int64_t micro_batch : {2, 3}) {
        const Verification found = verify(net, some_batch(), in_batch_negatives, micro_batch);
        expect_differences(found);
        EXPECT_EQ(found.causes, Causes{Cause::coupled_samples});
    }
}

TEST(Verify, FindsEveryOneOfTwoMistakes) {
    Net norm(true), dropout(false, true), both(true, true);
    Verification found = verify(norm, some_batch(), averaged(norm), 3);
    EXPECT_TRUE(has(found, Cause::averaged_loss) && has(found, Cause::batch_statistics));
    found = verify(dropout, some_batch(), averaged(dropout), 3);
    EXPECT_TRUE(has(found, Cause::averaged_loss) && has(found, Cause::randomness));
    found = verify(both, some_batch(), summed(both), 3);
    EXPECT_TRUE(has(found, Cause::randomness) && has(found, Cause::batch_statistics));
}

TEST(Verify, FindsWhatIsNotFinite) {
    Net net;
    Batch batch = some_batch();
    for (const double bad : {std::numeric_limits<double>::quiet_NaN(), std::numeric_limits<double>::infinity()}) {
        batch.fields[0][4][1] = bad;
        EXPECT_EQ(verify(net, batch, summed(net), 3).causes, Causes{Cause::not_finite});
    }
    // The root is 0, its gradient infinite times zero.
    const LossFunction root = [&](const Batch& b) {
        return WeightedLoss{(net.last->bias * 0).sqrt().sum() + losses(net, b).sum(), count(b)};
    };
    EXPECT_EQ(verify(net, some_batch(), root, 3).causes, Causes{Cause::not_finite});
}

TEST(Verify, DoesNotCallALossWithMemoryRight) {
    Net net;
    int calls = 0;
    const LossFunction drifts = [&](const Batch& b) { return WeightedLoss{losses(net, b).sum() * ++calls, count(b)}; };
    const Verification found = verify(net, some_batch(), drifts, 3);
    expect_differences(found);
    EXPECT_FALSE(found.causes.empty());
    EXPECT_FALSE(has(found, Cause::batch_statistics) || has(found, Cause::not_finite));
}

TEST(Verify, NamesOnlyTheParametersThatDiffer) {
    Net net;
    const LossFunction loss = [&](const Batch& b) -> WeightedLoss {
        const at::Tensor penalty = net.first->weight.square().sum();  // once a micro-batch, not once a sample
        return {losses(net, b).sum() + penalty, count(b)};
    };
    const Verification found = verify(net, some_batch(), loss, 3);
    ASSERT_EQ(found.differences.size(), 1u);
    EXPECT_EQ(found.differences[0].parameter, "first.weight");
    EXPECT_FALSE(found.causes.empty());
}

TEST(Verify, IsNotMisledByGradientsThatAreZeroButForRounding) {
    Net net;
    at::Tensor shift = net.register_parameter("shift", at::zeros({1}));  // softmax does not see it
    at::Tensor unused = net.register_parameter("unused", at::zeros({1}));
    net.first->weight.set_requires_grad(false);
    const LossFunction loss = [&](const Batch& b) -> WeightedLoss {
        const at::Tensor logits = net.forward(b.fields[0]) + shift;
        return {at::cross_entropy_loss(logits, b.fields[1], {}, at::Reduction::Sum), count(b)};
    };
    for (const std::int64_t micro_batch : {1, 2, 3}) EXPECT_TRUE(verify(net, some_batch(), loss, micro_batch).ok());
}

/// All that verify() must leave as it was, by its bits.
struct Trace {
    explicit Trace(Net& net) {
        for (const auto& item : net.named_parameters()) tensors.push_back({item.key(), item.value().detach().clone()});
        for (const auto& item : net.named_buffers()) tensors.push_back({item.key(), item.value().clone()});
        tensors.push_back({"generator", at::detail::getDefaultCPUGenerator().get_state()});
        training.push_back(net.is_training());
        for (const auto& module : net.modules(/*include_self=*/false)) training.push_back(module->is_training());
        for (const auto& parameter : net.parameters()) requires_grad.push_back(parameter.requires_grad());
    }
    test::Named tensors;
    std::vector<bool> training, requires_grad;
};

void expect_no_trace(Net& net, const Trace& before) {
    const Trace after(net);
    test::expect_same_bits(before.tensors, after.tensors);
    EXPECT_EQ(before.training, after.training);
    EXPECT_EQ(before.requires_grad, after.requires_grad);
    test::expect_no_gradients(parameters_of(net));
}

TEST(Verify, LeavesNoTraceAlsoWhereTheLossThrowsAtAnyCall) {
    Net net(true, true);
    net.first->eval();  // flags of single layers
    net.last->bias.set_requires_grad(false);
    at::rand({3});
    bool threw = true;
    int throwing = 0;  // at no call first, then at the first, the second, ...
    for (; threw || throwing == 1; ++throwing) {
        const Trace before(net);
        int calls = 0, seen = 0;
        const LossFunction loss = [&](const Batch& b) {
            const WeightedLoss result = averaged(net)(b);  // all that a forward pass changes, then the exception
            if (++calls == throwing) throw std::domain_error("the user's own");
            seen += static_cast<int>(b.size());
            return result;
        };
        threw = false;
        try {
            expect_differences(verify(net, some_batch(), loss, 3));
        } catch (const std::domain_error&) {
            threw = true;
        }
        expect_no_trace(net, before);
        EXPECT_LE(seen, 10 * samples);  // the cost that is promised
    }
    EXPECT_GE(throwing, 5);  // the whole batch and two micro-batches threw at least
}

TEST(Verify, RefusesAMicroBatchThatCutsNothing) {
    Net net;
    for (const std::int64_t bad : {std::int64_t{-1}, std::int64_t{0}, samples, samples + 1}) {
        expect_usage_error({"micro-batch", std::to_string(bad)}, [&] { verify(net, some_batch(), summed(net), bad); });
    }
    expect_usage_error({"micro-batch"}, [&] { verify(net, some_batch().slice(0, 1), summed(net), 1); });
    expect_usage_error({}, [&] { verify(net, some_batch().slice(0, 0), summed(net), 1); });
}

TEST(Verify, RefusesToMixWithGradientsThatAreThere) {
    Net net;
    net.last->bias.mutable_grad() = at::ones({4});
    expect_usage_error({"last.bias"}, [&] { verify(net, some_batch(), summed(net), 3); });
}

TEST(Describe, SaysSomethingElseForEveryCause) {
    std::set<std::string_view> texts;
    for (int cause = 0; cause <= static_cast<int>(Cause::unknown); ++cause) {
        texts.insert(describe(static_cast<Cause>(cause)));
        EXPECT_GT(describe(static_cast<Cause>(cause)).size(), 10u);
    }
    EXPECT_EQ(texts.size(), 6u);
}

}  // namespace
}  // namespace microbatch
