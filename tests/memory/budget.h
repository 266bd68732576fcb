#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <c10/util/Exception.h>
#include <gtest/gtest.h>

#include <cstdint>
#include <string>

#include "microbatch/memory/budget_allocator.h"

namespace microbatch::test {

inline std::int64_t live() {
    return memory_use().live_bytes;
}
inline std::int64_t peak() {
    return memory_use().peak_bytes;
}
inline at::Tensor bytes(std::int64_t count) {
    return at::empty({count}, at::kByte);
}

/// The message of the c10::OutOfMemoryError that the call must throw; empty, with a failed test, if it does not throw.
template <class Call>
std::string out_of_memory_message(Call&& call) {
    try {
        call();
    } catch (const c10::OutOfMemoryError& error) {
        return error.what_without_backtrace();
    }
    ADD_FAILURE() << "no c10::OutOfMemoryError";
    return {};
}

/// Every test begins and ends without a budget, and gives back all that it took.
class BudgetTest : public ::testing::Test {
protected:
    void SetUp() override {
        EXPECT_EQ(memory_budget(), no_budget);
        start_ = live();
        reset_peak_memory();
    }
    void TearDown() override {
        EXPECT_EQ(memory_budget(), no_budget);
        EXPECT_EQ(live(), start_);
    }
    std::int64_t start_ = 0;
};

}  // namespace microbatch::test
