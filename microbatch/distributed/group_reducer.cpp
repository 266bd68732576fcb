#include "microbatch/distributed/group_reducer.h"

#include <ATen/core/grad_mode.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/tensor.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <nlohmann/json.hpp>

#include "microbatch/core/crc32c.h"
#include "microbatch/core/error.h"
#include "microbatch/memory/reclaim.h"
#include "microbatch/optim/clipping.h"

namespace microbatch {
namespace {

// Small tensors are summed together, in pieces of so many bytes: a call costs as much as a megabyte.
constexpr std::int64_t small_bytes = std::int64_t{1} << 20;

std::string text_of(const GatherFailure& failure) {
    return nlohmann::json{{"out_of_memory", failure.out_of_memory},
                          {"message", failure.message},
                          {"shape", failure.shape},
                          {"micro_batch", failure.plan.micro_batch},
                          {"recompute", failure.plan.recompute},
                          {"batch_norm", static_cast<int>(failure.plan.batch_norm)},
                          {"rank", failure.rank}}
        .dump(-1, ' ', false, nlohmann::json::error_handler_t::replace);
}

GatherFailure failure_from(const std::string& text) {
    const auto document = nlohmann::json::parse(text);
    return {.out_of_memory = document["out_of_memory"],
            .message = document["message"],
            .shape = document["shape"].get<SampleShape>(),
            .plan = {.micro_batch = document["micro_batch"],
                     .recompute = document["recompute"],
                     .batch_norm = static_cast<BatchNorm>(document["batch_norm"].get<int>())},
            .rank = document["rank"]};
}

/// Sums small tensors in one piece of memory.
class Piece {
public:
    bool takes(const at::Tensor& tensor) const {
        return tensors_.empty() ||
               (bytes_ + static_cast<std::int64_t>(tensor.nbytes()) <= small_bytes &&
                tensor.scalar_type() == tensors_.front().scalar_type() && tensor.device() == tensors_.front().device());
    }

    void add(const at::Tensor& tensor) {
        tensors_.push_back(tensor);
        bytes_ += static_cast<std::int64_t>(tensor.nbytes());
    }

    at::Tensor joined() const {
        std::int64_t count = 0;
        for (const at::Tensor& one : tensors_) count += one.numel();
        at::Tensor all = at::empty({count}, tensors_.front().options().memory_format(std::nullopt));
        each_part(all, [](const at::Tensor& part, const at::Tensor& one) { part.copy_(one); });
        return all;
    }

    void take_back(const at::Tensor& all) const {
        each_part(all, [](const at::Tensor& part, const at::Tensor& one) { one.copy_(part); });
    }

private:
    template <class Copy>
    void each_part(const at::Tensor& all, const Copy& copy) const {
        std::int64_t at = 0;
        for (const at::Tensor& one : tensors_) {
            copy(all.slice(0, at, at + one.numel()).view(one.sizes()), one);
            at += one.numel();
        }
    }

    std::vector<at::Tensor> tensors_;
    std::int64_t bytes_ = 0;
};

// The memory of one piece at a time.
void sum_all(Group& group, const std::vector<at::Tensor>& tensors) {
    std::vector<at::Tensor> large;
    std::vector<Piece> pieces;
    for (const at::Tensor& one : tensors) {
        if (static_cast<std::int64_t>(one.nbytes()) >= small_bytes && one.is_non_overlapping_and_dense()) {
            large.push_back(one);
            continue;
        }
        if (pieces.empty() || !pieces.back().takes(one)) pieces.emplace_back();
        pieces.back().add(one);
    }
    group.sum(large);
    for (const Piece& piece : pieces) {
        const at::Tensor all = piece.joined();
        group.sum({all});
        piece.take_back(all);
    }
}

}  // namespace

std::optional<GatherFailure> GroupReducer::agree(const std::optional<GatherFailure>& mine) {
    const std::vector<std::string> all = group_->gather_bytes(mine ? text_of(*mine) : "");
    std::optional<GatherFailure> gravest;
    for (const std::string& text : all) {
        if (text.empty()) continue;
        const GatherFailure failure = failure_from(text);
        if (!gravest || (gravest->out_of_memory && !failure.out_of_memory)) gravest = failure;
    }
    return gravest;
}

// Added up in the order of the ranks, so that all have the same bits.
void GroupReducer::sum_totals(Gathered& gathered) {
    const at::Tensor mine =
        at::tensor({gathered.loss_sum, gathered.weight, static_cast<double>(gathered.micro_batches),
                    static_cast<double>(gathered.parts.count), gathered.parts.weight, gathered.parts.squares,
                    static_cast<double>(gathered.plan.micro_batch), gathered.plan.recompute ? 1.0 : 0.0},
                   at::kDouble);
    Gathered total{.plan = gathered.plan};
    total.plan.micro_batch = 1;
    for (const at::Tensor& one : group_->gather(mine)) {
        const double* value = one.const_data_ptr<double>();
        total.loss_sum += value[0];
        total.weight += value[1];
        total.micro_batches += static_cast<std::int64_t>(value[2]);
        total.parts.count += static_cast<std::int64_t>(value[3]);
        total.parts.weight += value[4];
        total.parts.squares += value[5];
        // The largest: a smaller share does not mean that memory ran out.
        total.plan.micro_batch = std::max(total.plan.micro_batch, static_cast<std::int64_t>(value[6]));
        total.plan.recompute = total.plan.recompute || value[7] != 0.0;
    }
    gathered = std::move(total);
}

// Where only some ranks have a gradient, the others have one of zeros.
void GroupReducer::add_missing_gradients(const Parameters& parameters) {
    at::Tensor have = at::zeros({static_cast<std::int64_t>(parameters.size())}, at::kByte);
    auto* const mine = have.mutable_data_ptr<std::uint8_t>();
    for (std::size_t i = 0; i < parameters.size(); ++i) mine[i] = parameters[i].tensor.grad().defined() ? 1 : 0;
    std::vector<bool> any(parameters.size(), false);
    bool differ = false;
    for (const at::Tensor& one : group_->gather(have)) {
        const auto* const theirs = one.const_data_ptr<std::uint8_t>();
        for (std::size_t i = 0; i < parameters.size(); ++i) {
            any[i] = any[i] || theirs[i] != 0;
            differ = differ || theirs[i] != mine[i];
        }
    }
    if (!differ) return;  // the same on all: if two differ, every rank differs from one of them
    std::string out_of_memory;
    const auto added = unless_oom(
        [&] {
            for (std::size_t i = 0; i < parameters.size(); ++i) {
                const at::Tensor& parameter = parameters[i].tensor;
                if (any[i] && !parameter.grad().defined()) parameter.mutable_grad() = at::zeros_like(parameter);
            }
        },
        &out_of_memory);
    if (group_->any(!added)) TORCH_CHECK_WITH(OutOfMemoryError, false, "a gradient of zeros: ", out_of_memory);
}

Gathered GroupReducer::reduce(Gathered gathered, const Parameters& parameters, double scale) {
    const at::NoGradGuard no_grad;
    sum_totals(gathered);
    add_missing_gradients(parameters);
    gathered.sums = gradients_in(tensors_of(parameters));
    if (gathered.weight == 0.0) {
        for (const Parameter& parameter : parameters) parameter.tensor.mutable_grad() = at::Tensor();
        gathered.sums.clear();
        return gathered;
    }
    try {
        sum_all(*group_, sums_of(gathered.sums));
    } catch (const c10::OutOfMemoryError& error) {
        const std::string message = error.what_without_backtrace();
        abandon(message);  // the others wait in the middle of the sums
        throw Error(ErrorKind::does_not_fit, "out of memory while gradients are summed over processes: ", message,
                    ": raise the memory budget by some megabytes");
    }
    // Rank 0's, should another processor add in another order.
    const at::Tensor norm = at::tensor({joint_norm(sums_of(gathered.sums))}, at::kDouble);
    gathered.gradient_norm = group_->gather(norm).front().item<double>() / (gathered.weight * scale);
    return gathered;
}

std::vector<at::Tensor> GroupReducer::gather(const at::Tensor& mine) {
    const at::Tensor flat = mine.cpu().contiguous();
    const std::string bytes(static_cast<const char*>(flat.const_data_ptr()), flat.nbytes());
    std::vector<at::Tensor> all;
    for (const std::string& one : group_->gather_bytes(bytes)) {
        at::Tensor theirs = at::empty({static_cast<std::int64_t>(one.size() / flat.element_size())}, flat.options());
        std::copy(one.begin(), one.end(), static_cast<char*>(theirs.mutable_data_ptr()));
        all.push_back(std::move(theirs));
    }
    return all;
}

void share_from_first(Group& group, const Parameters& parameters, const NamedTensors& buffers) {
    const at::NoGradGuard no_grad;
    NamedTensors all = parameters;
    all.insert(all.end(), buffers.begin(), buffers.end());
    std::string names;
    for (const NamedTensor& one : all) {
        names += str_cat(one.name, " ", one.tensor.sizes(), " ", c10::toString(one.tensor.scalar_type()), "\n");
    }
    const std::vector<std::string> theirs = group.gather_bytes(names);
    for (std::size_t rank = 0; rank < theirs.size(); ++rank) {
        require_that(theirs[rank] == theirs.front(), "the model of rank ", rank,
                     " has other parameters than that of rank 0");
    }
    std::vector<at::Tensor> dense, values, bytes;
    for (const NamedTensor& one : all) dense.push_back(one.tensor.detach());
    for (const at::Tensor& one : dense) values.push_back(one.contiguous());
    for (const at::Tensor& one : values) {
        // Of any type: Gloo does not know all.
        if (one.numel() > 0) bytes.push_back(one.view({-1}).view(at::kByte));
    }
    group.broadcast(bytes, 0);
    for (std::size_t i = 0; i < dense.size(); ++i) {
        if (!values[i].is_same(dense[i])) dense[i].copy_(values[i]);
    }
}

}  // namespace microbatch
