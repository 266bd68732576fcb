#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>

namespace microbatch {

/// cross_entropy_sum(at::linear(hidden, weight), targets) without ever holding all logits: they are computed once, for
/// some rows at a time. Gradients that are needed are computed in forward, from the same logits; backward only returns
/// them.
///
/// Shapes: hidden [..., width], weight [vocabulary, width], targets the same as hidden without the last dimension,
///         int64. As many rows at a time as fit in `chunk_bytes`, but at least one.
/// Units:  nats. The type is that of hidden, float32 for float16 and bfloat16.
/// Errors: ErrorKind::usage if a tensor is undefined, shapes or types do not match, hidden is not floating point, the
///         targets are not int64, the vocabulary is empty or chunk_bytes below 1; in backward under create_graph, or
///         for the second time (retain_graph); on the CPU c10::IndexError for a target outside [0, vocabulary) that is
///         not `ignored`.
/// State:  the gradients are those of the values in forward, even if hidden and weight have changed by backward.
/// Cost:   forward needs one chunk and, where they are needed, the gradients of hidden and weight, which are saved for
///         backward; for half precision the weight's gradient is summed in float32. The arithmetic is that of the plain
///         loss; each chunk reads and writes the weight's gradient once, so smaller chunks take longer.
/// Source: Wijmans et al. 2024, arXiv:2411.09009; Hsu et al. 2024, arXiv:2410.10989, for gradients in the forward pass.
at::Tensor linear_cross_entropy_sum(const at::Tensor& hidden, const at::Tensor& weight, const at::Tensor& targets,
                                    std::int64_t ignored = -100, std::int64_t chunk_bytes = std::int64_t{32} << 20);

/// The same with all logits at once, which are replaced by their own gradient in forward: for rows that fit. Weight
/// gradients as by InPlaceGradients, so nothing of the weight's size is allocated.
///
/// Shapes, units, errors: as linear_cross_entropy_sum.
/// State:  differentiable as often as at::linear. hidden and weight must be unchanged when backward runs.
/// Cost:   holds the logits once until backward; torch's operators hold them three times.
at::Tensor linear_cross_entropy_sum_at_once(const at::Tensor& hidden, const at::Tensor& weight,
                                            const at::Tensor& targets, std::int64_t ignored = -100);

}  // namespace microbatch
