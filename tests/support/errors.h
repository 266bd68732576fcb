#pragma once

#include <gtest/gtest.h>

#include <string>
#include <vector>

#include "microbatch/core/error.h"

namespace microbatch::test {

/// The message of the microbatch::Error that the call must throw; empty, with a failed test, if it does not throw.
template <class Call>
std::string error_message(ErrorKind kind, Call&& call) {
    try {
        call();
    } catch (const Error& error) {
        EXPECT_EQ(error.kind(), kind) << error.what();
        return error.what();
    }
    ADD_FAILURE() << "no microbatch::Error";
    return {};
}

/// The call throws an error of this kind whose text is one line and has all these parts.
template <class Call>
void expect_error(ErrorKind kind, const std::vector<std::string>& parts, Call&& call) {
    const std::string message = error_message(kind, call);
    EXPECT_EQ(message.find('\n'), std::string::npos) << message;
    EXPECT_FALSE(message.empty());
    for (const std::string& part : parts) {
        EXPECT_NE(message.find(part), std::string::npos) << '"' << part << "\" is not in: " << message;
    }
}

template <class Call>
void expect_usage_error(const std::vector<std::string>& parts, Call&& call) {
    expect_error(ErrorKind::usage, parts, call);
}

template <class Call>
void expect_write_error(const std::vector<std::string>& parts, Call&& call) {
    expect_error(ErrorKind::not_written, parts, call);
}

}  // namespace microbatch::test
