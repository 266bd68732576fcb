#include "microbatch/core/noise_scale.h"

#include <cmath>

#include "microbatch/core/error.h"
#include "microbatch/core/str_cat.h"

namespace microbatch {

void NoiseSums::add(const MicroBatchGradient& part) {
    if (part.weight == 0.0) return;
    weight += part.weight;
    squares += part.weight * part.squared_norm;
    ++count;
}

std::optional<NoiseMeasure> measure_noise(const NoiseSums& parts, double squared_norm) {
    if (parts.count < 2) return std::nullopt;
    NoiseMeasure measure;
    measure.variance = (parts.squares - parts.weight * squared_norm) / static_cast<double>(parts.count - 1);
    measure.squared_gradient = squared_norm - measure.variance / parts.weight;
    if (!std::isfinite(measure.variance) || !std::isfinite(measure.squared_gradient)) return std::nullopt;
    return measure;
}

NoiseAverage::NoiseAverage(double decay) : decay_(decay) {
    if (decay >= 0.0 && decay < 1.0) return;
    throw Error(ErrorKind::usage, str_cat("the decay of the noise is ", decay, "; it must be from 0 to below 1"));
}

void NoiseAverage::add(const NoiseMeasure& measure) {
    const double part = 1.0 - decay_;
    state_.sum.variance = decay_ * state_.sum.variance + part * measure.variance;
    state_.sum.squared_gradient = decay_ * state_.sum.squared_gradient + part * measure.squared_gradient;
    state_.weight = decay_ * state_.weight + part;
}

void NoiseAverage::restore(const State& state) {
    const bool sound = state.weight >= 0.0 && state.weight <= 1.000001 && std::isfinite(state.sum.variance) &&
                       std::isfinite(state.sum.squared_gradient);
    if (!sound) throw Error(ErrorKind::usage, "noise: this state is invalid");
    state_ = state;
}

std::optional<NoiseMeasure> NoiseAverage::mean() const {
    if (state_.weight == 0.0) return std::nullopt;
    return NoiseMeasure{.variance = state_.sum.variance / state_.weight,
                        .squared_gradient = state_.sum.squared_gradient / state_.weight};
}

std::optional<double> NoiseAverage::noise_batch() const {
    if (state_.weight == 0.0 || state_.sum.squared_gradient <= 0.0 || state_.sum.variance <= 0.0) return std::nullopt;
    return state_.sum.variance / state_.sum.squared_gradient;
}

}  // namespace microbatch
