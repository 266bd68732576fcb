#pragma once

#include <ATen/Parallel.h>
#include <gtest/gtest.h>

#include <string>

#include "microbatch/core/error.h"

/// Tensors as small as here gain nothing from a second thread and wait for it on a busy machine: seconds, not
/// milliseconds.
inline const bool one_thread = [] {
    at::set_num_threads(1);
    return true;
}();

/// The message of the usage error that the call throws; the test fails if it throws none or another kind.
template <class Call>
std::string usage_message(Call&& call) {
    try {
        call();
    } catch (const microbatch::Error& error) {
        EXPECT_EQ(error.kind(), microbatch::ErrorKind::usage);
        return error.what();
    }
    ADD_FAILURE() << "no microbatch::Error";
    return {};
}

inline void expect_contains(const std::string& message, const std::string& part) {
    EXPECT_NE(message.find(part), std::string::npos) << '"' << part << "\" is not in: " << message;
}
