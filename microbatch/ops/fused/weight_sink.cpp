#include "microbatch/ops/fused/weight_sink.h"

#include <ATen/ops/addmm.h>
#include <torch/csrc/autograd/variable.h>

#include "microbatch/autograd/sum_in_place.h"
#include "microbatch/ops/fused/rows.h"
#include "microbatch/runtime/gemm.h"

namespace microbatch {

namespace {

bool add_to_leaf(const at::Tensor& leaf, const at::Tensor& left, const at::Tensor& right) {
    if (!right.defined()) return sum_in_place(leaf, {left}, [&](at::Tensor& sum) { sum.add_(left); });
    return sum_in_place(leaf, {left, right}, [&](at::Tensor& sum) {
        if (!sum.is_contiguous()) {
            sum.addmm_(left.t(), right);
            return;
        }
        add_product(left, right, sum);
        torch::autograd::impl::bump_version(sum);  // like every torch operator that writes
    });
}

}  // namespace

GradientSink weight_sink(const FusedBackward& of, variable_list& results, bool in_place, bool inputs_first) {
    return
        [&of, &results, in_place, inputs_first](std::size_t weight, const at::Tensor& left, const at::Tensor& right) {
            const std::size_t input = 1 + weight;
            if (!of.needed[input]) return;
            const bool swapped = inputs_first && right.defined();
            const at::Tensor &first = swapped ? right : left, &second = swapped ? left : right;
            if (in_place && add_to_leaf(of.inputs[input], first, second)) return;
            results[input] = second.defined() ? gemm(first.t(), second) : first.clone();
        };
}

}  // namespace microbatch
