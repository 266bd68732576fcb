#pragma once

#include <cstdint>
#include <random>

#include "microbatch/core/spike_guard.h"

namespace microbatch::test {

/// Evaluates a step and does as the guard says.
inline Judgement judge(SpikeGuard& guard, double loss, double norm) {
    Judgement judgement = guard.evaluate(loss, norm);
    guard.record(loss, norm, judgement.verdict == Verdict::apply);
    return judgement;
}

/// Draws from a normal distribution.
class Noise {
public:
    explicit Noise(std::uint64_t seed) : random_(seed) {}

    double operator()() { return normal_(random_); }

private:
    std::mt19937_64 random_;
    std::normal_distribution<double> normal_;
};

}  // namespace microbatch::test
