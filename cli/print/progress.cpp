#include "cli/print/progress.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <utility>

namespace microbatch::cli {
namespace {

// As long as the space next to the figures allows, which matter more.
std::string bar(double share, std::size_t columns, std::size_t figures) {
    constexpr std::size_t longest = 20, shortest = 5, frame = 4;
    if (columns < figures + frame + shortest) return {};
    const std::size_t length = std::min(longest, columns - figures - frame);
    const auto filled = static_cast<std::size_t>(share * static_cast<double>(length));
    return fmt::format("[{}{}] ", std::string(filled, '#'), std::string(length - filled, '.'));
}

}  // namespace

ProgressLine::ProgressLine(std::FILE* stream, Interval length, const char* speed_unit, std::int64_t budget_bytes,
                           const Progress& begun)
    : stream_(stream),
      live_(stream),
      length_(length),
      speed_unit_(speed_unit),
      budget_bytes_(budget_bytes),
      begun_(begun),
      started_(std::chrono::steady_clock::now()) {}

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
    pending_ = !live_.is_due();
    if (!pending_) live_.draw(line());
}

void ProgressLine::note(const std::string& text) {
    live_.clear();
    print(stream_, "{}\n", text);
}

void ProgressLine::finish() {
    if (std::exchange(pending_, false)) live_.draw(line());
    live_.end();
}

std::string ProgressLine::line() const {
    const double elapsed = std::chrono::duration<double>(std::chrono::steady_clock::now() - started_).count();
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
        static_cast<double>(budget_bytes_) / mebibyte, format_seconds(left));
    return live_.is_on_terminal() ? bar(share, terminal_columns(stream_), figures.size()) + figures : figures;
}

}  // namespace microbatch::cli
