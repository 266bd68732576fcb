#pragma once

#include <gtest/gtest.h>

#include "microbatch/memory/budget_allocator.h"
#include "microbatch/step/probe.h"
#include "support/jobs.h"
#include "support/one_thread.h"

namespace microbatch::test {

constexpr std::int64_t mebibyte = std::int64_t{1} << 20;

inline GptConfig small_gpt(double dropout = 0.1) {
    return {.layers = 2, .heads = 2, .width = 32, .length = 16, .vocabulary = 64, .dropout = dropout};
}

/// Memory is counted.
class Planning : public ::testing::Test {
protected:
    static void SetUpTestSuite() { install_budget_allocator(); }
};

inline PlanReport plan_of(Job& job, const Batch& batch, PlannerOptions options = {}) {
    if (options.budget_bytes == 0) options.budget_bytes = 1024 * mebibyte;
    return plan_batch(*job.accumulator, batch, job.loss, options);
}

}  // namespace microbatch::test
