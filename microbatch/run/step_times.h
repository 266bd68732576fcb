#pragma once

#include <cstddef>
#include <vector>

#include "microbatch/core/median.h"

namespace microbatch {

/// Step times in bounded memory: of a long run, every second, fourth, ... step is kept.
class StepTimes {
public:
    static constexpr std::size_t most = 1024;

    void add(double seconds) {
        if (steps_++ % stride_ != 0) return;
        if (seconds_.size() == most) {
            for (std::size_t i = 0; i < most / 2; ++i) seconds_[i] = seconds_[2 * i];
            seconds_.resize(most / 2);
            stride_ *= 2;
        }
        seconds_.push_back(seconds);
    }

    bool empty() const { return seconds_.empty(); }

    double median() const { return microbatch::median(seconds_); }

private:
    std::size_t steps_ = 0, stride_ = 1;
    std::vector<double> seconds_;
};

}  // namespace microbatch
