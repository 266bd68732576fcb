#pragma once

#include <cstdint>
#include <span>
#include <vector>

namespace microbatch {

/// Live bytes after every allocation and release of a piece of work, in order. Where only the peak is known, that
/// alone.
using MemoryProfile = std::vector<std::int64_t>;

/// The largest of the profile; 0 for an empty one.
std::int64_t peak_of(const MemoryProfile& profile);

/// What was measured of one piece of work at one micro-batch size.
struct MemoryPoint {
    std::int64_t micro_batch = 0;
    MemoryProfile profile = {};
};

/// Bytes live at one point of the work: fixed_bytes + bytes_per_sample * b.
struct MemoryLine {
    double fixed_bytes = 0;
    double bytes_per_sample = 0;

    double at(std::int64_t micro_batch) const {
        return fixed_bytes + bytes_per_sample * static_cast<double>(micro_batch);
    }
    bool operator==(const MemoryLine&) const = default;
};

/// Peak memory as a function of the micro-batch: M(b) = max over the points of the work of (fixed + per sample * b).
///
/// A job's peak is not affine in the micro-batch: at a small one it is where a large weight's gradient is made, at a
/// larger one at the end of the forward pass. Each single point of the work is affine, and the largest of the lines at
/// each size is the peak there.
struct MemoryModel {
    std::vector<MemoryLine> lines;  ///< those that are the largest somewhere, by rising bytes_per_sample
    /// True if both profiles had the same allocations in the same order, so that they could be matched one by one;
    /// false if only the peaks could be.
    bool matched = false;

    /// Bytes at the peak, rounded up and kept within [0, int64's largest].
    /// Errors: ErrorKind::usage if micro_batch is below 1 or there is no line.
    std::int64_t predict(std::int64_t micro_batch) const;

    /// The line that is the largest at this size. Errors: as predict().
    const MemoryLine& line_at(std::int64_t micro_batch) const;
};

/// The model that agrees with both points. Where memory is seen to fall with the micro-batch, the larger value holds
/// for every size: no prediction falls as the micro-batch grows.
///
/// Errors: ErrorKind::usage unless both sizes are at least 1 and differ, and no profile is empty.
MemoryModel fit_memory(const MemoryPoint& smaller, const MemoryPoint& larger);

}  // namespace microbatch
