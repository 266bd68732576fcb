#pragma once

#include <string_view>

#include "microbatch/core/units.h"

namespace microbatch {

/// The shape of the learning rate from its peak to its end.
enum class ScheduleShape { constant, linear, cosine, wsd, polynomial };

/// The shape of that name: constant, linear, cosine, wsd or polynomial.
/// Errors: ErrorKind::usage for any other name.
ScheduleShape parse_schedule(std::string_view name);

/// The name that parse_schedule reads.
std::string_view to_string(ScheduleShape shape);

/// A learning rate over a run: linear warmup to the peak, then the shape, then `floor` (constant: the peak) from there
/// on.
///
/// Units: the intervals that a shape uses must share one unit; it may be steps, samples or tokens.
struct Schedule {
    ScheduleShape shape = ScheduleShape::constant;
    double peak = 1e-3;
    double floor = 0;   ///< the learning rate at the end, absolute
    Interval warmup{};  ///< 0: none
    Interval length{};  ///< where the decay ends, counted from the start of the run; constant needs none
    Interval decay{};   ///< wsd only: length of the linear decay that ends at `length`
    double power = 2;   ///< polynomial only
};

/// Throws unless the schedule gives a finite learning rate everywhere.
/// Errors: ErrorKind::usage naming the field: a rate that is not finite or negative, floor above peak, a negative
///         interval, a missing length or decay, different units, warmup + decay longer than length (constant: a
///         warmup longer than a length in its unit), power not above 0.
void validate(const Schedule& schedule);

/// The learning rate of the step that takes the run from `before` to `before + batch`. It depends on nothing else:
/// calling it once per micro-batch, or again after a resume, returns the same value.
///
/// With p = before, w = warmup, n = length, d = decay, all in their unit, and x = (p - w) / (n - w) kept in [0, 1]:
///   while p < w  peak * min(1, (p + batch) / w): the first step of w has peak / w, the last the peak
///   constant     peak
///   linear       peak + (floor - peak) x
///   cosine       floor + (peak - floor) (1 + cos(pi x)) / 2
///   polynomial   floor + (peak - floor) (1 - x)^power
///   wsd          peak until n - d, then peak + (floor - peak) (p + batch - (n - d)) / (d + batch), and the floor from
///                n on: the last of d steps is as far from the floor as the first is from the peak, 1 / (d + 1)
///
/// Errors: ErrorKind::usage as for validate, and if progress is negative or leaves int64.
/// Source: warmup: Goyal et al. 2017, arXiv:1706.02677; cosine: Loshchilov & Hutter 2017, arXiv:1608.03983;
///         wsd: Hu et al. 2024, arXiv:2404.06395.
double learning_rate(const Schedule& schedule, const Progress& before, const Progress& batch);

}  // namespace microbatch
