// The update of a batch, however it is split, on the library's own language model. The bounds are those of the docs.
#include <algorithm>
#include <limits>

#include "microbatch/models/gpt.h"
#include "microbatch/ops/cross_entropy.h"
#include "microbatch/optim/adamw.h"
#include "microbatch/optim/sgd.h"
#include "microbatch/step/accumulator.h"
#include "support/gradients.h"
#include "support/models.h"

namespace microbatch {
namespace {

using namespace test;

constexpr std::int64_t width = 32;
constexpr GptConfig config{.layers = 2, .heads = 2, .width = width, .length = 16, .vocabulary = 64};
constexpr std::int64_t cuts[] = {1, 3, 7, 16, whole_batch};
constexpr int steps = 20;

Gpt make_gpt(at::ScalarType type) {
    at::manual_seed(1);
    Gpt model(config);
    model->to(type);
    return model;
}

/// Fields: tokens, targets of which 0 to 100 % are masked (every seventh sample altogether), weights of the samples.
Batch token_batch(std::int64_t samples, std::uint64_t seed) {
    at::Generator random = generator(seed);
    const at::Tensor tokens = at::randint(0, config.vocabulary, {samples, config.length}, random, at::kLong);
    at::Tensor targets = at::randint(0, config.vocabulary, {samples, config.length}, random, at::kLong);
    const at::Tensor share = at::rand({samples, 1}, random, at::TensorOptions().dtype(at::kDouble));
    const at::Tensor draw = at::rand({samples, config.length}, random, at::TensorOptions().dtype(at::kDouble));
    targets.masked_fill_(draw < share, -100);
    for (std::int64_t i = 3; i < samples; i += 7) targets[i].fill_(-100);
    return {{tokens, targets, wide_weights(samples, random)}};
}

/// Cross-entropy of every target times the weight of its sample.
LossFunction weighted_tokens(Gpt model) {
    return [model](const Batch& batch) mutable -> WeightedLoss {
        const at::Tensor logits = model->forward(batch.fields[0]);
        std::vector<at::Tensor> sums;
        double weight = 0;
        for (std::int64_t i = 0; i < batch.size(); ++i) {
            const double sample = batch.fields[2][i].item<double>();
            sums.push_back(cross_entropy_sum(logits[i], batch.fields[1][i]) * sample);
            weight += count_targets(batch.fields[1][i]).item<double>() * sample;
        }
        return {at::stack(sums).sum(), weight};
    };
}

Named mean_gradients(const Gpt& model, const Batch& batch, std::int64_t cut) {
    Gatherer gatherer(parameters_of(model));
    const Gathered gathered = gatherer.gather(batch, {cut}, weighted_tokens(model));
    return gradients_of(gatherer.parameters(), gathered.weight);
}

/// `plain` bounds the distance to a loop in torch that divides the loss and not the gradients.
void expect_gradients_agree(at::ScalarType type, bool weighted, double tolerance, double plain) {
    const Gpt model = make_gpt(type);
    const Parameters parameters = parameters_of(model);
    for (const auto& [samples, seed] : {std::pair{50, 1}, {50, 2}, {50, 3}, {13, 4}}) {
        Batch batch = token_batch(samples, static_cast<std::uint64_t>(seed));
        if (!weighted) batch.fields[2].fill_(1);
        const Named oracle = oracle_gradients(parameters, batch, weighted_tokens(model));
        const Named whole = mean_gradients(model, batch, whole_batch);
        clear_gradients(parameters);
        for (std::int64_t cut : cuts) {
            SCOPED_TRACE(testing::Message() << samples << " samples in micro-batches of " << cut);
            const Named gradients = mean_gradients(model, batch, cut);
            expect_agree(gradients, whole, tolerance);
            expect_agree(gradients, oracle, plain);
            clear_gradients(parameters);
        }
    }
}

TEST(Exactness, GradientsOfWeightedMaskedTokensAgreeInFp32) {
    // Twice the bound: both sides of this comparison are rounded in every operation, not in the sums alone.
    expect_gradients_agree(at::kFloat, true, 1e-6, 2e-6);
}

TEST(Exactness, GradientsOfWeightedMaskedTokensAgreeInFp64) {
    expect_gradients_agree(at::kDouble, true, 1e-13, 1e-13);
}

TEST(Exactness, GradientsOfMaskedTokensAgreeInFp32) {
    expect_gradients_agree(at::kFloat, false, 1e-6, 2e-6);
}

TEST(Exactness, GradientsOfMaskedTokensAgreeInFp64) {
    expect_gradients_agree(at::kDouble, false, 1e-13, 1e-13);
}

struct Trained {
    Named values;
    std::vector<double> losses;
};

/// 20 steps of 50 samples, the last of 13.
template <class Optimizer, class Options>
Trained train(at::ScalarType type, std::int64_t cut, const Options& options) {
    Gpt model = make_gpt(type);
    const Parameters parameters = parameters_of(model);
    Optimizer optimizer(split_by_decay(parameters, 0.1), options);
    Accumulator accumulator(parameters, optimizer, {.plan = {cut}, .clip_norm = 1.0});
    Trained trained;
    for (int step = 1; step <= steps; ++step) {
        const Batch batch = token_batch(step < steps ? 50 : 13, static_cast<std::uint64_t>(step));
        const StepReport report = accumulator.step(batch, weighted_tokens(model));
        EXPECT_TRUE(report.applied) << report.reason;
        trained.losses.push_back(report.loss);
    }
    trained.values = values_of(parameters);
    return trained;
}

void expect_losses_agree(const Trained& cut, const Trained& whole, double tolerance) {
    for (std::size_t i = 0; i < whole.losses.size(); ++i) {
        EXPECT_NEAR(cut.losses[i] / whole.losses[i], 1, tolerance) << "step " << i;
    }
}

template <class Optimizer, class Options>
void expect_training_agrees(at::ScalarType type, const Options& options, double tolerance) {
    const Trained whole = train<Optimizer>(type, whole_batch, options);
    EXPECT_GT(largest_difference(values_of(parameters_of(make_gpt(type))), whole.values), 0.05);  // it has trained
    for (std::int64_t cut : {1, 3, 7, 16}) {
        SCOPED_TRACE(testing::Message() << "micro-batches of " << cut);
        const Trained trained = train<Optimizer>(type, cut, options);
        expect_agree(trained.values, whole.values, tolerance);
        expect_losses_agree(trained, whole, tolerance);
    }
}

TEST(Exactness, TwentySgdStepsAgreeInFp32) {
    expect_training_agrees<Sgd>(at::kFloat, SgdOptions{.learning_rate = 0.1, .momentum = 0.9}, 1e-5);
}

TEST(Exactness, TwentySgdStepsAgreeInFp64) {
    expect_training_agrees<Sgd>(at::kDouble, SgdOptions{.learning_rate = 0.1, .momentum = 0.9}, 1e-12);
}

TEST(Exactness, TwentyAdamWStepsAgreeInFp64) {
    expect_training_agrees<AdamW>(at::kDouble, AdamWOptions{.learning_rate = 1e-3}, 1e-9);
}

/// The thirds of the first layer's bias of queries, keys and values.
at::Tensor bias_third(const Named& tensors, std::int64_t third) {
    const auto bias =
        std::find_if(tensors.begin(), tensors.end(), [](const Parameter& p) { return p.name.ends_with("qkv.bias"); });
    return bias->tensor.narrow(0, third * width, width);
}

TEST(Exactness, AGradientThatIsMathematicallyZeroIsNoiseWhichAdamAmplifiesInFp32) {
    // A bias of the keys adds the same number to all scores of a query, which softmax does not see: its gradient is
    // zero. What is computed is rounding, as it shrinks with the type, and Adam divides it by its own size.
    const auto [queries, keys, values] = std::tuple{0, 1, 2};
    for (const auto& [type, rounding] : {std::pair{at::kFloat, 1e-5}, {at::kDouble, 1e-14}}) {
        const Named gradients = mean_gradients(make_gpt(type), token_batch(50, 1), whole_batch);
        EXPECT_LT(bias_third(gradients, keys).norm().item<double>(),
                  rounding * bias_third(gradients, queries).norm().item<double>());
    }
    const AdamWOptions options{.learning_rate = 1e-3};
    const Trained whole = train<AdamW>(at::kFloat, whole_batch, options);
    for (std::int64_t cut : {1, 3, 7, 16}) {
        SCOPED_TRACE(testing::Message() << "micro-batches of " << cut);
        const Trained trained = train<AdamW>(at::kFloat, cut, options);
        // The keys' bias differs for every split; the rest of the same tensor agrees.
        EXPECT_GT(relative_difference(bias_third(trained.values, keys), bias_third(whole.values, keys)), 0.1);
        EXPECT_LT(relative_difference(bias_third(trained.values, values), bias_third(whole.values, values)), 1e-5);
        EXPECT_LT(relative_difference(bias_third(trained.values, queries), bias_third(whole.values, queries)), 1e-5);
        expect_losses_agree(trained, whole, 1e-5);
    }
}

}  // namespace
}  // namespace microbatch
