#pragma once

#include <cstdint>
#include <optional>

namespace microbatch {

/// A micro-batch's part in the noise of its batch.
struct MicroBatchGradient {
    double weight = 0.0;        ///< samples or target tokens, b_i
    double squared_norm = 0.0;  ///< of its mean gradient, |g_i|^2
};

/// The parts of a batch's micro-batches that have weight, added up.
struct NoiseSums {
    std::int64_t count = 0;
    double weight = 0.0;   ///< sum of b_i
    double squares = 0.0;  ///< sum of b_i |g_i|^2

    void add(const MicroBatchGradient& part);
};

/// What one batch says of the gradient and of its noise, per unit of weight (one sample, or one target token).
struct NoiseMeasure {
    double variance = 0.0;  ///< trace of the covariance of one unit's gradient, tr(Sigma); may come out negative
    double squared_gradient = 0.0;  ///< of the true gradient, |G|^2; may come out negative
};

/// Both from the micro-batches of one batch, unbiased for micro-batches of any sizes.
///
/// Formula: tr(Sigma) = (sum of b_i |g_i|^2 - B |g|^2) / (k - 1),  |G|^2 = |g|^2 - tr(Sigma) / B, with g the batch's
/// mean
///          gradient, B the sum of the b_i and k how many have weight.
/// Source:  McCandlish et al. 2018, arXiv:1812.06162, appendix A.1, for unequal sizes.
/// Returns: none where nothing can be said: fewer than two micro-batches with weight, or a number that is not finite.
std::optional<NoiseMeasure> measure_noise(const NoiseSums& parts, double squared_norm);

/// The noise over many batches: numerator and denominator averaged apart, exponentially and without bias at the start,
/// because the mean of their ratios is not the ratio of their means.
///
/// State: a value.
class NoiseAverage {
public:
    /// `decay` a measure: 0.95 remembers some twenty. Errors: ErrorKind::usage unless it is from 0 to below 1.
    explicit NoiseAverage(double decay = 0.95);

    void add(const NoiseMeasure& measure);

    /// None before the first measure.
    std::optional<NoiseMeasure> mean() const;

    /// tr(Sigma) / |G|^2: the batch at which noise and gradient are as large, in units of weight. A proxy: language
    /// models can use several times as much (Merrill et al. 2025, arXiv:2505.23971). None where it is undefined: no
    /// measure yet, or a gradient that the noise hides, |G|^2 or tr(Sigma) not above 0.
    std::optional<double> noise_batch() const;

    /// All that it remembers.
    struct State {
        double weight = 0.0;  ///< of all measures so far; 1 in the end
        NoiseMeasure sum = {};
    };
    const State& state() const { return state_; }

    /// Errors: ErrorKind::usage if no average could have this state; nothing has changed then.
    void restore(const State& state);

private:
    double decay_;
    State state_;
};

}  // namespace microbatch
