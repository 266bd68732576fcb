#pragma once

#include <cstdint>
#include <vector>

#include "microbatch/model/parameters.h"
#include "microbatch/optim/gradient_view.h"

namespace microbatch {

/// The largest magnitude of any gradient, by parameter; 0 where it is not known.
using GradientRanges = std::vector<double>;

/// True if sums made for the ranges `expected` cannot hold gradients as large as `found`: see OrderFreeSums. What is
/// not finite does not count: such a batch is refused anyway.
bool exceeds(const GradientRanges& found, const GradientRanges& expected);

/// Sums of gradients in fp64 that have the same bits in whatever order, and by whatever process, they are added.
///
/// Formula:  each summand is rounded to a multiple of a quantum q, a power of two that depends on the parameter's range
///           and the number of summands alone. Sums of such multiples are exact as long as they are below 2^53 q.
/// Numerics: with a largest gradient of R and n summands, q is between R n 2^-46 and R n 2^-44, so a summand loses at
///           most R n 2^-45. Gradients may grow to 64 times R: see exceeds().
/// Source:   reproducible sums, Demmel and Nguyen 2015. Deviation: one quantum, from the last batch's range.
/// Memory:   8 bytes for each element of a gradient.
/// Cost:     one pass over gradient and sum per summand.
class OrderFreeSums {
public:
    OrderFreeSums(const Parameters& parameters, const GradientRanges& ranges, std::int64_t summands);

    /// Moves every .grad into the sums.
    void take();

    /// Of what was taken. A parameter of unknown range is only measured: its sum is 0.
    const GradientRanges& largest() const { return largest_; }

    /// The sums of the parameters that had a gradient.
    GradientViews sums() const;

private:
    struct Sum {
        at::Tensor parameter;
        double shift;  // 0: the range is not known
        at::Tensor sum = {};
    };

    std::vector<Sum> sums_;
    GradientRanges largest_;
};

}  // namespace microbatch
