#pragma once

#include <cstdint>
#include <optional>

namespace microbatch {

/// One micro-batch's contribution to the noise of its batch.
struct MicroBatchGradient {
    double weight = 0.0;        ///< samples or target tokens, b_i
    double squared_norm = 0.0;  ///< of its mean gradient, |g_i|^2
};

/// The contributions of a batch's micro-batches that have weight, summed.
struct NoiseSums {
    std::int64_t count = 0;
    double weight = 0.0;   ///< sum of b_i
    double squares = 0.0;  ///< sum of b_i |g_i|^2

    void add(const MicroBatchGradient& part);
};

/// Estimates from one batch of the gradient and its noise, per unit of weight (one sample, or one target token).
struct NoiseMeasure {
    double variance = 0.0;          ///< trace of the covariance of one unit's gradient, tr(Sigma); can be negative
    double squared_gradient = 0.0;  ///< of the true gradient, |G|^2; can be negative
};

/// Estimates both from the micro-batches of one batch, without bias for micro-batches of any size.
///
/// Formula: tr(Sigma) = (sum of b_i |g_i|^2 - B |g|^2) / (k - 1),  |G|^2 = |g|^2 - tr(Sigma) / B, with g the batch's
///          mean gradient, B the sum of the b_i and k the number of micro-batches with weight.
/// Source:  McCandlish et al. 2018, arXiv:1812.06162, appendix A.1, for unequal sizes.
/// Returns: nullopt with fewer than two micro-batches that have weight, or if a number is not finite.
std::optional<NoiseMeasure> measure_noise(const NoiseSums& parts, double squared_norm);

/// The noise over many batches. Numerator and denominator are averaged separately, since the mean of ratios is not the
/// ratio of means; exponentially, with the bias at the start corrected.
///
/// State: a value.
class NoiseAverage {
public:
    /// `decay` per measurement: 0.95 remembers about twenty. Errors: ErrorKind::usage unless it is from 0 to below 1.
    explicit NoiseAverage(double decay = 0.95);

    void add(const NoiseMeasure& measure);

    /// nullopt before the first measurement.
    std::optional<NoiseMeasure> mean() const;

    /// tr(Sigma) / |G|^2: the batch at which the noise is as large as the gradient, in units of weight. A proxy:
    /// language models can make use of batches several times as large (Merrill et al. 2025, arXiv:2505.23971). nullopt
    /// if undefined: no measurement yet, or the noise hides the gradient (|G|^2 or tr(Sigma) not above 0).
    std::optional<double> noise_batch() const;

    /// Everything needed to continue from here.
    struct State {
        double weight = 0.0;  ///< of all measurements so far; approaches 1
        NoiseMeasure sum = {};
    };
    const State& state() const { return state_; }

    /// Errors: ErrorKind::usage for an invalid state; nothing changes then.
    void restore(const State& state);

private:
    double decay_;
    State state_;
};

}  // namespace microbatch
