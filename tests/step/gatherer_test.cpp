#include "microbatch/step/gatherer.h"

#include <algorithm>
#include <functional>
#include <limits>
#include <random>
#include <utility>

#include "microbatch/memory/budget_allocator.h"
#include "support/device_memory.h"
#include "support/errors.h"
#include "support/gradients.h"
#include "support/models.h"

namespace microbatch {
namespace {

using namespace test;

const double nan = std::numeric_limits<double>::quiet_NaN();
const double infinity = std::numeric_limits<double>::infinity();

/// One parameter of one number; the loss of a sample x is parameter * x, so its gradient is x.
struct Slope {
    at::Tensor value;
    Gatherer gatherer;

    explicit Slope(at::ScalarType type = at::kDouble)
        : value(at::ones({1}, at::TensorOptions().dtype(type)).requires_grad_()),
          gatherer(Parameters{{"slope", value}}) {}

    WeightedLoss loss(double x, double weight) const { return {(value * x).sum(), weight}; }
    LossFunction function() const {
        return [this](const Batch& batch) -> WeightedLoss {
            return {(value * batch.fields[0]).sum(), static_cast<double>(batch.size())};
        };
    }
    double gradient() const { return value.grad().item<double>(); }

    void expect_works() {
        gatherer.begin();
        gatherer.add(loss(3, 1));
        gatherer.add(loss(4, 1));
        EXPECT_EQ(gatherer.finish().weight, 2);
        EXPECT_EQ(gradient(), 7);
        gatherer.clear();
        EXPECT_FALSE(value.grad().defined());
    }
};

TEST(Gatherer, CutsAHundredInSixOfSixteenAndOneOfFour) {
    Slope slope;
    std::vector<std::int64_t> sizes;
    const Batch batch{{at::arange(1, 101, at::kDouble)}};
    const Gathered gathered = slope.gatherer.gather(batch, {16}, [&](const Batch& micro) {
        EXPECT_EQ(micro.fields[0][0].item<double>(), 1 + 16 * static_cast<double>(sizes.size()));
        sizes.push_back(micro.size());
        return slope.function()(micro);
    });
    EXPECT_EQ(sizes, (std::vector<std::int64_t>{16, 16, 16, 16, 16, 16, 4}));
    EXPECT_EQ(gathered.micro_batches, 7);
    EXPECT_EQ(gathered.weight, 100);
    EXPECT_EQ(gathered.loss_sum, 5050);
    EXPECT_EQ(gathered.loss(), 50.5);
    EXPECT_EQ(gathered.gradient_norm, 50.5);
    EXPECT_EQ(slope.gradient(), 5050);  // the sum: divided when applied
}

TEST(Gatherer, GivesTheNormOfTheMeanGradientOfAllParameters) {
    const at::Tensor a = at::ones({1}, at::kDouble).requires_grad_();
    const at::Tensor b = at::ones({1}, at::kFloat).requires_grad_();
    Gatherer gatherer(Parameters{{"a", a}, {"b", b}});
    gatherer.begin();
    gatherer.add({(a * 6).sum(), 0.5});
    gatherer.add({(b * 8).sum(), 1.5});
    const Gathered gathered = gatherer.finish();
    EXPECT_EQ(gathered.gradient_norm, 5.0);  // (6, 8) / 2
    ASSERT_EQ(gathered.sums.size(), 2u);
    EXPECT_TRUE(gathered.sums[0].parameter.is_same(a));
    EXPECT_TRUE(gathered.sums[1].sum.is_same(b.grad()));
}

TEST(Gatherer, SumsTheLossInFp64) {
    Slope slope(at::kFloat);
    slope.gatherer.begin();
    slope.gatherer.add(slope.loss(16777216, 1));  // 2^24: in fp32 adding 1 to it changes nothing
    for (int i = 0; i < 5; ++i) slope.gatherer.add(slope.loss(1, 1));
    EXPECT_EQ(slope.gatherer.finish().loss_sum, 16777221);
}

TEST(Gatherer, TakesAnyOneElementSum) {
    Slope slope;
    slope.gatherer.begin();
    slope.gatherer.add({slope.value * 2, 1});
    slope.gatherer.add({(slope.value * 3).view({1, 1}), 1});
    slope.gatherer.add({(slope.value * 4).to(at::kFloat).squeeze(), 1});
    EXPECT_EQ(slope.gatherer.finish().loss_sum, 9);
    EXPECT_EQ(slope.gradient(), 9);
}

TEST(Gatherer, WeightZeroLeavesNoGradients) {
    Slope slope;
    slope.gatherer.begin();
    slope.gatherer.add(slope.loss(5, 0));
    slope.gatherer.add(slope.loss(7, -0.0));
    const Gathered gathered = slope.gatherer.finish();
    EXPECT_EQ(gathered.weight, 0);
    EXPECT_EQ(gathered.loss(), 0);
    EXPECT_EQ(gathered.gradient_norm, 0);
    EXPECT_FALSE(slope.value.grad().defined());
    EXPECT_TRUE(gathered.sums.empty());
}

TEST(Gatherer, DoesNotLookAtTheLossOfAMicroBatchOfWeightZero) {
    Slope slope;
    slope.gatherer.begin();
    slope.gatherer.add(slope.loss(3, 2));
    slope.gatherer.add(slope.loss(nan, 0));
    slope.gatherer.add(slope.loss(100, 0));
    slope.gatherer.add({at::scalar_tensor(infinity), 0});
    slope.gatherer.add({at::Tensor(), 0});
    const Gathered gathered = slope.gatherer.finish();
    EXPECT_EQ(gathered.loss_sum, 3);
    EXPECT_EQ(gathered.weight, 2);
    EXPECT_EQ(slope.gradient(), 3);
}

TEST(Gatherer, NoWindowWithoutMicroBatchesHasGradients) {
    Slope slope;
    slope.gatherer.begin();
    const Gathered gathered = slope.gatherer.finish();
    EXPECT_EQ(gathered.micro_batches, 0);
    EXPECT_EQ(gathered.weight, 0);
}

TEST(Gatherer, RefusesWeightsThatAreNotFiniteOrNegative) {
    for (double weight : {nan, infinity, -infinity, -1e-300, -5.0}) {
        Slope slope;
        slope.gatherer.begin();
        slope.gatherer.add(slope.loss(3, 1));
        expect_usage_error({"weight"}, [&] { slope.gatherer.add(slope.loss(3, weight)); });
        EXPECT_FALSE(slope.value.grad().defined()) << weight;
        expect_usage_error({"begin"}, [&] { slope.gatherer.add(slope.loss(3, 1)); });  // the window is closed
        slope.expect_works();
    }
}

TEST(Gatherer, RefusesSumsThatCannotBeDifferentiated) {
    Slope slope;
    const WeightedLoss wrong[] = {{at::ones({2}, at::kDouble) * slope.value, 1},
                                  {at::Tensor(), 1},
                                  {at::scalar_tensor(1.0), 1},
                                  {slope.value.detach() * 2, 1},
                                  {at::empty({0}, at::kDouble) * slope.value, 1}};
    for (const WeightedLoss& loss : wrong) {
        slope.gatherer.begin();
        expect_usage_error({"loss"}, [&] { slope.gatherer.add(loss); });
        slope.expect_works();
    }
}

TEST(Gatherer, RefusesALossOfParametersItDoesNotKnow) {
    const at::Tensor other = at::ones({1}, at::kDouble).requires_grad_();
    Slope slope;
    slope.gatherer.begin();
    expect_usage_error({"parameter"}, [&] {
        slope.gatherer.add({(other * 2).sum(), 1});
        slope.gatherer.finish();
    });
    slope.gatherer.clear();
    slope.expect_works();
}

TEST(Gatherer, RefusesEveryMisuseAndWorksAfterwards) {
    Slope slope;
    expect_usage_error({"begin"}, [&] { slope.gatherer.add(slope.loss(1, 1)); });
    slope.expect_works();
    expect_usage_error({"begin"}, [&] { slope.gatherer.finish(); });
    slope.expect_works();
    slope.gatherer.begin();
    slope.gatherer.add(slope.loss(1, 1));
    expect_usage_error({"finish()"}, [&] { slope.gatherer.begin(); });
    slope.gatherer.clear();
    slope.expect_works();
    slope.gatherer.begin();
    expect_usage_error({}, [&] { slope.gatherer.gather(Batch{{at::ones({2})}}, Plan{}, slope.function()); });
    slope.gatherer.clear();
    slope.expect_works();
    slope.gatherer.begin();
    expect_usage_error({}, [&] { slope.gatherer.track({{"more", at::ones({1}).requires_grad_()}}); });
    slope.gatherer.clear();
    slope.expect_works();
    expect_usage_error({"empty"}, [&] { slope.gatherer.gather(Batch{}, Plan{}, slope.function()); });
    slope.expect_works();
    expect_usage_error({"0"}, [&] { slope.gatherer.gather(Batch{{at::ones({2})}}, Plan{0}, slope.function()); });
    slope.expect_works();
}

TEST(Gatherer, RefusesToBeginWhileTheLastGradientsAreUnused) {
    Slope slope;
    slope.gatherer.gather(Batch{{at::ones({2}, at::kDouble)}}, Plan{1}, slope.function());
    expect_usage_error({"applied", "discarded"}, [&] { slope.gatherer.begin(); });
    EXPECT_EQ(slope.gradient(), 2);  // still there to be used
    slope.gatherer.clear();
    slope.expect_works();
}

TEST(Gatherer, RefusesParametersInWhichSumsStall) {
    for (at::ScalarType type : {at::kBFloat16, at::kHalf}) {
        const Parameters parameters{{"fine", at::ones({1})}, {"narrow.weight", at::ones({1}, type)}};
        expect_usage_error({"narrow.weight"}, [&] { Gatherer gatherer(parameters); });
        Slope slope;
        expect_usage_error({"narrow.weight"}, [&] { slope.gatherer.track(parameters); });
        slope.expect_works();
    }
}

/// What the samples add to the gradient of each parameter, as norms: what rounding is relative to. Where the samples
/// cancel, as in a tensor of one number they may, the norm of their sum is no measure of it.
std::vector<double> summed_norms(const Parameters& parameters, const Batch& batch, const LossFunction& loss) {
    std::vector<double> norms(parameters.size());
    const double weight = loss(batch).weight.value();
    for (std::int64_t i = 0; i < batch.size(); ++i) {
        loss(batch.slice(i, i + 1)).sum.backward();
        const Named gradients = gradients_of(parameters, weight);
        for (std::size_t p = 0; p < norms.size(); ++p) norms[p] += gradients[p].tensor.norm().item<double>();
        clear_gradients(parameters);
    }
    return norms;
}

/// A random shape, batch, split and weights: what holds for all of them.
void expect_any_cut_agrees(std::uint64_t seed, at::ScalarType type, double tolerance) {
    std::mt19937_64 random(seed);
    const auto draw = [&](std::int64_t low, std::int64_t high) {
        return low + static_cast<std::int64_t>(random() % static_cast<std::uint64_t>(high - low + 1));
    };
    const std::int64_t samples = draw(1, 60), inputs = draw(1, 7), hidden = draw(1, 9), outputs = draw(1, 4);
    const std::int64_t cut = draw(1, samples + 3);
    SCOPED_TRACE(testing::Message() << "seed " << seed << ": " << samples << " samples in " << cut);
    const auto model = make_mlp(seed, type, inputs, hidden, outputs);
    Batch batch = regression_batch(samples, seed, type, inputs, outputs);
    if (draw(0, 2) == 0) batch.fields[2].slice(0, 0, samples / 2).zero_();  // whole micro-batches without weight
    const Parameters parameters = parameters_of(model);
    Gatherer gatherer(parameters);
    const LossFunction loss = weighted_squares(model);
    const Gathered gathered = gatherer.gather(batch, {cut}, loss);
    const Named gradients = gradients_of(parameters, gathered.weight);
    gatherer.clear();
    const WeightedLoss whole = loss(batch);
    // 60 fp64 additions of positive numbers: at most 60 roundings of 1.1e-16.
    EXPECT_NEAR(gathered.weight / whole.weight.value(), 1, 1e-14);
    EXPECT_NEAR(gathered.loss_sum / whole.sum.item<double>(), 1, tolerance);
    EXPECT_EQ(gathered.micro_batches, (samples + cut - 1) / cut);
    const Named oracle = oracle_gradients(parameters, batch, loss);
    const std::vector<double> norms = summed_norms(parameters, batch, loss);
    for (std::size_t i = 0; i < oracle.size(); ++i) {
        EXPECT_LE((gradients[i].tensor - oracle[i].tensor).norm().item<double>(), tolerance * norms[i])
            << oracle[i].name;
    }
}

TEST(Gatherer, AgreesWithTheWholeBatchForAnyShapeCutAndWeights) {
    for (std::uint64_t seed = 1; seed <= 100; ++seed) {
        expect_any_cut_agrees(seed, at::kDouble, 1e-13);
        expect_any_cut_agrees(seed, at::kFloat, 1e-6);
    }
}

/// Whether a backward pass needs no second gradient as large as the weight's own.
bool sums_in_product(const at::Tensor& weight, const std::function<void(const at::Tensor&)>& backward) {
    const at::Tensor y = at::linear(at::ones({4, weight.size(1)}), weight).sum();
    const std::int64_t before = test::memory_use().live_bytes;
    test::reset_peak_memory();
    backward(y);
    return test::memory_use().peak_bytes - before < static_cast<std::int64_t>(weight.nbytes());
}

TEST(Gatherer, SumsWeightGradientsInTheirProductsWhileAWindowIsOpen) {
    install_budget_allocator();
    const at::Tensor weight = at::ones({128, 128}).requires_grad_();
    const auto end_by = [&](bool on, const std::function<void(Gatherer&)>& end) {
        Gatherer gatherer(Parameters{{"weight", weight}}, on);
        const auto alone = [](const at::Tensor& y) { y.backward(); };
        const auto added = [&](const at::Tensor& y) { gatherer.add({y, 1}); };
        weight.mutable_grad() = at::zeros({128, 128});
        EXPECT_FALSE(sums_in_product(weight, alone));
        weight.mutable_grad() = at::Tensor();
        gatherer.begin();
        EXPECT_FALSE(sums_in_product(weight, added));  // the first gradient is created, not added to
        EXPECT_EQ(sums_in_product(weight, added), on);
        end(gatherer);
        weight.mutable_grad() = at::zeros({128, 128});
        EXPECT_FALSE(sums_in_product(weight, alone));
        weight.mutable_grad() = at::Tensor();
    };
    for (const bool on : {true, false}) {
        end_by(on, [](Gatherer& gatherer) { gatherer.finish(); });
        end_by(on, [](Gatherer& gatherer) { gatherer.clear(); });
        end_by(on, [](Gatherer& gatherer) { EXPECT_THROW(gatherer.add({at::Tensor(), 1}), Error); });
        end_by(on, [](Gatherer& gatherer) { const Gatherer gone = std::move(gatherer); });
    }
}

TEST(Gatherer, HasTheBitsOfALoopInTorchWhereProductsDoNotSum) {
    const auto model = make_mlp(1, at::kFloat, 20, 30, 10);
    const Parameters parameters = parameters_of(*model);
    const Batch batch = regression_batch(50, 2, at::kFloat, 20, 10);
    const LossFunction loss = weighted_squares(model);
    const auto gather = [&](bool on) {
        Gatherer gatherer(parameters, on);
        gatherer.gather(batch, {16}, loss);
        const Named gradients = gradients_of(parameters);
        gatherer.clear();
        return gradients;
    };
    for (const std::int64_t i : {0, 16, 32, 48}) {
        loss(batch.slice(i, std::min<std::int64_t>(i + 16, 50))).sum.backward();
    }
    const Named plain = gradients_of(parameters);
    clear_gradients(parameters);
    expect_same_bits(gather(false), plain);
    expect_agree(gather(true), plain, 1e-6);
}

}  // namespace
}  // namespace microbatch
