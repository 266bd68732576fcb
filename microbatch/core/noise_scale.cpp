#include "microbatch/core/noise_scale.h"

#include <cmath>

#include "microbatch/core/error.h"
#include "microbatch/core/text.h"

namespace microbatch {

std::optional<NoiseMeasure> measure_noise(std::span<const MicroBatchGradient> parts, double squared_norm) {
    double weight = 0.0, squares = 0.0;
    int count = 0;
    for (const MicroBatchGradient& part : parts) {
        if (part.weight == 0.0) continue;
        weight += part.weight;
        squares += part.weight * part.squared_norm;
        ++count;
    }
    if (count < 2) return std::nullopt;
    NoiseMeasure measure;
    measure.variance = (squares - weight * squared_norm) / (count - 1);
    measure.squared_gradient = squared_norm - measure.variance / weight;
    if (!std::isfinite(measure.variance) || !std::isfinite(measure.squared_gradient)) return std::nullopt;
    return measure;
}

NoiseAverage::NoiseAverage(double decay) : decay_(decay) {
    if (decay >= 0.0 && decay < 1.0) return;
    throw Error(ErrorKind::usage, text("the decay of the noise is ", decay, "; it must be from 0 to below 1"));
}

void NoiseAverage::add(const NoiseMeasure& measure) {
    const double part = 1.0 - decay_;
    sum_.variance = decay_ * sum_.variance + part * measure.variance;
    sum_.squared_gradient = decay_ * sum_.squared_gradient + part * measure.squared_gradient;
    weight_ = decay_ * weight_ + part;
}

std::optional<NoiseMeasure> NoiseAverage::mean() const {
    if (weight_ == 0.0) return std::nullopt;
    return NoiseMeasure{.variance = sum_.variance / weight_, .squared_gradient = sum_.squared_gradient / weight_};
}

std::optional<double> NoiseAverage::noise_batch() const {
    if (weight_ == 0.0 || sum_.squared_gradient <= 0.0 || sum_.variance <= 0.0) return std::nullopt;
    return sum_.variance / sum_.squared_gradient;
}

}  // namespace microbatch
