#pragma once

#include <cstdint>
#include <span>

namespace microbatch {

/// The peak that was measured with one micro-batch size.
struct MemoryPoint {
    std::int64_t micro_batch = 0;
    std::int64_t peak_bytes = 0;
};

/// Peak memory as an affine function of the micro-batch: M(b) = fixed_bytes + bytes_per_sample * b.
///
/// Errors: every use throws ErrorKind::usage if fixed_bytes or bytes_per_sample is not finite, or the latter negative.
struct MemoryModel {
    double fixed_bytes = 0;
    double bytes_per_sample = 0;
    /// Largest |M(b) - measured| / measured over the points of the fit: how far to trust a prediction.
    double worst_relative_error = 0;

    /// Bytes at the peak, rounded up and kept within [0, int64's largest].
    /// Errors: ErrorKind::usage if micro_batch is below 1, or as above.
    std::int64_t predict(std::int64_t micro_batch) const;
};

/// The affine function with the smallest sum of squared errors. bytes_per_sample is never negative: where memory is
/// seen to fall with the micro-batch, the model is the largest peak measured, for every size.
///
/// Errors: ErrorKind::usage without two different micro-batch sizes, or if a size or a peak is below 1.
MemoryModel fit_memory(std::span<const MemoryPoint> points);

/// The largest micro-batch in [1, most] whose prediction is within the budget; 0 if there is none.
///
/// Units:  budget in bytes; int64's largest means no limit.
/// Errors: ErrorKind::usage if most is negative, or the model is unusable.
/// Cost:   64 predictions at most.
std::int64_t largest_that_fits(const MemoryModel& model, std::int64_t budget_bytes, std::int64_t most);

}  // namespace microbatch
