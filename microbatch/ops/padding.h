#pragma once

#include <ATen/core/Tensor.h>

namespace microbatch {

/// The number of tokens before the padding of each sample, if that is all that an attention mask says: a token attends to
/// those of its sample that are not padding at the end, and if causal to no later ones. Undefined if the mask says
/// anything else, or hides all of a sample.
///
/// Shapes: mask [samples, 1, tokens, tokens], bool (true: attends), or float32 that is added to the scores: 0, or the
///         lowest number or less; lengths [samples], int64.
/// Cost:   reads the mask once; of rows that share their memory the first.
at::Tensor padding_lengths(const at::Tensor& mask, bool causal);

}  // namespace microbatch
