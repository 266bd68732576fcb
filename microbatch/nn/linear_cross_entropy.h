#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>

namespace microbatch {

/// cross_entropy_sum(at::linear(hidden, weight), targets), without ever holding all logits: a tile of them is computed
/// at a time, in forward and once more in backward.
///
/// Shapes: hidden [..., width], weight [vocabulary, width], targets the same as hidden without the last dimension,
///         int64. A tile is as large as fits in `chunk_bytes`, in both directions, but at least one logit.
/// Units:  nats. The type is that of hidden, float32 for float16 and bfloat16.
/// Errors: ErrorKind::usage if a tensor is undefined, shapes or types do not match, hidden is not floating point, the
///         targets are not int64, the vocabulary is empty or chunk_bytes below 1; in backward under create_graph; on
///         the CPU c10::IndexError for a target outside [0, vocabulary) that is not `ignored`.
/// Cost:   kept until backward: hidden, weight, targets and two numbers a row. Forward needs one tile beside them,
///         backward that and the gradients that are wanted, which for half precision are summed in float32. The
///         logits are computed twice: 4/3 of the arithmetic. Tiles below 32 MiB take longer where the vocabulary is
///         large.
/// Source: Wijmans et al. 2024, arXiv:2411.09009, and Hsu et al. 2024, arXiv:2410.10989.
at::Tensor linear_cross_entropy_sum(const at::Tensor& hidden, const at::Tensor& weight, const at::Tensor& targets,
                                    std::int64_t ignored = -100, std::int64_t chunk_bytes = std::int64_t{32} << 20);

}  // namespace microbatch
