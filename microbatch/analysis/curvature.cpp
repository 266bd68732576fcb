#include "microbatch/analysis/curvature.h"

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/TensorOperators.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/linalg_eigh.h>
#include <ATen/ops/randn.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>
#include <c10/util/ScopeExit.h>
#include <torch/csrc/autograd/autograd.h>

#include <cmath>
#include <functional>
#include <limits>

#include "microbatch/core/batch_plan.h"
#include "microbatch/core/error.h"
#include "microbatch/optim/clipping.h"

namespace microbatch {
namespace {

using Vector = std::vector<at::Tensor>;

Vector trainable(const Parameters& parameters) {
    Vector tensors;
    for (const Parameter& one : without_repeats(parameters)) {
        if (one.tensor.requires_grad()) tensors.push_back(one.tensor);
    }
    require_that(!tensors.empty(), "curvature: no parameter requires a gradient");
    return tensors;
}

// Drawn in fp64 and rounded: the same vector for every type, device and number of threads.
Vector random_like(const Vector& tensors, std::uint64_t seed) {
    at::Generator generator = at::make_generator<at::CPUGeneratorImpl>(seed);
    Vector result;
    for (const at::Tensor& tensor : tensors) {
        result.push_back(at::randn(tensor.sizes(), generator, at::TensorOptions(at::kDouble)).to(tensor.options()));
    }
    return result;
}

double dot(const Vector& left, const Vector& right) {
    double sum = 0.0;
    for (std::size_t i = 0; i < left.size(); ++i) {
        sum += (left[i] * right[i]).sum(at::kDouble).item<double>();
    }
    return sum;
}

// left += factor * right
void add(Vector& left, const Vector& right, double factor) {
    for (std::size_t i = 0; i < left.size(); ++i) left[i].add_(right[i], factor);
}

void scale(Vector& vector, double factor) {
    for (at::Tensor& tensor : vector) tensor.mul_(factor);
}

void for_each_micro_batch(const BatchSource& batch, std::int64_t micro_batch,
                          const std::function<void(const Batch&)>& call) {
    const std::int64_t count = micro_batch_count(batch.size(), micro_batch);
    for (std::int64_t i = 0; i < count; ++i) {
        call(batch.fetch(micro_batch_slice(batch.size(), micro_batch, i)));
    }
}

[[noreturn]] void refuse_weight() {
    throw Error(ErrorKind::usage, "curvature: the batch has weight 0, so its mean loss is undefined");
}

class Hessian {
public:
    Hessian(const Vector& parameters, const BatchSource& batch, std::int64_t micro_batch, const LossFunction& loss)
        : parameters_(parameters), batch_(batch), micro_batch_(micro_batch), loss_(loss) {}

    Vector times(const Vector& vector) const {
        Vector sums;
        for (const at::Tensor& parameter : parameters_) sums.push_back(at::zeros_like(parameter));
        double weight = 0.0;
        for_each_micro_batch(batch_, micro_batch_, [&](const Batch& micro) {
            const WeightedLoss loss = loss_(micro);
            const double own = weight_of(loss);
            if (own == 0.0) return;
            weight += own;
            add_product(loss.sum, vector, sums);
        });
        if (weight == 0.0) refuse_weight();
        scale(sums, 1.0 / weight);
        return sums;
    }

private:
    // The gradient of (gradient . vector).
    void add_product(const at::Tensor& loss, const Vector& vector, Vector& sums) const {
        const Vector gradients = torch::autograd::grad({loss}, parameters_, {}, std::nullopt, /*create_graph=*/true,
                                                       /*allow_unused=*/true);
        Vector outputs, weights;
        for (std::size_t i = 0; i < gradients.size(); ++i) {
            // A gradient that depends on nothing contributes nothing to the Hessian.
            if (!gradients[i].defined() || !gradients[i].requires_grad()) continue;
            outputs.push_back(gradients[i]);
            weights.push_back(vector[i]);
        }
        if (outputs.empty()) return;
        const Vector products = torch::autograd::grad(outputs, parameters_, weights, /*retain_graph=*/false,
                                                      /*create_graph=*/false, /*allow_unused=*/true);
        const at::NoGradGuard no_grad;
        for (std::size_t i = 0; i < products.size(); ++i) {
            if (products[i].defined()) sums[i].add_(products[i]);
        }
    }

    const Vector& parameters_;
    const BatchSource& batch_;
    std::int64_t micro_batch_;
    const LossFunction& loss_;
};

/// The largest eigenvalue of the tridiagonal matrix, and the last component of its vector.
struct Ritz {
    double value, last;
};

Ritz largest_ritz(const std::vector<double>& diagonal, const std::vector<double>& beside) {
    const auto size = static_cast<std::int64_t>(diagonal.size());
    const at::Tensor matrix = at::zeros({size, size}, at::TensorOptions(at::kCPU).dtype(at::kDouble));
    auto entries = matrix.accessor<double, 2>();
    for (std::int64_t i = 0; i < size; ++i) {
        entries[i][i] = diagonal[static_cast<std::size_t>(i)];
        if (i + 1 < size) entries[i][i + 1] = entries[i + 1][i] = beside[static_cast<std::size_t>(i)];
    }
    const auto [values, vectors] = at::linalg_eigh(matrix);
    return {values[size - 1].item<double>(), std::abs(vectors[size - 1][size - 1].item<double>())};
}

}  // namespace

Curvature largest_curvature(const Parameters& parameters, const BatchSource& batch, std::int64_t micro_batch,
                            const LossFunction& loss, const LanczosOptions& options) {
    const at::AutoGradMode gradients(true);
    const Vector tensors = trainable(parameters);
    const Hessian hessian(tensors, batch, micro_batch, loss);
    Vector before, now = random_like(tensors, options.seed);
    scale(now, 1.0 / joint_norm(now));
    std::vector<double> diagonal, beside;
    Curvature found;
    while (found.products < options.most_products && !found.converged) {
        Vector next = hessian.times(now);
        ++found.products;
        const at::NoGradGuard no_grad;
        diagonal.push_back(dot(next, now));
        add(next, now, -diagonal.back());
        if (!before.empty()) add(next, before, -beside.back());
        const double length = joint_norm(next);
        require_that(std::isfinite(diagonal.back()) && std::isfinite(length),
                     "curvature: a product with the Hessian is not finite at these parameters");
        const Ritz ritz = largest_ritz(diagonal, beside);
        found.largest_eigenvalue = ritz.value;
        found.residual = length * ritz.last;
        found.converged = found.residual <= options.tolerance * std::abs(ritz.value);
        if (length == 0.0) break;  // the vectors so far span everything
        beside.push_back(length);
        scale(next, 1.0 / length);
        before = std::move(now);
        now = std::move(next);
    }
    return found;
}

namespace {

/// Gives each row the norm of the parameter's row; biases and norms are not moved.
void normalise(at::Tensor& direction, const at::Tensor& parameter) {
    if (parameter.dim() < 2) {
        direction.zero_();
        return;
    }
    const at::Tensor rows = direction.flatten(1), own = parameter.flatten(1);
    const at::Tensor lengths = rows.norm(2, 1, /*keepdim=*/true).clamp_min(std::numeric_limits<float>::min());
    direction = (rows / lengths * own.norm(2, 1, /*keepdim=*/true)).view(parameter.sizes());
}

double mean_loss_of(const BatchSource& batch, std::int64_t micro_batch, const LossFunction& loss) {
    const at::NoGradGuard no_grad;
    double sum = 0.0, weight = 0.0;
    for_each_micro_batch(batch, micro_batch, [&](const Batch& micro) {
        const WeightedLoss one = loss(micro);
        const double own = weight_of(one);
        if (own == 0.0) return;
        sum += one.sum.item<double>();
        weight += own;
    });
    if (weight == 0.0) refuse_weight();
    return sum / weight;
}

}  // namespace

std::vector<double> losses_along(const Parameters& parameters, const std::vector<double>& distances, std::uint64_t seed,
                                 const BatchSource& batch, std::int64_t micro_batch, const LossFunction& loss) {
    const Vector tensors = trainable(parameters);
    Vector direction = random_like(tensors, seed), before;
    for (const at::Tensor& tensor : tensors) before.push_back(tensor.detach().clone());
    for (std::size_t i = 0; i < tensors.size(); ++i) normalise(direction[i], before[i]);
    const auto move_by = [&](double distance) {
        const at::NoGradGuard no_grad;
        for (std::size_t i = 0; i < tensors.size(); ++i) {
            tensors[i].copy_(before[i]);
            if (distance != 0.0) tensors[i].add_(direction[i], distance);
        }
    };
    const auto put_back = c10::make_scope_exit([&] { move_by(0.0); });
    std::vector<double> losses;
    for (const double distance : distances) {
        move_by(distance);
        losses.push_back(mean_loss_of(batch, micro_batch, loss));
    }
    return losses;
}

}  // namespace microbatch
