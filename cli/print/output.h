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

/// Prepares stdout and stderr: a reader that goes away ends nothing, and a closed stream becomes /dev/null, so that no
/// file of the run takes its place.
void prepare_output();

/// Writes to stdout or stderr at once. A failure (disk full, reader gone) is ignored: output never decides how a
/// command ends.
void write(std::FILE* stream, std::string_view text);

/// Formats and writes; the only way in which the command prints.
template <class... Args>
void print(std::FILE* stream, fmt::format_string<Args...> format, Args&&... args) {
    write(stream, fmt::format(format, std::forward<Args>(args)...));
}

/// Prints rows in aligned columns; the first row is the heading, the first column goes left and the others right.
void print_table(std::FILE* stream, const std::vector<std::vector<std::string>>& rows);

/// 3723 s -> "1:02:03", 62 s -> "1:02".
std::string clock_time(double seconds);

/// True if lines may be drawn over; not on a dumb terminal.
bool is_terminal(std::FILE* stream);

/// How wide it is; 100 where that is not known.
std::size_t terminal_columns(std::FILE* stream);

/// A line that says how something goes on: on a terminal drawn over and over, in a pipe a plain line once in a while.
class LiveLine {
public:
    /// at_once: in a pipe too the first line comes without waiting.
    explicit LiveLine(std::FILE* stream, bool at_once = true);
    LiveLine(const LiveLine&) = delete;
    LiveLine& operator=(const LiveLine&) = delete;
    ~LiveLine() { clear(); }

    bool is_on_terminal() const { return terminal_; }

    /// False if the one before is too new: what is not drawn costs nothing.
    bool is_due() const;
    void draw(const std::string& line);

    /// Makes room for a line of its own.
    void clear();
    /// Leaves the last one where it is.
    void end();

private:
    std::FILE* stream_;
    bool terminal_;
    bool drawn_ = false;
    std::chrono::steady_clock::time_point last_ = {};
};

/// Each part's name and bytes.
std::vector<std::pair<std::string, std::int64_t>> named(const MemoryParts& parts);

/// "parameters 3.18 MiB, gradients 3.18 MiB, optimizer state 6.37 MiB, activations 36.1 MiB, other 64 KiB".
std::string describe_parts(const MemoryParts& parts);

/// How far a prediction is off, of what was measured: "+1.5 %".
std::string percent_off(double predicted, double measured);

}  // namespace microbatch::cli
