#include "microbatch/core/memory_model.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <utility>

#include "microbatch/core/error.h"
#include "microbatch/core/str_cat.h"

namespace microbatch {
namespace {

void check_points(const MemoryPoint& smaller, const MemoryPoint& larger) {
    if (smaller.micro_batch < 1 || larger.micro_batch <= smaller.micro_batch) {
        throw Error(ErrorKind::usage,
                    str_cat("memory was measured at micro-batches of ", smaller.micro_batch, " and ",
                            larger.micro_batch, "; give two sizes of at least 1, the smaller one first"));
    }
    if (smaller.profile.empty() || larger.profile.empty()) {
        throw Error(ErrorKind::usage, "a memory profile is empty: nothing was measured");
    }
}

MemoryLine line_through(std::int64_t b1, std::int64_t bytes1, std::int64_t b2, std::int64_t bytes2) {
    if (bytes2 <= bytes1) return {.fixed_bytes = static_cast<double>(bytes1), .bytes_per_sample = 0};
    const double slope = static_cast<double>(bytes2 - bytes1) / static_cast<double>(b2 - b1);
    return {.fixed_bytes = static_cast<double>(bytes1) - slope * static_cast<double>(b1), .bytes_per_sample = slope};
}

/// True if `middle` is nowhere above both its neighbours; the lines are sorted by slope.
bool is_covered(const MemoryLine& low, const MemoryLine& middle, const MemoryLine& high) {
    return (high.fixed_bytes - low.fixed_bytes) * (middle.bytes_per_sample - low.bytes_per_sample) >=
           (middle.fixed_bytes - low.fixed_bytes) * (high.bytes_per_sample - low.bytes_per_sample);
}

/// The upper envelope, for b >= 1.
std::vector<MemoryLine> largest_lines(std::vector<MemoryLine> lines) {
    std::sort(lines.begin(), lines.end(), [](const MemoryLine& left, const MemoryLine& right) {
        return std::pair(left.bytes_per_sample, left.fixed_bytes) <
               std::pair(right.bytes_per_sample, right.fixed_bytes);
    });
    std::vector<MemoryLine> hull;
    for (const MemoryLine& line : lines) {
        // The later line is steeper: if it is larger at 1 already, the earlier one never is.
        while (!hull.empty() && line.at(1) >= hull.back().at(1)) hull.pop_back();
        while (hull.size() >= 2 && is_covered(hull[hull.size() - 2], hull.back(), line)) hull.pop_back();
        hull.push_back(line);
    }
    return hull;
}

}  // namespace

std::int64_t peak_of(const MemoryProfile& profile) {
    return profile.empty() ? 0 : *std::max_element(profile.begin(), profile.end());
}

const MemoryLine& MemoryModel::line_at(std::int64_t micro_batch) const {
    if (lines.empty()) throw Error(ErrorKind::usage, "an empty memory model predicts nothing: fit it first");
    if (micro_batch < 1) {
        throw Error(ErrorKind::usage, str_cat("the micro-batch is ", micro_batch, " samples; it must be 1 or more"));
    }
    return *std::max_element(lines.begin(), lines.end(), [&](const MemoryLine& left, const MemoryLine& right) {
        return left.at(micro_batch) < right.at(micro_batch);
    });
}

std::int64_t MemoryModel::predict(std::int64_t micro_batch) const {
    const double bytes = std::ceil(line_at(micro_batch).at(micro_batch));
    if (bytes <= 0) return 0;
    constexpr std::int64_t largest = std::numeric_limits<std::int64_t>::max();
    // As a double the limit rounds up to 2^63: every smaller double converts.
    return bytes < static_cast<double>(largest) ? static_cast<std::int64_t>(bytes) : largest;
}

MemoryModel fit_memory(const MemoryPoint& smaller, const MemoryPoint& larger) {
    check_points(smaller, larger);
    // Single peaks cannot be matched.
    const bool matched = smaller.profile.size() == larger.profile.size() && smaller.profile.size() > 1;
    std::vector<MemoryLine> lines;
    if (matched) {
        lines.reserve(smaller.profile.size());
        for (std::size_t i = 0; i < smaller.profile.size(); ++i) {
            lines.push_back(
                line_through(smaller.micro_batch, smaller.profile[i], larger.micro_batch, larger.profile[i]));
        }
    } else {
        lines.push_back(
            line_through(smaller.micro_batch, peak_of(smaller.profile), larger.micro_batch, peak_of(larger.profile)));
    }
    return {.lines = largest_lines(std::move(lines)), .matched = matched};
}

}  // namespace microbatch
