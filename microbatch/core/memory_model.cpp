#include "microbatch/core/memory_model.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "microbatch/core/error.h"
#include "microbatch/core/text.h"

namespace microbatch {
namespace {

double affine(const MemoryModel& model, std::int64_t micro_batch) {
    return model.fixed_bytes + model.bytes_per_sample * static_cast<double>(micro_batch);
}

void check_points(std::span<const MemoryPoint> points) {
    for (const MemoryPoint& point : points) {
        if (point.micro_batch < 1 || point.peak_bytes < 1) {
            throw Error(ErrorKind::usage, text("a memory point of micro-batch ", point.micro_batch, " and ",
                                               point.peak_bytes, " bytes; both must be 1 or more"));
        }
    }
    const bool has_two_sizes = std::any_of(points.begin(), points.end(), [&](const MemoryPoint& point) {
        return point.micro_batch != points.front().micro_batch;
    });
    if (!has_two_sizes) {
        throw Error(ErrorKind::usage,
                    text("memory was measured at ", points.size(),
                         " points but not with two different micro-batch sizes; measure a second one"));
    }
}

/// The least-squares line, slope of any sign.
MemoryModel fit_line(std::span<const MemoryPoint> points) {
    // Relative to the first point, as sums of integers: peaks that are exactly affine give exact coefficients, and the
    // rounding up in predict() does not turn 1e-9 bytes into a whole one.
    const MemoryPoint origin = points.front();
    double sum_x = 0;
    double sum_y = 0;
    double sum_xx = 0;
    double sum_xy = 0;
    for (const MemoryPoint& point : points) {
        const auto x = static_cast<double>(point.micro_batch - origin.micro_batch);
        const auto y = static_cast<double>(point.peak_bytes - origin.peak_bytes);
        sum_x += x;
        sum_y += y;
        sum_xx += x * x;
        sum_xy += x * y;
    }
    const auto n = static_cast<double>(points.size());
    const double slope = (n * sum_xy - sum_x * sum_y) / (n * sum_xx - sum_x * sum_x);
    const double offset = (sum_y - slope * sum_x) / n;
    return {.fixed_bytes =
                static_cast<double>(origin.peak_bytes) + offset - slope * static_cast<double>(origin.micro_batch),
            .bytes_per_sample = slope};
}

}  // namespace

std::int64_t MemoryModel::predict(std::int64_t micro_batch) const {
    if (!std::isfinite(fixed_bytes) || !std::isfinite(bytes_per_sample) || bytes_per_sample < 0) {
        throw Error(ErrorKind::usage, text("a memory model of ", fixed_bytes, " bytes + ", bytes_per_sample,
                                           " bytes per sample; both must be finite, the second 0 or more"));
    }
    if (micro_batch < 1) {
        throw Error(ErrorKind::usage, text("the micro-batch is ", micro_batch, " samples; it must be 1 or more"));
    }
    const double bytes = std::ceil(affine(*this, micro_batch));
    if (bytes <= 0) return 0;
    constexpr std::int64_t largest = std::numeric_limits<std::int64_t>::max();
    // As a double the limit is 2^63, just above it: everything below converts.
    return bytes < static_cast<double>(largest) ? static_cast<std::int64_t>(bytes) : largest;
}

MemoryModel fit_memory(std::span<const MemoryPoint> points) {
    check_points(points);
    MemoryModel model = fit_line(points);
    if (model.bytes_per_sample < 0) {
        const auto highest = std::max_element(
            points.begin(), points.end(),
            [](const MemoryPoint& left, const MemoryPoint& right) { return left.peak_bytes < right.peak_bytes; });
        model = {.fixed_bytes = static_cast<double>(highest->peak_bytes), .bytes_per_sample = 0};
    }
    for (const MemoryPoint& point : points) {
        const auto measured = static_cast<double>(point.peak_bytes);
        const double error = std::abs(affine(model, point.micro_batch) - measured) / measured;
        model.worst_relative_error = std::max(model.worst_relative_error, error);
    }
    return model;
}

std::int64_t largest_that_fits(const MemoryModel& model, std::int64_t budget_bytes, std::int64_t most) {
    if (most < 0) throw Error(ErrorKind::usage, text("at most ", most, " samples fit; ask for 0 or more"));
    // predict() never falls as the micro-batch grows (every rounding in it keeps the order), so bisection is exact.
    std::int64_t fits = 0;
    std::int64_t unknown_end = most;
    while (fits < unknown_end) {
        const std::int64_t middle = unknown_end - (unknown_end - fits) / 2;
        if (model.predict(middle) <= budget_bytes) {
            fits = middle;
        } else {
            unknown_end = middle - 1;
        }
    }
    return fits;
}

}  // namespace microbatch
