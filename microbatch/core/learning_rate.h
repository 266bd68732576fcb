#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>

namespace microbatch {

/// How an optimizer's constants are scaled with the batch; k is the batch divided by the reference batch.
enum class RateRule {
    none,        ///< unchanged
    linear,      ///< rate k; gradient noise averages out and steps are longer: SGD, with warmup
    sqrt,        ///< rate sqrt(k): the update's variance stays; Adam without its betas
    adam_sde,    ///< rate sqrt(k), 1 - beta k, epsilon / sqrt(k): the same stochastic differential equation
    beta2_time,  ///< beta2^k: the second moment keeps its half-life in samples; the rate is unchanged
};

/// The rule of that name: none, linear, sqrt, adam-sde or beta2-time.
/// Errors: ErrorKind::usage for any other name, listing these.
RateRule parse_rate_rule(std::string_view name);

/// The name that parse_rate_rule reads.
std::string_view to_string(RateRule rule);

/// The constants tuned for one batch. Only Adam has betas and epsilon.
struct RateConstants {
    struct Adam {
        double beta1 = 0.9, beta2 = 0.999, epsilon = 1e-8;

        bool operator==(const Adam&) const = default;
    };

    double learning_rate = 1e-3;
    std::optional<Adam> adam = {};

    bool operator==(const RateConstants&) const = default;
};

/// The constants for `batch` samples per step that correspond to `reference` at `reference_batch`.
///
/// Errors: ErrorKind::usage if a batch is below 1; if the rule is Adam's and there are no constants of Adam; if
///         adam_sde has no solution because k (1 - beta) is 1 or more: the batch is too large for the betas; if a
///         result is not finite, or a beta rounds to 0 or 1.
/// Source: linear: Goyal et al. 2017, arXiv:1706.02677; sqrt: Krizhevsky 2014, arXiv:1404.5997; adam_sde: Malladi et
///         al. 2022, arXiv:2205.10287, definition 5.2; beta2_time: Marek et al. 2025, arXiv:2507.07101.
RateConstants scale_to_batch(const RateConstants& reference, RateRule rule, std::int64_t reference_batch,
                             std::int64_t batch);

/// One line: "rate 0.001 at batch 64 is 0.002 at 256 (sqrt)", and whatever else changes.
std::string describe_scaling(const RateConstants& reference, const RateConstants& scaled, RateRule rule,
                             std::int64_t reference_batch, std::int64_t batch);

}  // namespace microbatch
