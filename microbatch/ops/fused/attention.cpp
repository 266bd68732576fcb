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
    Heads(const at::Tensor& qkv, std::int64_t heads)
        : samples_(qkv.size(0)), tokens_(qkv.size(1)), heads_(heads), width_(qkv.size(2) / 3), qkv_(qkv) {}

    std::int64_t count() const { return samples_ * heads_; }
    std::int64_t tokens() const { return tokens_; }
    std::int64_t size() const { return width_ / heads_; }

    AttentionHead operator()(std::int64_t number, const at::Tensor& out, const at::Tensor& log_sums) const {
        const float* input = qkv_.const_data_ptr<float>() + grad_input(number);
        return {.tokens = tokens_,
                .size = size(),
                .scale = static_cast<float>(1.0 / std::sqrt(static_cast<double>(size()))),
                .row = 3 * width_,
                .out_row = width_,
                .q = input,
                .k = input + width_,
                .v = input + 2 * width_,
                .out = out.data_ptr<float>() + grad_output(number),
                .log_sums = log_sums.data_ptr<float>() + number * tokens_};
    }

    void add_gradients(AttentionHead& head, std::int64_t number, const at::Tensor& gradient,
                       at::Tensor& grad_qkv) const {
        head.gradient = gradient.const_data_ptr<float>() + grad_output(number);
        head.grad_q = grad_qkv.mutable_data_ptr<float>() + grad_input(number);
        head.grad_k = head.grad_q + width_;
        head.grad_v = head.grad_k + width_;
    }

private:
    std::int64_t grad_input(std::int64_t number) const {
        return number / heads_ * tokens_ * 3 * width_ + number % heads_ * size();
    }
    std::int64_t grad_output(std::int64_t number) const {
        return number / heads_ * tokens_ * width_ + number % heads_ * size();
    }

    std::int64_t samples_, tokens_, heads_, width_;
    const at::Tensor& qkv_;
};

/// Calls the function for every head with scratch memory; threads share the heads.
template <class Call>
void for_each_head(const Heads& heads, std::int64_t scratch, const at::TensorOptions& options, const Call& call) {
    // Allocated within the budget before any thread begins; any of them may get work.
    const at::Tensor memory = at::empty({thread_places(), scratch}, options);
    float* const start = memory.data_ptr<float>();
    in_parallel(heads.count(), 1, [&](std::int64_t begin, std::int64_t end) {
        float* own = start + at::get_thread_num() * scratch;
        for (std::int64_t number = begin; number < end; ++number) call(number, own);
    });
}

}  // namespace

Attended attend(const at::Tensor& qkv, std::int64_t heads) {
    const Heads all(qkv, heads);
    Attended result{at::empty({qkv.size(0), qkv.size(1), qkv.size(2) / 3}, qkv.options()),
                    at::empty({all.count(), all.tokens()}, qkv.options())};
    for_each_head(all, kernels().attention_forward_scratch(all.tokens(), all.size()), qkv.options(),
                  [&](std::int64_t number, float* scratch) {
                      kernels().attention_forward(all(number, result.out, result.log_sums), scratch);
                  });
    return result;
}

at::Tensor attention_gradient(const at::Tensor& qkv, std::int64_t heads, const Attended& attended,
                              const at::Tensor& gradient) {
    const Heads all(qkv, heads);
    at::Tensor grad_qkv = at::empty_like(qkv);
    for_each_head(all, kernels().attention_backward_scratch(all.tokens(), all.size()), qkv.options(),
                  [&](std::int64_t number, float* scratch) {
                      AttentionHead head = all(number, attended.out, attended.log_sums);
                      all.add_gradients(head, number, gradient, grad_qkv);
                      kernels().attention_backward(head, scratch);
                  });
    return grad_qkv;
}

}  // namespace microbatch
