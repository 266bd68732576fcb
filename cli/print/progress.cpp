#include "cli/print/progress.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>

#include "cli/print/output.h"

namespace microbatch::cli {
namespace {

constexpr double terminal_interval = 0.1;
constexpr double pipe_interval = 5.0;

// As long as the space next to the figures allows, which matter more.
std::string bar(double share, std::size_t columns, std::size_t figures) {
    constexpr std::size_t longest = 20, shortest = 5, frame = 4;
    if (columns < figures + frame + shortest) return {};
    const std::size_t length = std::min(longest, columns - figures - frame);
    const auto filled = static_cast<std::size_t>(share * static_cast<double>(length));
    return fmt::format("[{}{}] ", std::string(filled, '#'), std::string(length - filled, '.'));
}

double seconds_between(std::chrono::steady_clock::time_point a, std::chrono::steady_clock::time_point b) {
    return std::chrono::duration<double>(b - a).count();
}

}  // namespace

ProgressLine::ProgressLine(std::FILE* stream, Interval length, const char* speed_unit, std::int64_t budget_bytes,
                           const Progress& begun)
    : stream_(stream),
      terminal_(is_terminal(stream)),
      length_(length),
      speed_unit_(speed_unit),
      budget_bytes_(budget_bytes),
      begun_(begun),
      started_(std::chrono::steady_clock::now()),
      drawn_(started_) {}

void ProgressLine::update(const TrainerReport& report, std::int64_t peak_bytes) {
    last_ = report;
    peak_bytes_ = std::max(peak_bytes_, peak_bytes);
    if (!std::isfinite(report.step.loss)) {
        loss_ = report.step.loss;
        losses_ = 0;
    } else if (report.step.weight > 0.0) {
        const double share = std::max(0.1, 1.0 / static_cast<double>(++losses_));
        loss_ = losses_ == 1 ? report.step.loss : loss_ + share * (report.step.loss - loss_);
    }
    pending_ = true;
    const auto now = std::chrono::steady_clock::now();
    if (drawn_once_ && seconds_between(drawn_, now) < (terminal_ ? terminal_interval : pipe_interval)) return;
    drawn_ = now;
    draw(line());
}

void ProgressLine::note(const std::string& text) {
    print(stream_, "{}{}\n", terminal_ && drawn_once_ ? "\r\x1b[K" : "", text);
}

void ProgressLine::finish() {
    if (pending_) draw(line());
    if (terminal_ && drawn_once_) print(stream_, "\n");
    drawn_once_ = false;
}

std::string ProgressLine::line() const {
    const double elapsed = seconds_between(started_, std::chrono::steady_clock::now());
    const Progress& progress = last_.progress;
    const double share =
        std::min(1.0, static_cast<double>(progress.in(length_.unit)) / static_cast<double>(length_.count));
    const double speed = static_cast<double>(progress.tokens - begun_.tokens) / std::max(elapsed, 1e-9);
    const double begun = static_cast<double>(begun_.in(length_.unit)) / static_cast<double>(length_.count);
    const double left = share > begun ? elapsed / (share - begun) * (1.0 - share) : -1.0;
    const double mebibyte = 1024.0 * 1024.0;
    const std::string figures = fmt::format(
        "{:3.0f} %  step {}  loss {:.4f}  {} {}/s  peak {:.1f} of {:.1f} MiB  {} left", 100.0 * share, progress.steps,
        loss_, format_count(std::llround(speed)), speed_unit_, static_cast<double>(peak_bytes_) / mebibyte,
        static_cast<double>(budget_bytes_) / mebibyte, clock_time(left));
    return terminal_ ? bar(share, terminal_columns(stream_), figures.size()) + figures : figures;
}

void ProgressLine::draw(const std::string& line) {
    pending_ = false;
    drawn_once_ = true;
    if (terminal_) {
        // Truncated to the window: a wrapped line cannot be redrawn.
        print(stream_, "\r{}\x1b[K", line.substr(0, terminal_columns(stream_) - 1));
    } else {
        print(stream_, "{}\n", line);
    }
}

}  // namespace microbatch::cli
