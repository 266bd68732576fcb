#include "microbatch/run/run_folder.h"

#include <gtest/gtest.h>
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include <functional>

#include "support/errors.h"
#include "support/temp_folder.h"
#include "support/waiting.h"

namespace microbatch {
namespace {

using namespace test;
namespace fs = std::filesystem;

/// What the call returns in a process of its own; 99 if it throws.
int in_child(const std::function<int()>& call) {
    const pid_t child = ::fork();
    if (child == 0) {
        try {
            ::_exit(call());
        } catch (...) {
            ::_exit(99);
        }
    }
    int status = 0;
    EXPECT_EQ(::waitpid(child, &status, 0), child);
    return WIFEXITED(status) ? WEXITSTATUS(status) : -WTERMSIG(status);
}

int try_lock(const fs::path& folder) {
    return in_child([&] {
        try {
            return RunLock(folder).is_held() ? 0 : 1;
        } catch (const Error& error) {
            const std::string message = error.what();
            const bool clear = message.find(folder.string()) != std::string::npos &&
                               message.find("another process") != std::string::npos;
            return clear && error.kind() == ErrorKind::usage ? 2 : 3;
        }
    });
}

TEST(RunLock, NoOtherProcessCanHaveTheFolderMeanwhile) {
    const TempFolder folder;
    {
        const RunLock lock(folder.path());
        EXPECT_TRUE(lock.is_held());
        EXPECT_EQ(try_lock(folder.path()), 2);
        EXPECT_EQ(try_lock(folder.path()), 2);  // the refused one has not freed it
        EXPECT_EQ(try_lock(folder.path() / "another"), 0);
    }
    EXPECT_EQ(try_lock(folder.path()), 0);
}

TEST(RunLock, AForkedChildDoesNotKeepIt) {
    const TempFolder folder;
    int ends[2];
    ASSERT_EQ(::pipe(ends), 0);
    pid_t child = -1;
    {
        const RunLock lock(folder.path());
        child = ::fork();  // as a data loader forks its workers
        if (child == 0) {
            ::close(ends[1]);
            char byte;
            ::_exit(static_cast<int>(::read(ends[0], &byte, 1)));  // lives as long as the pipe
        }
        EXPECT_EQ(try_lock(folder.path()), 2);
    }
    EXPECT_EQ(try_lock(folder.path()), 0);
    ::close(ends[1]);
    int status = -1;
    EXPECT_EQ(::waitpid(child, &status, 0), child);
    EXPECT_EQ(status, 0);
    ::close(ends[0]);
}

TEST(RunLock, NorCanThisOne) {
    const TempFolder folder;
    const RunLock lock(folder.path());
    expect_usage_error({folder.path().string()}, [&] { RunLock second(folder.path()); });
    EXPECT_EQ(try_lock(folder.path()), 2);
}

TEST(RunLock, IsFreeHoweverTheProcessEnds) {
    const TempFolder folder;
    for (const int signal : {SIGKILL, SIGTERM, SIGABRT}) {
        EXPECT_EQ(in_child([&] {
                      const RunLock lock(folder.path());
                      ::kill(::getpid(), signal);
                      return 0;
                  }),
                  -signal);
        EXPECT_EQ(try_lock(folder.path()), 0);
    }
}

TEST(RunLock, AProgramThatWasStartedMeanwhileDoesNotHoldIt) {
    const TempFolder folder;
    pid_t program = 0;
    {
        const RunLock lock(folder.path());
        program = ::fork();
        if (program == 0) {
            ::execlp("sleep", "sleep", "infinity", nullptr);
            ::_exit(99);
        }
        // Its copy of the descriptor is closed once it runs.
        const std::string comm = "/proc/" + std::to_string(program) + "/comm";
        ASSERT_TRUE(comes_true([&comm] { return read_file(comm).find("sleep") != std::string::npos; }));
    }
    EXPECT_EQ(try_lock(folder.path()), 0);
    ::kill(program, SIGKILL);
    ::waitpid(program, nullptr, 0);
}

TEST(RunLock, MakesTheFolderAndLeavesNothingInIt) {
    const TempFolder folder;
    const fs::path run = folder.path() / "a" / "run";
    { const RunLock lock(run); }
    EXPECT_TRUE(fs::is_empty(run));
    const fs::path file = folder.write("file", "text");
    expect_write_error({file.string()}, [&] { const RunLock lock(file); });
    expect_write_error({file.string()}, [&] { const RunLock lock(file / "run"); });
}

}  // namespace
}  // namespace microbatch
