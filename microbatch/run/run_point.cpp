#include "microbatch/run/run_point.h"

#include <ATen/core/grad_mode.h>
#include <torch/nn/module.h>

#include <numeric>

#include "microbatch/core/error.h"

namespace microbatch {
namespace {

std::vector<at::Tensor> weights_of(const Accumulator& accumulator) {
    std::vector<at::Tensor> tensors;
    for (const Parameter& parameter : accumulator.parameters()) tensors.push_back(parameter.tensor);
    if (accumulator.model() == nullptr) return tensors;
    for (const at::Tensor& buffer : accumulator.model()->buffers()) tensors.push_back(buffer);
    return tensors;
}

std::ptrdiff_t sum_of(const std::vector<std::size_t>& counts) {
    return std::accumulate(counts.begin(), counts.end(), std::ptrdiff_t{0});
}

}  // namespace

struct RunPoint::Live {
    std::vector<at::Tensor> tensors;
    std::vector<std::size_t> state_counts;

    explicit Live(const Accumulator& accumulator) : tensors(weights_of(accumulator)) {
        for (const auto& state : accumulator.optimizer().state()) {
            tensors.insert(tensors.end(), state.begin(), state.end());
            state_counts.push_back(state.size());
        }
    }

    std::shared_ptr<const Snapshot> copy(std::int64_t memory_bytes, const std::filesystem::path& file) const {
        if (bytes_of(tensors) <= memory_bytes) return std::make_shared<const Snapshot>(tensors);
        if (!file.empty()) return std::make_shared<const Snapshot>(tensors, file);
        throw Error(ErrorKind::usage, "it does not fit the memory that is left for it");
    }
};

RunPoint::RunPoint(const Accumulator& accumulator, std::int64_t memory_bytes, const std::filesystem::path& file)
    : RunPoint(Live(accumulator), memory_bytes, file) {}

RunPoint::RunPoint(const Live& live, std::int64_t memory_bytes, const std::filesystem::path& file)
    : snapshot_(live.copy(memory_bytes, file)), state_counts_(live.state_counts) {}

void RunPoint::move_to(const std::filesystem::path& file) {
    if (file.empty()) throw Error(ErrorKind::usage, "there is no folder for it");
    snapshot_ = std::make_shared<const Snapshot>(snapshot_->tensors(), file);
}

void RunPoint::put_back(Accumulator& accumulator) const {
    const at::NoGradGuard no_grad;
    const Live live(accumulator);
    if (accumulator.optimizer().owns_state() && live.state_counts == state_counts_) {
        snapshot_->copy_into(live.tensors);
        return;
    }
    const std::vector<at::Tensor> saved = snapshot_->tensors();
    const std::vector<at::Tensor> weights(live.tensors.begin(), live.tensors.end() - sum_of(live.state_counts));
    if (static_cast<std::ptrdiff_t>(saved.size()) !=
        static_cast<std::ptrdiff_t>(weights.size()) + sum_of(state_counts_)) {
        throw Error(ErrorKind::usage, "a snapshot is of other parameters than there are now");
    }
    auto next = saved.begin() + static_cast<std::ptrdiff_t>(weights.size());
    OptimizerState state;
    for (const std::size_t count : state_counts_) {
        state.emplace_back(next, next + static_cast<std::ptrdiff_t>(count));
        next += static_cast<std::ptrdiff_t>(count);
    }
    for (std::size_t i = 0; i < weights.size(); ++i) {
        if (weights[i].sizes() != saved[i].sizes()) {
            throw Error(ErrorKind::usage, "a snapshot is of tensors of other shapes");
        }
    }
    accumulator.optimizer().restore(state);
    for (std::size_t i = 0; i < weights.size(); ++i) at::Tensor(weights[i]).copy_(saved[i]);
}

}  // namespace microbatch
