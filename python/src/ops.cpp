#include <cstdint>
#include <limits>
#include <optional>
#include <tuple>
#include <vector>

#include "microbatch/core/error.h"
#include "microbatch/ops/causal_attention.h"
#include "microbatch/ops/gelu.h"
#include "microbatch/ops/linear_cross_entropy.h"
#include "microbatch/ops/llama_block.h"
#include "microbatch/ops/padding.h"
#include "microbatch/ops/transformer_block.h"
#include "microbatch/runtime/gemm.h"
#include "python/src/bindings.h"

namespace microbatch::python {

namespace {

using Tensors = std::vector<at::Tensor>;

at::Tensor or_undefined(const std::optional<at::Tensor>& tensor) {
    return tensor.value_or(at::Tensor());
}

at::Tensor gpt2_block(const at::Tensor& x, const Tensors& w, std::int64_t heads, double epsilon, bool inputs_first,
                      const std::optional<at::Tensor>& lengths) {
    require_that(w.size() == 12, "gpt2_block: ", w.size(), " weights; give 12");
    return transformer_block(x, {w[0], w[1], w[2], w[3], w[4], w[5], w[6], w[7], w[8], w[9], w[10], w[11]}, heads, {},
                             {epsilon, inputs_first, or_undefined(lengths)});
}

at::Tensor llama_block_of(const at::Tensor& x, const at::Tensor& cosines, const at::Tensor& sines, const Tensors& w,
                          std::int64_t heads, std::int64_t kv_heads, double epsilon,
                          const std::optional<at::Tensor>& lengths) {
    require_that(w.size() == 9 || w.size() == 12, "llama_block: ", w.size(), " weights; give 9, or 12 with biases");
    LlamaWeights weights{w[0], w[1], w[2], w[3], w[4], w[5], w[6], w[7], w[8]};
    if (w.size() == 12) std::tie(weights.q_bias, weights.k_bias, weights.v_bias) = std::tie(w[9], w[10], w[11]);
    return llama_block(x, cosines, sines, weights, {heads, kv_heads, epsilon, or_undefined(lengths)});
}

std::optional<at::Tensor> padding_of(const at::Tensor& mask, bool causal) {
    const at::Tensor lengths = padding_lengths(mask, causal);
    return lengths.defined() ? std::optional(lengths) : std::nullopt;
}

}  // namespace

void bind_ops(py::module_& module) {
    const auto released = py::call_guard<py::gil_scoped_release>();
    module.def("gelu_tanh", &gelu_tanh, released);
    module.def(
        "attention",
        [](const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, std::int64_t heads, std::int64_t kv_heads,
           bool causal, const std::optional<at::Tensor>& lengths) {
            return attention(q, k, v, heads, kv_heads, causal, or_undefined(lengths));
        },
        released);
    module.def("gpt2_block", &gpt2_block, released);
    module.def("llama_block", &llama_block_of, released);
    module.def("linear_cross_entropy_sum", &linear_cross_entropy_sum, released);
    module.def("linear_cross_entropy_sum_at_once", &linear_cross_entropy_sum_at_once, released);
    module.def("padding_lengths", &padding_of, released);
    module.def("uses_onednn", [] { return prefers_onednn(std::numeric_limits<std::int64_t>::max()); });
}

}  // namespace microbatch::python
