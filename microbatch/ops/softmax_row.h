#pragma once

#include <cstdint>

namespace microbatch {

/// Of a row of logits in float32, which is written over: exp(x - max) of every element. Below -87 that is 0, as nothing
/// is lost beside the largest, which is 1; elsewhere it is exact to two units in the last place. NaN anywhere, or an
/// infinite maximum, makes the sum NaN.
struct Exponentials {
    float largest;  ///< of the logits
    double sum;     ///< of the exponentials
};
Exponentials exponentiate_row(float* row, std::int64_t count);

void scale_row(float* row, std::int64_t count, float factor);

}  // namespace microbatch
