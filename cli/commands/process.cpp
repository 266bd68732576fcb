#include "cli/commands/process.h"

#include <fcntl.h>
#include <poll.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

#include <array>
#include <atomic>
#include <cerrno>
#include <chrono>
#include <csignal>
#include <cstdint>
#include <cstring>
#include <ctime>

#include "cli/options/refuse.h"
#include "cli/print/output.h"

namespace microbatch::cli {
namespace {

constexpr int watched[] = {SIGINT, SIGTERM, SIGHUP};

constexpr std::int64_t same_signal = 200'000'000;  // nanoseconds

std::atomic<std::int64_t> came_at = 0;  // monotonic clock; 0 means not yet
static_assert(std::atomic<std::int64_t>::is_always_lock_free);

std::int64_t now() {
    timespec time{};
    clock_gettime(CLOCK_MONOTONIC, &time);
    return time.tv_sec * std::int64_t{1'000'000'000} + time.tv_nsec + 1;
}

extern "C" void remember(int number) {
    const std::int64_t at = now();
    std::int64_t first = 0;
    if (came_at.compare_exchange_strong(first, at) || at - first < same_signal) return;
    std::signal(number, SIG_DFL);
    std::raise(number);  // takes effect when this returns
}

struct Pipe {
    std::array<int, 2> ends{-1, -1};

    Pipe() {
        if (::pipe2(ends.data(), O_CLOEXEC) != 0) refuse("cannot create a pipe: {}", std::strerror(errno));
    }
    Pipe(const Pipe&) = delete;
    Pipe& operator=(const Pipe&) = delete;
    ~Pipe() {
        close(0);
        close(1);
    }
    void close(std::size_t end) {
        if (ends[end] >= 0) ::close(ends[end]);
        ends[end] = -1;
    }
};

// False at the end of the output.
bool read_some(int from, std::string& into) {
    std::array<char, 4096> buffer{};
    const ssize_t count = ::read(from, buffer.data(), buffer.size());
    if (count > 0) into.append(buffer.data(), static_cast<std::size_t>(count));
    return count > 0 || (count < 0 && errno == EINTR);
}

// Passes on whole lines as they arrive; keeps the child's error message.
void pass_on(std::string& text, std::FILE* out, std::string& error) {
    for (std::size_t end = text.find('\n'); end != std::string::npos; end = text.find('\n')) {
        const std::string line = text.substr(0, end);
        text.erase(0, end + 1);
        if (line.starts_with("microbatch: ")) {
            error = line;
        } else {
            print(out, "{}\n", line);
        }
    }
}

// Runs between fork and exec, where POSIX allows few calls.
[[noreturn]] void become(char* const* arguments, pid_t parent, int output, int errors) {
    // The kernel ends the child with its parent, however that ends. If the parent has already ended, the parent's
    // process id shows it.
    if (::prctl(PR_SET_PDEATHSIG, SIGKILL) != 0 || ::getppid() != parent) ::_exit(127);
    // In its own process group, it receives a terminal's Ctrl-C only through its parent, so only once.
    ::setpgid(0, 0);
    if (::dup2(output, STDOUT_FILENO) >= 0 && ::dup2(errors, STDERR_FILENO) >= 0) ::execv("/proc/self/exe", arguments);
    ::_exit(127);
}

pid_t start(const std::vector<std::string>& words, Pipe& output, Pipe& errors) {
    std::vector<char*> arguments;
    for (const std::string& word : words) arguments.push_back(const_cast<char*>(word.c_str()));
    arguments.push_back(nullptr);
    const pid_t parent = ::getpid();
    const pid_t child = ::fork();
    if (child == 0) become(arguments.data(), parent, output.ends[1], errors.ends[1]);
    if (child < 0) refuse("cannot start another process: {}", std::strerror(errno));
    output.close(1);
    errors.close(1);
    return child;
}

/// Passes a signal of this process on to the child: once, so that it can end properly, and kills it if it does not end
/// soon.
class PassedOn {
public:
    explicit PassedOn(pid_t child) : child_(child) {}

    void look() {
        const auto now = std::chrono::steady_clock::now();
        if (!interrupted() || killed_) return;
        if (!is_told_) {
            ::kill(child_, SIGINT);
            is_told_ = true;
            told_ = now;
        } else if (now - told_ > std::chrono::seconds(5)) {
            ::kill(child_, SIGKILL);
            killed_ = true;
        }
    }

private:
    pid_t child_;
    bool is_told_ = false;
    std::chrono::steady_clock::time_point told_ = {};
    bool killed_ = false;
};

int wait_for(pid_t child) {
    int status = 0;
    while (::waitpid(child, &status, 0) < 0 && errno == EINTR) {
    }
    return WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
}

}  // namespace

void watch_interrupts() {
    struct sigaction action {};
    action.sa_handler = remember;
    action.sa_flags = SA_RESTART;
    for (const int one : watched) {
        struct sigaction before {};
        sigaction(one, nullptr, &before);
        if (before.sa_handler != SIG_IGN) sigaction(one, &action, nullptr);
    }
}

bool interrupted() {
    return came_at != 0;
}

ChildResult run_child(const std::vector<std::string>& words, std::FILE* out) {
    Pipe output, errors;
    std::vector<std::string> all{"microbatch"};
    all.insert(all.end(), words.begin(), words.end());
    const pid_t child = start(all, output, errors);
    ChildResult result;
    std::array<pollfd, 2> ends{{{output.ends[0], POLLIN, 0}, {errors.ends[0], POLLIN, 0}}};
    std::string errors_so_far;
    std::array<std::string*, 2> texts{&result.output, &errors_so_far};
    PassedOn signal(child);
    while (ends[0].fd >= 0 || ends[1].fd >= 0) {
        ::poll(ends.data(), ends.size(), 200);
        signal.look();
        for (std::size_t i = 0; i < ends.size(); ++i) {
            if (ends[i].fd >= 0 && ends[i].revents != 0 && !read_some(ends[i].fd, *texts[i])) ends[i].fd = -1;
        }
        pass_on(errors_so_far, out, result.error);
    }
    result.exit_code = wait_for(child);
    if (interrupted()) throw Interrupted();
    return result;
}

}  // namespace microbatch::cli
