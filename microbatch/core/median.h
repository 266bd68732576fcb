#pragma once

#include <algorithm>
#include <cstddef>
#include <vector>

namespace microbatch {

/// The median; of an even number of values the larger of the two in the middle, 0 of none.
inline double median(std::vector<double> values) {
    if (values.empty()) return 0.0;
    const auto middle = values.begin() + static_cast<std::ptrdiff_t>(values.size() / 2);
    std::nth_element(values.begin(), middle, values.end());
    return *middle;
}

/// The median of times; the smaller middle value of an even number, since disturbances only make a measurement longer.
/// Requires: not empty.
inline double lower_median(std::vector<double> times) {
    const auto middle = times.begin() + static_cast<std::ptrdiff_t>((times.size() - 1) / 2);
    std::nth_element(times.begin(), middle, times.end());
    return *middle;
}

}  // namespace microbatch
