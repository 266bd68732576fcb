// What the probe does at the edges: the uncut batch, and sizes that run out of memory while they are measured.
#include <c10/util/Exception.h>
#include <gtest/gtest.h>

#include "microbatch/memory/probe.h"
#include "support/errors.h"

namespace microbatch {
namespace {

using test::expect_error;

/// A job of `gradients` bytes of gradients, which an uncut batch does not hold during its forward pass.
Measurement job_with_gradients(std::int64_t size, std::int64_t batch, std::int64_t gradients) {
    const std::int64_t peak = 1000 + gradients + 10 * size - (size == batch ? gradients : 0);
    return {.micro_batch = size,
            .peak_bytes = peak,
            .micro_batch_seconds = 1e-3 * static_cast<double>(size),
            .update_seconds = 0.0};
}

TEST(ProbeLimits, TakesTheUncutBatchWhereNotEvenOneSampleFitsOtherwise) {
    const auto measure = [](std::int64_t size) { return job_with_gradients(size, 16, 500); };
    const Probe probe = probe_micro_batches(16, 1200, measure, 500);
    EXPECT_EQ(probe.candidates[probe.chosen].micro_batch, 16);
    EXPECT_FALSE(probe.candidates.front().fits);
    expect_error(ErrorKind::does_not_fit, {"1.47 KiB", "1.07 KiB"},
                 [&] { probe_micro_batches(16, 1100, measure, 500); });
}

TEST(ProbeLimits, KeepsTheUncutBatchOffTheLineOfTheOthers) {
    for (const std::int64_t batch : {2, 4, 16, 100}) {
        const auto measure = [batch](std::int64_t size) { return job_with_gradients(size, batch, 500); };
        const Probe probe = probe_micro_batches(batch, 1 << 20, measure, 500);
        EXPECT_DOUBLE_EQ(probe.memory.fixed_bytes, 1500);
        EXPECT_DOUBLE_EQ(probe.memory.bytes_per_sample, 10);
        EXPECT_EQ(probe.candidates.back().predicted_peak_bytes, 1000 + 10 * batch);
    }
}

TEST(ProbeLimits, TakesAnOutOfMemoryErrorAsNotFitting) {
    for (std::int64_t most = 1; most <= 40; ++most) {
        const auto measure = [most](std::int64_t size) -> Measurement {
            TORCH_CHECK_WITH(OutOfMemoryError, size <= most, "no room");
            return {.micro_batch = size, .peak_bytes = 100 + size, .micro_batch_seconds = 1.0, .update_seconds = 0.0};
        };
        const Probe probe = probe_micro_batches(32, 1 << 20, measure);
        EXPECT_LE(probe.candidates[probe.chosen].micro_batch, most);
        EXPECT_TRUE(probe.candidates[probe.chosen].measured.has_value());
    }
    const auto never = [](std::int64_t) -> Measurement { TORCH_CHECK_WITH(OutOfMemoryError, false, "no room"); };
    expect_error(ErrorKind::does_not_fit, {"1 sample", "1 MiB"}, [&] { probe_micro_batches(32, 1 << 20, never); });
}

}  // namespace
}  // namespace microbatch
