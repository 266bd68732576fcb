// Gradients live in one place and are cleared: frozen, unused, tied, shared and added parameters. The oracle is a plain
// torch loop over whole batches, to the contract's 1e-9 for AdamW in fp64.
#include <torch/optim/adamw.h>

#include "microbatch/optim/adamw.h"
#include "microbatch/optim/torch_optimizer.h"
#include "microbatch/step/accumulator.h"
#include "support/errors.h"
#include "support/gradients.h"
#include "support/models.h"

namespace microbatch {
namespace {

using namespace test;

constexpr double tolerance = 1e-9;
const AdamWOptions ours{.learning_rate = 1e-2};

torch::optim::AdamWOptions theirs() {
    return torch::optim::AdamWOptions(1e-2).weight_decay(0.1);
}

std::vector<ParameterGroup> decayed(const Parameters& parameters) {
    return {{.parameters = parameters, .weight_decay = 0.1}};
}

/// The whole batch at once in torch.
void plain_step(torch::optim::Optimizer& optimizer, const Batch& batch, const LossFunction& loss) {
    optimizer.zero_grad();
    const WeightedLoss whole = loss(batch);
    (whole.sum / whole.weight.value()).backward();
    optimizer.step();
    optimizer.zero_grad();
}

/// Two models with the same bits: one trained in micro-batches of 4 by the library, one by the plain loop.
struct Twins {
    std::shared_ptr<TanhMlp> model = make_mlp(1), plain = make_mlp(1);
    Parameters parameters = parameters_of(model);
    AdamW optimizer{decayed(parameters), ours};
    Accumulator accumulator{parameters, optimizer, {.plan = {4}}};
    torch::optim::AdamW plain_optimizer{plain->parameters(), theirs()};

    void step(std::uint64_t seed) {
        const Batch batch = regression_batch(17, seed);
        plain_step(plain_optimizer, batch, weighted_squares(plain));
        EXPECT_TRUE(accumulator.step(batch, weighted_squares(model)).applied);
        expect_no_gradients(parameters);
    }
    void freeze(bool frozen) {
        for (auto& m : {model, plain}) m->first->weight.requires_grad_(!frozen);
    }
    void expect_same() const { expect_agree(values_of(parameters), values_of(parameters_of(plain)), tolerance); }
};

TEST(Parameters, FrozenOnesStayAndThawWhenAsked) {
    Twins twins;
    twins.freeze(true);
    const at::Tensor before = twins.model->first->weight.detach().clone();
    for (std::uint64_t seed : {1, 2, 3}) twins.step(seed);
    EXPECT_TRUE(same_bits(twins.model->first->weight.detach(), before));
    twins.freeze(false);
    for (std::uint64_t seed : {4, 5, 6}) twins.step(seed);
    EXPECT_FALSE(same_bits(twins.model->first->weight.detach(), before));
    twins.freeze(true);  // keeps its moments and its step count for the next thaw
    for (std::uint64_t seed : {7, 8}) twins.step(seed);
    twins.freeze(false);
    for (std::uint64_t seed : {9, 10}) twins.step(seed);
    twins.expect_same();
}

TEST(Parameters, StaleGradientsAreAnErrorThatNamesTheParameter) {
    for (bool frozen : {false, true}) {
        for (double stale : {1e-30, -1.0, std::numeric_limits<double>::quiet_NaN()}) {
            Twins twins;
            twins.step(1);
            at::Tensor& bias = twins.model->second->bias;
            bias.mutable_grad() = at::zeros_like(bias);
            bias.mutable_grad()[1] = stale;
            if (frozen) bias.requires_grad_(false);
            const Named before = values_of(twins.parameters);
            const auto loss = weighted_squares(twins.model);
            expect_usage_error({"second.bias"}, [&] { twins.accumulator.step(regression_batch(5, 1), loss); });
            expect_same_bits(values_of(twins.parameters), before);
            bias.requires_grad_(true);
            bias.mutable_grad() = at::Tensor();
            twins.step(2);
            twins.expect_same();
        }
    }
}

TEST(Parameters, GradientsOfTheUsersOwnBackwardAreFoundInEveryParameter) {
    const auto model = make_mlp(1);
    for (const Parameter& p : parameters_of(model)) {
        Gatherer gatherer(parameters_of(model));
        p.tensor.sum().backward();
        expect_usage_error({p.name}, [&] { gatherer.begin(); });
        gatherer.clear();
        expect_no_gradients(parameters_of(model));
        EXPECT_NO_THROW(gatherer.begin());
    }
}

TEST(Parameters, GradientsOfZerosAreNotStale) {
    Twins twins;
    for (const Parameter& p : twins.parameters) p.tensor.mutable_grad() = at::zeros_like(p.tensor);
    twins.step(1);
    twins.expect_same();
}

/// A loss that leaves the second layer's bias unused.
LossFunction without_bias(std::shared_ptr<TanhMlp> model) {
    return [model](const Batch& batch) -> WeightedLoss {
        const at::Tensor hidden = at::tanh(model->first->forward(batch.fields[0]));
        return {hidden.matmul(model->second->weight.t()).square().sum(), static_cast<double>(batch.size())};
    };
}

TEST(Parameters, UnusedOnesAreLeftAloneWeightDecayIncluded) {
    Twins twins;
    const at::Tensor& bias = twins.model->second->bias;
    const at::Tensor before = bias.detach().clone();
    for (std::uint64_t seed : {1, 2}) {
        bias.mutable_grad() = at::zeros_like(bias);  // as zero_grad(set_to_none = false) leaves it
        plain_step(twins.plain_optimizer, regression_batch(17, seed), without_bias(twins.plain));
        twins.accumulator.step(regression_batch(17, seed), without_bias(twins.model));
        expect_no_gradients(twins.parameters);
    }
    EXPECT_TRUE(same_bits(bias.detach(), before));
    twins.step(3);
    twins.expect_same();
}

/// Samples whose first input is positive go without the bias: whole micro-batches may not use it.
LossFunction bias_for_some(std::shared_ptr<TanhMlp> model) {
    return [model](const Batch& batch) -> WeightedLoss {
        const at::Tensor positive = batch.fields[0].select(1, 0) > 0;
        const at::Tensor hidden = at::tanh(model->first->forward(batch.fields[0]));
        at::Tensor sum = hidden.index({positive}).matmul(model->second->weight.t()).square().sum();
        const at::Tensor others = hidden.index({positive.logical_not()});
        if (others.size(0) > 0) sum = sum + model->second->forward(others).square().sum();
        return {sum, static_cast<double>(batch.size())};
    };
}

TEST(Parameters, SomeMayBeUsedInSomeMicroBatchesOnly) {
    for (std::int64_t user : {0, 7, 16}) {  // in the first micro-batch, one in the middle, the last
        Twins twins;
        for (std::uint64_t seed : {1, 2, 3}) {
            const Batch batch = regression_batch(17, seed);
            batch.fields[0].select(1, 0).abs_();
            batch.fields[0][user][0] = -1;
            plain_step(twins.plain_optimizer, batch, bias_for_some(twins.plain));
            EXPECT_TRUE(twins.accumulator.step(batch, bias_for_some(twins.model)).applied);
            expect_no_gradients(twins.parameters);
        }
        twins.expect_same();
    }
}

/// An encoder whose weight is the decoder's too, and one layer under two names.
struct Tied : torch::nn::Module {
    Tied()
        : encoder(register_module("encoder", torch::nn::Linear(torch::nn::LinearOptions(3, 3).bias(false)))),
          layer(register_module("layer", torch::nn::Linear(3, 3))) {
        register_module("same_layer", layer);
        decoder = register_parameter("decoder", encoder->weight);
        to(at::kDouble);
    }
    WeightedLoss loss(const Batch& batch) {
        const at::Tensor hidden = at::tanh(layer->forward(at::tanh(layer->forward(encoder->forward(batch.fields[0])))));
        return {(hidden.matmul(encoder->weight) - batch.fields[0]).square().sum(), static_cast<double>(batch.size())};
    }
    torch::nn::Linear encoder, layer;
    at::Tensor decoder;
};

std::shared_ptr<Tied> make_tied() {
    at::manual_seed(3);
    return std::make_shared<Tied>();
}

TEST(Parameters, TiedAndSharedOnesAreUpdatedOnce) {
    const auto model = make_tied(), plain = make_tied();
    const Parameters parameters = parameters_of(model);
    ASSERT_EQ(parameters.size(), 3u);  // one matrix, one layer's weight and bias
    AdamW optimizer(decayed(parameters), ours);
    Parameters repeated = parameters;
    for (const auto& item : model->named_parameters()) repeated.push_back({item.key(), item.value()});
    repeated.push_back({"again", model->encoder->weight});
    Accumulator accumulator(repeated, optimizer, {.plan = {4}});
    std::vector<at::Tensor> once;
    for (const Parameter& p : parameters_of(plain)) once.push_back(p.tensor);
    torch::optim::AdamW plain_optimizer(once, theirs());
    const auto loss = [&](const Batch& batch) { return model->loss(batch); };
    const auto plain_loss = [&](const Batch& batch) { return plain->loss(batch); };
    for (std::uint64_t seed : {1, 2, 3}) {
        const Batch batch = regression_batch(17, seed);
        const WeightedLoss whole = plain_loss(batch);
        const Named gradients = oracle_gradients(parameters_of(plain), batch, plain_loss);
        double squares = 0;
        for (const Parameter& g : gradients) squares += g.tensor.square().sum().item<double>();
        plain_step(plain_optimizer, batch, plain_loss);
        const StepReport report = accumulator.step(batch, loss);
        // Each tensor counts once in the norm, too. Agreement as for gradients, 1e-13, plus what 2 steps have added.
        EXPECT_NEAR(report.gradient_norm / std::sqrt(squares), 1, tolerance);
        expect_no_gradients(repeated);
    }
    expect_agree(values_of(parameters), values_of(parameters_of(plain)), tolerance);
}

/// The model with a second output of an optional head.
LossFunction with_head(std::shared_ptr<TanhMlp> model, torch::nn::Linear head) {
    return [model, head](const Batch& batch) mutable -> WeightedLoss {
        const at::Tensor hidden = at::tanh(model->first->forward(batch.fields[0]));
        const at::Tensor sum = model->second->forward(hidden).square().sum() + head->forward(hidden).cos().sum();
        return {sum, static_cast<double>(batch.size())};
    };
}

torch::nn::Linear make_head() {
    at::manual_seed(5);
    torch::nn::Linear head(5, 1);
    head->to(at::kDouble);
    return head;
}

TEST(Parameters, AHeadAddedLaterIsTrainedAndCleared) {
    Twins twins;
    twins.step(1);
    torch::nn::Linear head = make_head(), plain_head = make_head();
    const Parameters added{{"head.weight", head->weight}, {"head.bias", head->bias}};
    twins.accumulator.track(added);
    twins.accumulator.track(added);  // already known: ignored
    twins.optimizer.add_group({.parameters = added, .weight_decay = 0.1});
    twins.plain_optimizer.add_param_group(torch::optim::OptimizerParamGroup(
        plain_head->parameters(), std::make_unique<torch::optim::AdamWOptions>(theirs())));
    for (std::uint64_t seed : {2, 3, 4}) {
        const Batch batch = regression_batch(17, seed);
        plain_step(twins.plain_optimizer, batch, with_head(twins.plain, plain_head));
        EXPECT_TRUE(twins.accumulator.step(batch, with_head(twins.model, head)).applied);
        expect_no_gradients(twins.parameters);
        expect_no_gradients(added);
    }
    twins.expect_same();
    expect_agree(values_of(added), {{"weight", plain_head->weight}, {"bias", plain_head->bias}}, tolerance);
    head->bias.mutable_grad() = at::ones_like(head->bias);
    expect_usage_error({"head.bias"}, [&] { twins.accumulator.begin(); });
}

TEST(Parameters, AHeadThatOnlyTheOptimizerKnowsIsAnError) {
    // Its gradients would be summed over the steps, because nothing clears them.
    Twins twins;
    torch::nn::Linear head = make_head();
    twins.optimizer.add_group({.parameters = {{"head.weight", head->weight}, {"head.bias", head->bias}}});
    expect_usage_error({"track"},
                       [&] { twins.accumulator.step(regression_batch(17, 1), with_head(twins.model, head)); });
    twins.accumulator.track({{"head.weight", head->weight}, {"head.bias", head->bias}});
    EXPECT_TRUE(twins.accumulator.step(regression_batch(17, 1), with_head(twins.model, head)).applied);
}

TEST(Parameters, AnOptimizerOfUnknownParametersIsAnErrorFromTheStart) {
    const auto model = make_mlp(1);
    AdamW optimizer(decayed(parameters_of(model)), ours);
    const Parameters first{{"first.weight", model->first->weight}};
    expect_usage_error({}, [&] { Accumulator accumulator(first, optimizer); });
    torch::optim::AdamW theirs_optimizer(model->parameters(), theirs());
    TorchOptimizer wrapped(theirs_optimizer);
    expect_usage_error({}, [&] { Accumulator accumulator(first, wrapped); });
}

TEST(Parameters, OnesTheOptimizerDoesNotHaveAreClearedAndKept) {
    const auto model = make_mlp(1);
    const Parameters parameters = parameters_of(model);
    AdamW optimizer(decayed({{"second.weight", model->second->weight}}), ours);
    Accumulator accumulator(parameters, optimizer, {.plan = {4}});
    const at::Tensor first = model->first->weight.detach().clone(), second = model->second->weight.detach().clone();
    for (std::uint64_t seed : {1, 2}) {
        EXPECT_TRUE(accumulator.step(regression_batch(17, seed), weighted_squares(model)).applied);
        expect_no_gradients(parameters);
    }
    EXPECT_TRUE(same_bits(model->first->weight.detach(), first));
    EXPECT_FALSE(same_bits(model->second->weight.detach(), second));
}

TEST(Parameters, AreTakenOnceUnderTheirFirstName) {
    const at::Tensor a = at::ones({2}), b = at::ones({2});
    const Parameters once = without_repeats({{"a", a}, {"b", b}, {"c", a}, {"d", b}});
    ASSERT_EQ(once.size(), 2u);
    EXPECT_EQ(once[0].name, "a");
    EXPECT_EQ(once[1].name, "b");
    EXPECT_TRUE(once[0].tensor.is_same(a));
}

}  // namespace
}  // namespace microbatch
