#include "cli/print/output.h"

#include <fcntl.h>
#include <sys/ioctl.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <csignal>
#include <cstdlib>

#include "microbatch/core/units.h"

namespace microbatch::cli {

void prepare_output() {
    std::signal(SIGPIPE, SIG_IGN);
    // An opened file gets the lowest free descriptor.
    int opened = 0;
    while (opened >= 0 && opened <= STDERR_FILENO) opened = ::open("/dev/null", O_RDWR);
    if (opened >= 0) ::close(opened);
}

void write(std::FILE* stream, std::string_view text) {
    std::fwrite(text.data(), 1, text.size(), stream);
    std::fflush(stream);
}

void print_table(std::FILE* stream, const std::vector<std::vector<std::string>>& rows) {
    std::vector<std::size_t> widths;
    for (const auto& row : rows) {
        widths.resize(std::max(widths.size(), row.size()));
        for (std::size_t i = 0; i < row.size(); ++i) widths[i] = std::max(widths[i], row[i].size());
    }
    for (const auto& row : rows) {
        std::string line;
        for (std::size_t i = 0; i < row.size(); ++i) {
            line += i == 0 ? fmt::format("{:<{}}", row[i], widths[i]) : fmt::format("  {:>{}}", row[i], widths[i]);
        }
        line.erase(line.find_last_not_of(' ') + 1);
        print(stream, "{}\n", line);
    }
}

bool is_terminal(std::FILE* stream) {
    const char* name = std::getenv("TERM");
    const bool dumb = name != nullptr && std::string_view(name) == "dumb";
    return isatty(fileno(stream)) != 0 && !dumb;
}

std::size_t terminal_columns(std::FILE* stream) {
    winsize size{};
    if (ioctl(fileno(stream), TIOCGWINSZ, &size) != 0 || size.ws_col == 0) return 100;
    return size.ws_col;
}

LiveLine::LiveLine(std::FILE* stream, bool at_once) : stream_(stream), terminal_(is_terminal(stream)) {
    if (!terminal_ && !at_once) last_ = std::chrono::steady_clock::now();
}

bool LiveLine::is_due() const {
    return std::chrono::steady_clock::now() - last_ >= std::chrono::milliseconds(terminal_ ? 100 : 5000);
}

void LiveLine::draw(const std::string& line) {
    last_ = std::chrono::steady_clock::now();
    drawn_ = true;
    // Truncated to the window: a wrapped line cannot be redrawn.
    terminal_ ? print(stream_, "\r{}\x1b[K", line.substr(0, terminal_columns(stream_) - 1))
              : print(stream_, "{}\n", line);
}

void LiveLine::end() {
    if (terminal_ && drawn_) print(stream_, "\n");
    drawn_ = false;
}

void LiveLine::clear() {
    if (terminal_ && drawn_) print(stream_, "\r\x1b[K");
}

std::vector<std::pair<std::string, std::int64_t>> named(const MemoryParts& parts) {
    return {{"parameters", parts.parameters},
            {"gradients", parts.gradients},
            {"optimizer state", parts.optimizer_state},
            {"activations", parts.activations},
            {"other", parts.other}};
}

std::string describe_parts(const MemoryParts& parts) {
    std::string text;
    for (const auto& [name, bytes] : named(parts)) {
        text += fmt::format("{}{} {}", text.empty() ? "" : ", ", name, format_bytes(bytes));
    }
    return text;
}

std::string percent_off(double predicted, double measured) {
    return fmt::format("{:+.1f} %", 100.0 * (predicted / measured - 1.0));
}

}  // namespace microbatch::cli
