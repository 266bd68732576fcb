#include "microbatch/analysis/curvature.h"

#include <ATen/ATen.h>
#include <torch/csrc/autograd/autograd.h>

#include <limits>

#include "support/errors.h"
#include "support/gradients.h"
#include "support/jobs.h"
#include "support/models.h"
#include "support/tensors.h"

namespace microbatch {
namespace {

using namespace test;

/// Loss of a sample x with weight w: w/2 x'x-independent quadratic theta' A theta / 2, A with known eigenvalues.
struct Quadratic {
    at::Tensor theta, matrix;
    Parameters parameters;

    Quadratic(const std::vector<double>& eigenvalues, at::ScalarType type, std::uint64_t seed = 1) {
        const auto size = static_cast<std::int64_t>(eigenvalues.size());
        at::Generator random = generator(seed);
        const at::Tensor basis = std::get<0>(at::linalg_qr(normal({size, size}, random)));
        const at::Tensor values = test::tensor_of(at::ArrayRef<double>(eigenvalues), at::kDouble);
        matrix = basis.matmul(at::diag(values)).matmul(basis.t()).to(type);
        theta = normal({size}, random, type).requires_grad_();
        parameters = {{"theta", theta}};
    }
    LossFunction loss() const {
        return [this](const Batch& batch) -> WeightedLoss {
            const double weight = batch.fields[0].sum().item<double>();
            return {0.5 * weight * theta.dot(matrix.mv(theta)), weight};
        };
    }
};

Batch weights(std::vector<double> values) {
    return {{test::tensor_of(at::ArrayRef<double>(values), at::kDouble)}};
}

TEST(Curvature, IsTheLargestEigenvalueOfAQuadratic) {
    const std::vector<std::vector<double>> spectra = {
        {1, 2, 3}, {5, 0.1, 0.01, 0.001}, {-9, 2, 1}, {-3, -2, -1}, {1e4, 1, 1, 1, 1}, {4}, {2, 2, 2, 2}, {0, 0, 7}};
    for (const auto& spectrum : spectra) {
        for (const at::ScalarType type : {at::kDouble, at::kFloat}) {
            const Quadratic problem(spectrum, type);
            const double wanted = *std::max_element(spectrum.begin(), spectrum.end());
            const Curvature found =
                largest_curvature(problem.parameters, weights({1, 2, 0.5, 0, 3}), 2, problem.loss());
            EXPECT_NEAR(found.largest_eigenvalue / wanted, 1, 1e-4) << wanted;
            EXPECT_LE(found.products, static_cast<std::int64_t>(spectrum.size()) + 2);
        }
    }
}

TEST(Curvature, FindsTheTopOfAWideSpectrumInFewProducts) {
    std::vector<double> spectrum;
    for (int i = 0; i < 200; ++i) spectrum.push_back(std::exp(-i / 20.0));
    spectrum[0] = 3.0;
    const Quadratic problem(spectrum, at::kDouble);
    const Curvature found = largest_curvature(problem.parameters, weights({1}), 1, problem.loss());
    EXPECT_NEAR(found.largest_eigenvalue, 3.0, 3e-4);
    EXPECT_TRUE(found.converged);
    EXPECT_LE(found.residual, 3e-5);
    EXPECT_LT(found.products, 40);
}

TEST(Curvature, OfANetworkIsThatOfItsWholeHessianHoweverTheBatchIsSplit) {
    const auto model = make_mlp(1);
    const Parameters parameters = parameters_of(model);
    const LossFunction loss = weighted_squares(model);
    Batch batch = regression_batch(9, 2);
    batch.fields[2] = at::rand({9}, at::kDouble) + 0.5;
    // The Hessian row by row, by autograd.
    const WeightedLoss whole = loss(batch);
    std::vector<at::Tensor> tensors;
    for (const Parameter& one : parameters) tensors.push_back(one.tensor);
    const auto gradients = torch::autograd::grad({whole.sum / whole.weight.value()}, tensors, {}, true, true);
    std::vector<at::Tensor> flat, rows;
    for (const at::Tensor& one : gradients) flat.push_back(one.reshape({-1}));
    const at::Tensor gradient = at::cat(flat);
    for (std::int64_t i = 0; i < gradient.numel(); ++i) {
        std::vector<at::Tensor> row;
        const auto parts = torch::autograd::grad({gradient[i]}, tensors, {}, true, false, true);
        for (std::size_t j = 0; j < parts.size(); ++j) {
            row.push_back(parts[j].defined() ? parts[j].reshape({-1}) : at::zeros({tensors[j].numel()}, at::kDouble));
        }
        rows.push_back(at::cat(row));
    }
    const double wanted = at::linalg_eigvalsh(at::stack(rows)).max().item<double>();
    for (const std::int64_t cut : {1, 4, 9}) {
        const Curvature found = largest_curvature(parameters, batch, cut, loss, {.most_products = 100});
        EXPECT_NEAR(found.largest_eigenvalue / wanted, 1, 1e-6) << cut;
        EXPECT_TRUE(found.converged);
    }
    for (const Parameter& one : parameters) EXPECT_FALSE(one.tensor.grad().defined());
}

TEST(Curvature, GoesWithTheModelsThatThereAre) {
    Job gpt = gpt_job({.layers = 2, .heads = 2, .width = 16, .length = 8, .vocabulary = 32});
    Job resnet = resnet_job({.channels = 1, .classes = 4, .width = 8, .blocks = 1, .norm = ImageNorm::group});
    Job batch_norm = resnet_job({.channels = 1, .classes = 4, .width = 8, .blocks = 1, .norm = ImageNorm::batch});
    Job mlp = mlp_job({.inputs = 12, .layers = 1, .width = 16, .classes = 4});
    for (Job* job : {&gpt, &resnet, &batch_norm, &mlp}) {
        const Batch batch = job->make_batch(6);
        job->model->eval();
        const Named before = job->state();
        const Curvature whole = largest_curvature(job->parameters, batch, 6, job->loss);
        const Curvature cut = largest_curvature(job->parameters, batch, 4, job->loss);
        EXPECT_GT(whole.largest_eigenvalue, 0);
        EXPECT_NEAR(cut.largest_eigenvalue / whole.largest_eigenvalue, 1, 1e-2);
        expect_same_bits(job->state(), before);
    }
}

TEST(Curvature, RefusesWhatHasNone) {
    const Quadratic problem({1, 2}, at::kDouble);
    expect_usage_error({"weight 0"}, [&] {
        largest_curvature(problem.parameters, weights({0, 0}), 1, problem.loss());
    });
    expect_usage_error({"micro"}, [&] { largest_curvature(problem.parameters, weights({1}), 0, problem.loss()); });
    expect_usage_error({"no parameter"}, [&] {
        largest_curvature({{"frozen", at::ones({2})}}, weights({1}), 1, problem.loss());
    });
    const Quadratic broken({std::numeric_limits<double>::quiet_NaN(), 1}, at::kDouble);
    expect_usage_error({"not finite"}, [&] { largest_curvature(broken.parameters, weights({1}), 1, broken.loss()); });
}

TEST(LossesAlong, AreTheLossAtEveryDistanceAndLeaveTheParameters) {
    const auto model = make_mlp(1);
    const Parameters parameters = parameters_of(model);
    const LossFunction loss = weighted_squares(model);
    const Batch batch = regression_batch(9, 2);
    const Named before = values_of(parameters);
    const std::vector<double> found = losses_along(parameters, {-1, 0, 1}, 5, batch, 4, loss);
    const WeightedLoss here = loss(batch);
    EXPECT_NEAR(found[1], here.sum.item<double>() / here.weight.value(), 1e-12);
    EXPECT_NE(found[0], found[1]);
    EXPECT_NE(found[2], found[1]);
    expect_same_bits(values_of(parameters), before);
    EXPECT_EQ(losses_along(parameters, {-1, 0, 1}, 5, batch, 4, loss), found);
    int calls = 0;
    const LossFunction fails = [&](const Batch& micro) {
        if (++calls == 5) throw std::runtime_error("loss");
        return loss(micro);
    };
    EXPECT_THROW(losses_along(parameters, {1, 2, 3}, 5, batch, 4, fails), std::runtime_error);
    expect_same_bits(values_of(parameters), before);
}

TEST(LossesAlong, ADistanceMeansTheSameWhateverTheScaleOfTheFilters) {
    // Without a norm between them two linear layers compute the same with one scaled up and the other down.
    at::manual_seed(3);
    const at::Tensor first = at::randn({4, 3}, at::kDouble).requires_grad_(),
                     second = at::randn({2, 4}, at::kDouble).requires_grad_();
    const Parameters parameters{{"first", first}, {"second", second}};
    const at::Tensor x = at::randn({5, 3}, at::kDouble);
    const LossFunction loss = [&](const Batch&) -> WeightedLoss {
        return {x.matmul(first.t()).matmul(second.t()).square().sum(), 1.0};
    };
    const std::vector<double> plain = losses_along(parameters, {0.5, 1}, 7, {{x}}, 5, loss);
    {
        const at::NoGradGuard no_grad;
        at::Tensor(first).mul_(10);
        at::Tensor(second).mul_(0.1);
    }
    const std::vector<double> scaled = losses_along(parameters, {0.5, 1}, 7, {{x}}, 5, loss);
    for (std::size_t i = 0; i < 2; ++i) EXPECT_NEAR(scaled[i] / plain[i], 1, 1e-9);
}

}  // namespace
}  // namespace microbatch
