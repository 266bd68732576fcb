#pragma once

#include <ATen/ATen.h>
#include <ATen/CPUGeneratorImpl.h>
#include <torch/nn/module.h>
#include <torch/nn/modules/linear.h>

#include <cstdint>
#include <memory>
#include <utility>
#include <vector>

#include "microbatch/data/dataset.h"
#include "microbatch/step/loss.h"
#include "support/one_thread.h"
#include "support/tensors.h"

namespace microbatch::test {

/// A generator of the test's own, so that nothing else moves its numbers.
inline at::Generator generator(std::uint64_t seed) {
    return at::make_generator<at::CPUGeneratorImpl>(seed);
}

/// Drawn in fp64 and rounded: the same data for every type.
inline at::Tensor normal(at::IntArrayRef shape, at::Generator& random, at::ScalarType type = at::kDouble) {
    return at::randn(shape, random, at::TensorOptions().dtype(at::kDouble)).to(type);
}

/// Sample weights in fp64, log-uniform over [1e-3, 1e6], both ends among them where there are two samples.
inline at::Tensor wide_weights(std::int64_t samples, at::Generator& random) {
    const at::Tensor exponents = at::rand({samples}, random, at::TensorOptions().dtype(at::kDouble)) * 9 - 3;
    if (samples > 0) exponents[0] = -3.0;
    if (samples > 1) exponents[1] = 6.0;
    return at::pow(at::scalar_tensor(10.0, at::kDouble), exponents);
}

/// Two linear layers with tanh between them: smooth, so that rounding never flips a unit.
struct TanhMlp : torch::nn::Module {
    TanhMlp(std::int64_t inputs, std::int64_t hidden, std::int64_t outputs)
        : first(register_module("first", torch::nn::Linear(inputs, hidden))),
          second(register_module("second", torch::nn::Linear(hidden, outputs))) {}

    at::Tensor forward(const at::Tensor& x) { return second->forward(at::tanh(first->forward(x))); }

    torch::nn::Linear first, second;
};

inline std::shared_ptr<TanhMlp> make_mlp(std::uint64_t seed, at::ScalarType type = at::kDouble, std::int64_t inputs = 3,
                                         std::int64_t hidden = 5, std::int64_t outputs = 2) {
    at::manual_seed(seed);
    auto model = std::make_shared<TanhMlp>(inputs, hidden, outputs);
    model->to(type);
    return model;
}

/// Fields: inputs, wanted outputs, weights of the samples (fp64).
inline Batch regression_batch(std::int64_t samples, std::uint64_t seed, at::ScalarType type = at::kDouble,
                              std::int64_t inputs = 3, std::int64_t outputs = 2) {
    at::Generator random = generator(seed);
    const at::Tensor x = normal({samples, inputs}, random, type);
    const at::Tensor y = normal({samples, outputs}, random, type);
    return {{x, y, wide_weights(samples, random)}};
}

/// Squared errors times the sample's weight, summed; averaged over the weights.
inline LossFunction weighted_squares(std::shared_ptr<TanhMlp> model) {
    return [model](const Batch& batch) -> WeightedLoss {
        const at::Tensor squares = (model->forward(batch.fields[0]) - batch.fields[1]).square().sum(1);
        const at::Tensor& weights = batch.fields[2];
        return {(squares * weights.to(squares.scalar_type())).sum(), weights.sum().item<double>()};
    };
}

/// The rows of some tensors.
class TensorDataset : public Dataset {
public:
    explicit TensorDataset(Batch rows, std::int64_t tokens_per_sample = 1)
        : rows_(std::move(rows)), tokens_per_sample_(tokens_per_sample) {}

    std::int64_t size() const override { return rows_.size(); }
    std::int64_t tokens_per_sample() const override { return tokens_per_sample_; }
    Batch get(std::span<const std::int64_t> indices) const override {
        const at::Tensor rows = tensor_of(at::ArrayRef<std::int64_t>(indices.data(), indices.size()), at::kLong);
        Batch batch;
        for (const at::Tensor& field : rows_.fields) batch.fields.push_back(field.index_select(0, rows));
        return batch;
    }

    Batch& rows() { return rows_; }

private:
    Batch rows_;
    std::int64_t tokens_per_sample_;
};

}  // namespace microbatch::test
