#pragma once

#include <optional>
#include <string_view>

namespace microbatch {

/// What BatchNorm layers do in training while a batch is split.
enum class BatchNorm {
    naive,     ///< as torch: normalise by the micro-batch, move the running statistics with every micro-batch
    deferred,  ///< normalise by the micro-batch; move the running statistics once, by the statistics of the batch
    frozen,    ///< normalise by the running statistics, which do not move
    exact,     ///< normalise by the whole batch, forward and backward
};

/// The policy's name.
std::string_view to_string(BatchNorm policy);

/// The policy with this name, or nullopt.
std::optional<BatchNorm> parse_batch_norm(std::string_view name);

}  // namespace microbatch
