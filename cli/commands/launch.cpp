#include "cli/commands/launch.h"

#include <fmt/format.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <csignal>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <iterator>
#include <optional>
#include <set>
#include <string>
#include <thread>
#include <vector>

#include "cli/commands/process.h"
#include "cli/options/refuse.h"
#include "cli/print/output.h"
#include "microbatch/core/error.h"
#include "microbatch/distributed/launch.h"

namespace microbatch::cli {
namespace {

std::vector<std::string> command_line() {
    std::ifstream file("/proc/self/cmdline", std::ios::binary);
    std::vector<std::string> words;
    for (std::string word; std::getline(file, word, '\0');) words.push_back(word);
    return words;
}

std::vector<char*> pointers_to(std::vector<std::string>& words) {
    std::vector<char*> all;
    for (std::string& word : words) all.push_back(word.data());
    all.push_back(nullptr);
    return all;
}

struct Child {
    pid_t process = 0;
    std::FILE* errors = nullptr;  // of all but the first
    int exit_code = -1;           // while it runs
    bool is_killed = false;       // by this process
    bool is_stopped = false;      // when it was last seen
};

std::vector<std::string> environment_of(const Launcher& launcher, int rank, int size) {
    std::vector<std::string> all = launcher.environment(rank, size);
    for (char** one = environ; *one != nullptr; ++one) {
        const std::string text = *one, name = text.substr(0, text.find('=') + 1);
        const auto is_set = [&name](const std::string& other) { return other.starts_with(name); };
        if (std::none_of(all.begin(), all.end(), is_set)) all.push_back(text);
    }
    if (std::getenv("OMP_NUM_THREADS") == nullptr) {
        const auto cores = static_cast<int>(std::thread::hardware_concurrency());
        all.push_back(fmt::format("OMP_NUM_THREADS={}", std::max(1, cores / size)));
    }
    return all;
}

Child start_rank(const Launcher& launcher, int rank, int size) {
    std::vector<std::string> words = command_line(), environment = environment_of(launcher, rank, size);
    const std::vector<char*> arguments = pointers_to(words), variables = pointers_to(environment);
    Child child;
    if (rank > 0) child.errors = std::tmpfile();
    const int errors = child.errors == nullptr ? -1 : ::fileno(child.errors);
    const pid_t parent = ::getpid();
    child.process = ::fork();
    if (child.process == 0) {
        // Between fork and exec, where POSIX allows few calls: see become() of process.cpp.
        if (::prctl(PR_SET_PDEATHSIG, SIGKILL) != 0 || ::getppid() != parent) ::_exit(127);
        ::setpgid(0, 0);
        if (errors >= 0) ::dup2(errors, STDERR_FILENO);
        ::execve("/proc/self/exe", arguments.data(), variables.data());
        ::_exit(127);
    }
    if (child.process < 0) refuse("cannot start another process: {}", std::strerror(errno));
    return child;
}

void signal_all(const std::vector<Child>& children, int number) {
    for (const Child& child : children) {
        if (child.exit_code < 0) ::kill(child.process, number);
    }
}

bool collect(std::vector<Child>& children) {
    for (Child& child : children) {
        int status = 0;
        if (child.exit_code >= 0 || ::waitpid(child.process, &status, WNOHANG) != child.process) continue;
        child.exit_code = WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
    }
    return std::all_of(children.begin(), children.end(), [](const Child& child) { return child.exit_code >= 0; });
}

// Stopped by a signal: it cannot end by itself.
bool is_stopped(const Child& child) {
    std::ifstream file(fmt::format("/proc/{}/stat", child.process));
    std::string text((std::istreambuf_iterator<char>(file)), {});
    const std::size_t name_end = text.rfind(") ");
    return name_end != std::string::npos && text.size() > name_end + 2 && text[name_end + 2] == 'T';
}

// When one has failed, the others find that within some 7 seconds, and end; the first writes a checkpoint before. Those
// that still waited for it to join do not find it.
void end_those_that_hang(std::vector<Child>& children, const Launcher& launcher,
                         std::chrono::steady_clock::duration since) {
    constexpr std::chrono::seconds to_end{9}, to_write{300};
    if (since < to_end) return;
    for (std::size_t rank = 0; rank < children.size(); ++rank) {
        Child& child = children[rank];
        const bool may_write = rank == 0 && !is_stopped(child) && launcher.has_joined(0);
        if (child.exit_code >= 0 || (may_write && since < to_write)) continue;
        child.is_killed = true;
        ::kill(child.process, SIGKILL);
    }
}

// A rank that is stopped before it has joined shows no sign of life that others could miss.
bool mark_stopped(std::vector<Child>& children) {
    bool any = false;
    for (Child& child : children) {
        child.is_stopped = child.exit_code < 0 && !child.is_killed ? is_stopped(child) : child.is_stopped;
        any = any || child.is_stopped;
    }
    return any;
}

void wait_for_all(std::vector<Child>& children, const Launcher& launcher) {
    using Clock = std::chrono::steady_clock;
    constexpr std::chrono::seconds long_enough{6};  // not the moment in which a whole job is continued
    std::optional<Clock::time_point> failed_at, told_at, stopped_at;
    while (!collect(children)) {
        if (!mark_stopped(children)) {
            stopped_at.reset();
        } else if (!stopped_at) {
            stopped_at = Clock::now();
        }
        if (stopped_at && !failed_at && Clock::now() - *stopped_at > long_enough) failed_at = stopped_at;
        const bool has_failed = std::any_of(children.begin(), children.end(), [](const Child& child) {
            return child.exit_code > 0 && child.exit_code != interrupted_exit_code;
        });
        if (has_failed && !failed_at) failed_at = Clock::now();
        if (interrupted() && !told_at) {
            signal_all(children, SIGINT);
            told_at = Clock::now();
        }
        if (failed_at) end_those_that_hang(children, launcher, Clock::now() - *failed_at);
        std::this_thread::sleep_for(std::chrono::milliseconds(20));
    }
}

std::string said_by(const Child& child) {
    if (child.errors == nullptr) return {};
    std::rewind(child.errors);
    std::string text;
    for (int c = std::fgetc(child.errors); c != EOF; c = std::fgetc(child.errors)) text += static_cast<char>(c);
    return text;
}

// What the first rank cannot have said: which was ended by a signal, and what the others have said before they ended.
void show_errors(const std::vector<Child>& children) {
    constexpr auto lost = static_cast<int>(ErrorKind::lost_rank);
    for (std::size_t rank = 0; rank < children.size(); ++rank) {
        if (children[rank].is_stopped) print(stderr, "microbatch: rank {} was stopped\n", rank);
        const int signal = children[rank].exit_code - 128;
        if (children[rank].exit_code == interrupted_exit_code || signal <= 0 || children[rank].is_killed) continue;
        print(stderr, "microbatch: rank {} was ended by signal {} ({})\n", rank, signal, ::strsignal(signal));
    }
    const int first = children.front().exit_code;
    const bool first_said_why = first != 0 && first != lost && first < 128;
    std::set<std::string> shown;
    for (std::size_t rank = 1; rank < children.size() && !first_said_why; ++rank) {
        // Who has only lost another is heard where the first one is silent.
        if (children[rank].exit_code == lost && (first == lost || !shown.empty())) continue;
        const std::string text = said_by(children[rank]);
        if (!text.empty() && shown.insert(text).second) print(stderr, "rank {}: {}", rank, text);
    }
}

// That of the rank that failed, not of those that lost it; lost_rank if a signal ended one.
int exit_code_of(const std::vector<Child>& children) {
    constexpr auto lost = static_cast<int>(ErrorKind::lost_rank);
    int code = 0;
    for (const Child& child : children) {
        const bool by_signal = child.exit_code >= 128 && child.exit_code != interrupted_exit_code;
        const int own = by_signal ? lost : child.exit_code;
        if (code == 0 || (code == lost && own != 0)) code = own;
    }
    return code;
}

}  // namespace

bool is_launcher(const Settings& settings) {
    return settings.processes > 1 && std::getenv("WORLD_SIZE") == nullptr;
}

int launch(const Settings& settings) {
    const Launcher launcher;
    const auto size = static_cast<int>(settings.processes);
    std::vector<Child> children;
    for (int rank = 0; rank < size; ++rank) children.push_back(start_rank(launcher, rank, size));
    wait_for_all(children, launcher);
    show_errors(children);
    return exit_code_of(children);
}

}  // namespace microbatch::cli
