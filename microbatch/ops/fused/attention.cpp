#include "microbatch/ops/fused/attention.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>

#include <cmath>

#include "microbatch/ops/kernels/kernels.h"
#include "microbatch/runtime/parallel.h"

namespace microbatch {
namespace {

/// The memory of one sample and head.
class Heads {
public:
    explicit Heads(const AttentionInputs& inputs)
        : inputs_(inputs), tokens_(inputs.q.size(1)), size_(inputs.q.size(2) / inputs.heads) {}

    /// Groups of heads that share keys and values.
    std::int64_t groups() const { return inputs_.q.size(0) * inputs_.kv_heads; }
    std::int64_t heads() const { return inputs_.q.size(0) * inputs_.heads; }
    std::int64_t shared() const { return inputs_.heads / inputs_.kv_heads; }
    std::int64_t tokens() const { return tokens_; }
    std::int64_t size() const { return size_; }

    /// The head of this number in a group.
    AttentionHead operator()(std::int64_t group, std::int64_t number, const Attended& attended) const {
        const std::int64_t sample = group / inputs_.kv_heads, kv_head = group % inputs_.kv_heads;
        const std::int64_t head = kv_head * shared() + number;
        return {.tokens = tokens_,
                .keys = inputs_.lengths.defined() ? inputs_.lengths.const_data_ptr<std::int64_t>()[sample] : tokens_,
                .size = size_,
                .causal = inputs_.causal,
                .scale = static_cast<float>(1.0 / std::sqrt(static_cast<double>(size_))),
                .row = inputs_.q.stride(1),
                .kv_row = inputs_.k.stride(1),
                .out_row = inputs_.heads * size_,
                .q = at(inputs_.q, sample, head),
                .k = at(inputs_.k, sample, kv_head),
                .v = at(inputs_.v, sample, kv_head),
                .out = at(attended.out, sample, head),
                .log_sums = attended.log_sums.data_ptr<float>() + (sample * inputs_.heads + head) * tokens_};
    }

    void add_gradients(AttentionHead& to, std::int64_t group, std::int64_t number, const at::Tensor& gradient,
                       const AttentionInputs& gradients) const {
        const std::int64_t sample = group / inputs_.kv_heads, kv_head = group % inputs_.kv_heads;
        const std::int64_t head = kv_head * shared() + number;
        to.gradient = at(gradient, sample, head);
        to.grad_q = at(gradients.q, sample, head);
        to.grad_k = at(gradients.k, sample, kv_head);
        to.grad_v = at(gradients.v, sample, kv_head);
        to.add_to_keys = number > 0;
    }

private:
    float* at(const at::Tensor& tensor, std::int64_t sample, std::int64_t head) const {
        return tensor.data_ptr<float>() + sample * tokens_ * tensor.stride(1) + head * size_;
    }

    const AttentionInputs& inputs_;
    std::int64_t tokens_, size_;
};

/// Calls the function for every group of heads with scratch memory; threads share the groups.
template <class Call>
void for_each_group(const Heads& heads, std::int64_t scratch, const Call& call) {
    // Allocated within the budget before any thread begins; any of them may get work.
    const at::Tensor memory = at::empty({thread_places(), scratch}, at::kFloat);
    float* const start = memory.data_ptr<float>();
    in_parallel(heads.groups(), 1, [&](std::int64_t begin, std::int64_t end) {
        float* own = start + at::get_thread_num() * scratch;
        for (std::int64_t group = begin; group < end; ++group) call(group, own);
    });
}

}  // namespace

AttentionInputs interleaved(const at::Tensor& qkv, std::int64_t heads, const at::Tensor& lengths) {
    const std::int64_t width = qkv.size(2) / 3;
    return {.q = qkv.narrow(2, 0, width),
            .k = qkv.narrow(2, width, width),
            .v = qkv.narrow(2, 2 * width, width),
            .heads = heads,
            .kv_heads = heads,
            .lengths = lengths};
}

Attended attend(const AttentionInputs& inputs) {
    const Heads all(inputs);
    Attended result{at::empty(inputs.q.sizes(), inputs.q.options()),
                    at::empty({all.heads(), all.tokens()}, inputs.q.options())};
    for_each_group(all, kernels().attention_forward_scratch(all.tokens(), all.size()),
                   [&](std::int64_t group, float* scratch) {
                       for (std::int64_t i = 0; i < all.shared(); ++i) {
                           kernels().attention_forward(all(group, i, result), scratch);
                       }
                   });
    return result;
}

void attention_gradient(const AttentionInputs& inputs, const Attended& attended, const at::Tensor& gradient,
                        const AttentionInputs& gradients) {
    const Heads all(inputs);
    for_each_group(all, kernels().attention_backward_scratch(all.tokens(), all.size()),
                   [&](std::int64_t group, float* scratch) {
                       for (std::int64_t i = 0; i < all.shared(); ++i) {
                           AttentionHead head = all(group, i, attended);
                           all.add_gradients(head, group, i, gradient, gradients);
                           kernels().attention_backward(head, scratch);
                       }
                   });
}

}  // namespace microbatch
