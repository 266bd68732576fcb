#pragma once

#include <fmt/format.h>

#include <chrono>
#include <cstdint>
#include <cstdio>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "microbatch/core/median.h"
#include "microbatch/core/plan_report.h"

namespace microbatch::cli {

/// Prepares stdout and stderr: a closed pipe does not end the process, and a closed stream becomes /dev/null, so that
/// no file of the run gets its descriptor.
void prepare_output();

/// Writes to stdout or stderr immediately. A failure (disk full, closed pipe) is ignored: output never affects the exit
/// code.
void write(std::FILE* stream, std::string_view text);

/// Formats and writes; the only way in which the command prints.
template <class... Args>
void print(std::FILE* stream, fmt::format_string<Args...> format, Args&&... args) {
    write(stream, fmt::format(format, std::forward<Args>(args)...));
}

/// Prints rows in aligned columns; the first row is the heading. The first column is left-aligned, the others right.
void print_table(std::FILE* stream, const std::vector<std::vector<std::string>>& rows);

/// True if lines can be redrawn; false on a dumb terminal.
bool is_terminal(std::FILE* stream);

/// The width of the terminal; 100 if unknown.
std::size_t terminal_columns(std::FILE* stream);

/// A line that shows progress: on a terminal, one line that is redrawn; in a pipe, an occasional plain line.
class LiveLine {
public:
    /// at_once: in a pipe, the first line is printed without waiting.
    explicit LiveLine(std::FILE* stream, bool at_once = true);
    LiveLine(const LiveLine&) = delete;
    LiveLine& operator=(const LiveLine&) = delete;
    ~LiveLine() { clear(); }

    bool is_on_terminal() const { return terminal_; }

    /// False if the previous line is too recent: the caller need not format a line that is not drawn.
    bool is_due() const;
    void draw(const std::string& line);

    /// Erases the line, so that a separate line can be printed.
    void clear();
    /// Ends the line and keeps it.
    void end();

private:
    std::FILE* stream_;
    bool terminal_;
    bool drawn_ = false;
    std::chrono::steady_clock::time_point last_ = {};
};

/// The name and size of each part.
std::vector<std::pair<std::string, std::int64_t>> named(const MemoryParts& parts);

/// "parameters 3.18 MiB, gradients 3.18 MiB, optimizer state 6.37 MiB, activations 36.1 MiB, other 64 KiB".
std::string describe_parts(const MemoryParts& parts);

/// The error of a prediction relative to the measurement: "+1.5 %".
std::string percent_off(double predicted, double measured);

}  // namespace microbatch::cli
