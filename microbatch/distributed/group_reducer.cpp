#include "microbatch/distributed/group_reducer.h"

#include <ATen/core/grad_mode.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/tensor.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <nlohmann/json.hpp>
#include <unordered_map>

#include "microbatch/core/crc32c.h"
#include "microbatch/core/error.h"
#include "microbatch/core/median.h"
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

/// Small tensors of one root, in one piece of memory.
class Piece {
public:
    explicit Piece(int root) : root_(root) {}

    int root() const { return root_; }
    std::int64_t bytes() const { return bytes_; }

    bool takes(const at::Tensor& tensor, int root) const {
        return root == root_ && bytes_ + static_cast<std::int64_t>(tensor.nbytes()) <= small_bytes &&
               tensor.scalar_type() == tensors_.front().scalar_type() && tensor.device() == tensors_.front().device();
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

    int root_;
    std::vector<at::Tensor> tensors_;
    std::int64_t bytes_ = 0;
};

}  // namespace

/// Tensors on their way, with the rank that each goes to or comes from.
struct GroupReducer::Parcels {
    std::vector<at::Tensor> large = {};  // go as they are, all at once
    std::vector<int> roots = {};         // of these
    std::vector<Piece> pieces = {};      // go one after the other

    Parcels(const std::vector<at::Tensor>& tensors, const std::vector<int>& all_roots) {
        for (std::size_t i = 0; i < tensors.size(); ++i) {
            const at::Tensor& one = tensors[i];
            if (static_cast<std::int64_t>(one.nbytes()) >= small_bytes && one.is_non_overlapping_and_dense()) {
                large.push_back(one);
                roots.push_back(all_roots[i]);
                continue;
            }
            const auto takes = [&](const Piece& piece) { return piece.takes(one, all_roots[i]); };
            const auto found = std::ranges::find_if(pieces, takes);
            (found != pieces.end() ? *found : pieces.emplace_back(all_roots[i])).add(one);
        }
    }
};

// Calls `call` with tensors and their roots. Memory: that of one piece.
template <class Call>
void GroupReducer::send(const Parcels& parcels, const Call& call) {
    call(parcels.large, parcels.roots);
    for (const Piece& piece : parcels.pieces) {
        const at::Tensor all = piece.joined();
        call({all}, {piece.root()});
        piece.take_back(all);
    }
}

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
    Gathered total{.sums = std::move(gathered.sums), .plan = gathered.plan};
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
    if (gathered.grains) add_grains(total, *gathered.grains);
    gathered = std::move(total);
}

// As one process adds up the grains of all.
void GroupReducer::add_grains(Gathered& total, const GrainLosses& mine) {
    total.loss_sum = total.weight = 0.0;
    for (const at::Tensor& losses : gather(at::tensor(mine.losses, at::kDouble))) {
        for (std::int64_t i = 0; i < losses.numel(); ++i) total.loss_sum += losses.const_data_ptr<double>()[i];
    }
    for (const at::Tensor& weights : gather(at::tensor(mine.weights, at::kDouble))) {
        for (std::int64_t i = 0; i < weights.numel(); ++i) total.weight += weights.const_data_ptr<double>()[i];
    }
}

// Where only some ranks have a gradient, the others have one of zeros.
void GroupReducer::add_missing(GradientViews& sums, const Parameters& parameters) {
    std::unordered_map<const void*, at::Tensor> own;
    for (const GradientView& one : sums) own.emplace(one.parameter.unsafeGetTensorImpl(), one.sum);
    constexpr std::uint8_t none = 0xFF;
    at::Tensor have = at::zeros({static_cast<std::int64_t>(parameters.size())}, at::kByte);
    auto* const mine = have.mutable_data_ptr<std::uint8_t>();
    for (std::size_t i = 0; i < parameters.size(); ++i) {
        const auto found = own.find(parameters[i].tensor.unsafeGetTensorImpl());
        mine[i] = found == own.end() ? none : static_cast<std::uint8_t>(found->second.scalar_type());
    }
    std::vector<std::uint8_t> types(parameters.size(), none);
    bool differ = false;
    for (const at::Tensor& one : group_->gather(have)) {
        const auto* const theirs = one.const_data_ptr<std::uint8_t>();
        for (std::size_t i = 0; i < parameters.size(); ++i) {
            types[i] = std::min(types[i], theirs[i]);
            differ = differ || theirs[i] != mine[i];
        }
    }
    if (!differ) return;  // the same on all: if two differ, every rank differs from one of them
    std::string out_of_memory;
    GradientViews all;
    const auto added = unless_oom(
        [&] {
            for (std::size_t i = 0; i < parameters.size(); ++i) {
                const at::Tensor& parameter = parameters[i].tensor;
                if (types[i] == none) continue;
                const auto type = static_cast<at::ScalarType>(types[i]);
                all.push_back({parameter, mine[i] != none
                                              ? own.at(parameter.unsafeGetTensorImpl())
                                              : at::zeros_like(parameter, parameter.options().dtype(type))});
            }
        },
        &out_of_memory);
    if (group_->any(!added)) TORCH_CHECK_WITH(OutOfMemoryError, false, "a gradient of zeros: ", out_of_memory);
    sums = std::move(all);
}

// Returns the norm: rank 0's, should another processor add in another order.
double GroupReducer::sum_for_all(const GradientViews& gradients) {
    const std::vector<at::Tensor> sums = sums_of(gradients);
    send(Parcels(sums, std::vector<int>(sums.size())),
         [this](const std::vector<at::Tensor>& tensors, const std::vector<int>&) { group_->sum(tensors); });
    const at::Tensor norm = at::tensor({norm_of_squares(squares_of_each(sums))}, at::kDouble);
    return group_->gather(norm).front().item<double>();
}

// Leaves each rank its own. Returns the norm of all, with the bits of sum_for_all().
double GroupReducer::sum_for_owners(GradientViews& gradients, const Parameters& parameters) {
    std::vector<int> owners;
    for (const GradientView& one : gradients) owners.push_back(shards_->of(one.parameter));
    send(Parcels(sums_of(gradients), owners),
         [this](const std::vector<at::Tensor>& tensors, const std::vector<int>& roots) {
             group_->sum_to(tensors, roots);
         });
    std::erase_if(gradients, [this](const GradientView& one) { return shards_->of(one.parameter) != rank(); });
    const std::vector<double> own = squares_of_each(sums_of(gradients));
    at::Tensor squares = at::zeros({static_cast<std::int64_t>(parameters.size())}, at::kDouble);
    for (std::size_t i = 0, next = 0; i < parameters.size() && next < own.size(); ++i) {
        if (parameters[i].tensor.is_same(gradients[next].parameter)) {
            squares.mutable_data_ptr<double>()[i] = own[next++];
        }
    }
    // Of each tensor, one rank's; the others' are 0.
    std::vector<double> all(parameters.size());
    for (const at::Tensor& one : group_->gather(squares)) {
        for (std::size_t i = 0; i < all.size(); ++i) all[i] += one.const_data_ptr<double>()[i];
    }
    return norm_of_squares(all);
}

Gathered GroupReducer::reduce(Gathered gathered, const Parameters& parameters, double scale) {
    const at::NoGradGuard no_grad;
    sum_totals(gathered);
    add_missing(gathered.sums, parameters);
    if (gathered.weight == 0.0) {
        gathered.sums.clear();
        return gathered;
    }
    require_that(!gathered.sums.empty(), no_gradient);
    reduced_ = parameters_in(gathered.sums);
    try {
        const double norm = divides() ? sum_for_owners(gathered.sums, parameters) : sum_for_all(gathered.sums);
        gathered.gradient_norm = norm / (gathered.weight * scale);
    } catch (const c10::OutOfMemoryError& error) {
        const std::string message = error.what_without_backtrace();
        abandon(message);  // the others wait in the middle of the sums
        throw Error(ErrorKind::does_not_fit, "out of memory while gradients are summed over processes: ", message,
                    ": raise the memory budget by some megabytes");
    }
    return gathered;
}

std::vector<at::Tensor> GroupReducer::divide(const std::vector<at::Tensor>& parameters) {
    if (size() == 1) return parameters;
    if (!shards_) shards_.emplace(size());
    shards_->add(parameters);
    std::vector<at::Tensor> own;
    for (const at::Tensor& one : parameters) {
        if (shards_->of(one) == rank()) own.push_back(one);
    }
    return own;
}

void GroupReducer::share_update() {
    if (!divides()) return;
    const at::NoGradGuard no_grad;
    std::vector<at::Tensor> updated;
    std::vector<int> owners;
    for (const at::Tensor& one : reduced_) {
        if (!shards_->has(one)) continue;  // the optimizer does not update it
        updated.push_back(one.detach());
        owners.push_back(shards_->of(one));
    }
    reduced_.clear();
    send(Parcels(updated, owners), [this](const std::vector<at::Tensor>& tensors, const std::vector<int>& roots) {
        group_->broadcast(tensors, roots);
    });
    for (const at::Tensor& one : updated) one.unsafeGetTensorImpl()->bump_version();
}

// As sums go, of parameters that are trained.
GroupReducer::Parcels GroupReducer::parcels_of(const Parameters& parameters, bool in_double) const {
    std::vector<at::Tensor> trained;
    std::vector<int> owners;
    for (const Parameter& one : parameters) {
        if (!one.tensor.requires_grad()) continue;
        const auto type = in_double ? at::kDouble : one.tensor.scalar_type();
        trained.push_back(at::empty_like(one.tensor, one.tensor.options().device(at::kMeta).dtype(type)));
        owners.push_back(shards_ ? shards_->of(one.tensor) : 0);
    }
    return {trained, owners};
}

std::int64_t GroupReducer::buffer_bytes(const Parameters& parameters, bool in_double) const {
    if (size() == 1) return 0;
    std::int64_t largest = 0;
    for (const Piece& piece : parcels_of(parameters, in_double).pieces) largest = std::max(largest, piece.bytes());
    return largest;
}

// Of a call as large as a part of some megabytes, and of one with a byte: all begin together, and the first one connects.
double GroupReducer::exchange_seconds(const Parameters& parameters) {
    constexpr std::int64_t enough_bytes = std::int64_t{4} << 20;
    constexpr int times = 5;
    std::int64_t bytes = 0;
    for (const Parameter& one : parameters) {
        bytes += one.tensor.requires_grad() ? static_cast<std::int64_t>(one.tensor.nbytes()) : 0;
    }
    const std::int64_t part = std::min(bytes, enough_bytes) / size();
    if (size() == 1 || part == 0) return 0.0;
    std::vector<at::Tensor> parts;
    std::vector<int> owners;
    for (int rank = 0; rank < size(); ++rank) {
        parts.push_back(at::zeros({part}, parameters.front().tensor.options().dtype(at::kByte)));
        owners.push_back(rank);
    }
    const auto seconds_of = [&](const auto& call) {
        std::vector<double> seconds;
        for (int i = 0; i <= times; ++i) {
            group_->any(false);
            const auto started = std::chrono::steady_clock::now();
            call();
            const double own = std::chrono::duration<double>(std::chrono::steady_clock::now() - started).count();
            if (i > 0) seconds.push_back(own);
        }
        return lower_median(seconds);
    };
    const double large = seconds_of([&] {
        if (!divides()) return group_->sum(parts);
        group_->sum_to(parts, owners);
        group_->broadcast(parts, owners);
    });
    const double small = seconds_of([&] { group_->any(false); });
    const auto calls = static_cast<double>(parcels_of(parameters, false).pieces.size() * (divides() ? 2 : 1));
    const double all = large * static_cast<double>(bytes) / static_cast<double>(part * size()) + small * calls;
    double slowest = 0.0;
    for (const at::Tensor& one : group_->gather(at::tensor({all}, at::kDouble))) {
        slowest = std::max(slowest, one.item<double>());
    }
    return slowest;
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
        names += str_cat(one.name, " ", one.tensor.sizes(), " ", c10::toString(one.tensor.scalar_type()),
                         one.tensor.requires_grad() ? " trained" : "", "\n");
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
