#include <gtest/gtest.h>

#include <cstdio>
#include <cstdlib>

// As the command ends: without the destructors of LibTorch's operators, which take longer than most tests.
int main(int count, char** words) {
    testing::InitGoogleTest(&count, words);
    const int code = RUN_ALL_TESTS();
#if !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)
    std::fflush(nullptr);
    std::_Exit(code);
#endif
    return code;
}
