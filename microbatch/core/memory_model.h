#pragma once

#include <cstdint>
#include <span>
#include <vector>

namespace microbatch {

/// Live bytes after every allocation and release of a piece of work, in order; only the peak if no more is known.
using MemoryProfile = std::vector<std::int64_t>;

/// The largest of the profile; 0 for an empty one.
std::int64_t peak_of(const MemoryProfile& profile);

/// The profile of a piece of work at one micro-batch size.
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
/// A job's peak is not linear in the micro-batch: for a small one, it occurs where a large weight's gradient is
/// created; for a larger one, at the end of the forward pass. The live bytes at each point of the work are linear (with
/// an offset), and the peak at a size is the largest of these lines.
struct MemoryModel {
    std::vector<MemoryLine> lines;  ///< that are the largest at some size, by rising bytes_per_sample
    /// True if both profiles had the same allocations in the same order, so that they could be matched one by one;
    /// false if only the peaks could be.
    bool matched = false;

    /// Bytes at the peak, rounded up and clamped to [0, largest int64].
    /// Errors: ErrorKind::usage if micro_batch is below 1 or there is no line.
    std::int64_t predict(std::int64_t micro_batch) const;

    /// The line that is the largest at this size. Errors: as predict().
    const MemoryLine& line_at(std::int64_t micro_batch) const;
};

/// The model through both points. If memory falls as the micro-batch grows, the larger value is used for every size, so
/// no prediction falls as the micro-batch grows.
///
/// Errors: ErrorKind::usage unless both sizes are at least 1 and differ, and no profile is empty.
MemoryModel fit_memory(const MemoryPoint& smaller, const MemoryPoint& larger);

}  // namespace microbatch
