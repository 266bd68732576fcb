#include "microbatch/core/spike_guard.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <utility>

#include "microbatch/core/error.h"
#include "microbatch/core/str_cat.h"

namespace microbatch {

namespace {

constexpr std::size_t level_steps = 16;   // the level of the loss is the median of this many losses
constexpr std::int64_t enough_steps = 8;  // fewer do not show their spread
constexpr double knee = 0.01;             // of the scale: losses above it compare by ratio, below by difference
constexpr double first_factor = 10.0;     // how far above the first loss the second may be
constexpr double least_spread = 0.0075;   // for losses that are all the same
constexpr double least_rise = 0.02;       // of the scale: a loss that rises by less is not refused
constexpr double least_climb = 0.1;       // of the level and of the scale: less is not divergence

double median_of(std::vector<double> values) {
    std::sort(values.begin(), values.end());
    const std::size_t half = values.size() / 2;
    return values.size() % 2 == 1 ? values[half] : 0.5 * (values[half - 1] + values[half]);
}

template <class Value>
std::vector<double> values_of(const std::deque<SpikeGuardState::Accepted>& accepted, const Value& value) {
    std::vector<double> values;
    for (const auto& one : accepted) values.push_back(value(one));
    return values;
}

std::int64_t enough(std::int64_t least) {
    return std::min(enough_steps, least);
}

struct Usual {
    double median = 0.0, spread = least_spread, spread_below = least_spread;
};

// The spread is the distance from the median to the start of the top sixteenth. With fewer than `least` values, of
// which a climb could be a sixteenth, it is the median deviation. Both are scaled to the deviation of a normal
// distribution.
Usual usual_of(std::vector<double> values, std::int64_t least) {
    std::sort(values.begin(), values.end());
    Usual usual{median_of(values)};
    const auto count = static_cast<std::int64_t>(values.size());
    if (count < enough(least)) return usual;
    double up = 0.0, down = 0.0;
    if (count < least) {
        for (double& value : values) value = std::abs(value - usual.median);
        up = down = 1.4826 * median_of(std::move(values));
    } else {
        const std::size_t beyond = (values.size() + 1) / 16;
        up = (values[values.size() - 1 - beyond] - usual.median) / 1.534;
        down = (usual.median - values[beyond]) / 1.534;
    }
    return {usual.median, std::max(least_spread, up), std::max(least_spread, down)};
}

// The logarithm of large losses; in proportion to losses near 0, and defined below.
double compressed(double loss, double scale) {
    return std::asinh(loss / (knee * scale));
}

// The loss that is `room` above `loss` when compressed, and at least `share` of the scale above it.
double above(double loss, double room, double share, double scale) {
    const double raised = knee * scale * std::sinh(compressed(loss, scale) + room);
    return std::min(std::max(raised, loss + share * scale), std::numeric_limits<double>::max());
}

Usual usual_losses(const SpikeGuardState& state, std::int64_t least) {
    return usual_of(values_of(state.accepted, [&](const auto& one) { return compressed(one.loss, state.scale); }),
                    least);
}

// The median of the last losses, with the next one if there is one.
double level_of(const std::deque<SpikeGuardState::Accepted>& accepted, std::optional<double> next = {}) {
    std::vector<double> values;
    if (next) values.push_back(*next);
    for (auto one = accepted.rbegin(); one != accepted.rend() && values.size() < level_steps; ++one) {
        values.push_back(one->loss);
    }
    return median_of(std::move(values));
}

void validate(const SpikeGuardOptions& options) {
    const auto refuse = [](const std::string& what) { throw Error(ErrorKind::usage, "spike guard: " + what); };
    if (options.least < 2) refuse(str_cat("least is ", options.least, "; a spread needs at least 2 steps"));
    if (options.window < options.least) {
        refuse(
            str_cat("the window of ", options.window, " steps is shorter than the required ", options.least, " steps"));
    }
    if (!std::isfinite(options.sigmas) || options.sigmas <= 0.0) {
        refuse(str_cat("sigmas is ", options.sigmas, "; it must be finite and above 0"));
    }
    if (options.most_refused < 1) refuse(str_cat("most_refused is ", options.most_refused, "; it must be at least 1"));
}

}  // namespace

SpikeGuard::SpikeGuard(const SpikeGuardOptions& options) : options_(options) {
    validate(options);
}

Judgement SpikeGuard::evaluate(double loss, double gradient_norm) const {
    if (std::string reason = why_unusual(loss, gradient_norm); !reason.empty()) {
        return {state_.refused_in_a_row < options_.most_refused ? Verdict::refuse : Verdict::diverged,
                std::move(reason)};
    }
    std::string reason = why_climbing(loss);
    return {reason.empty() ? Verdict::apply : Verdict::diverged, std::move(reason)};
}

void SpikeGuard::record(double loss, double gradient_norm, bool applied) {
    if (!applied) {
        ++state_.refused_in_a_row;
        return;
    }
    state_.refused_in_a_row = 0;
    state_.accepted.push_back({loss, gradient_norm});
    if (steps() > options_.window) state_.accepted.pop_front();
    if (!state_.bounds) {
        const double typical =
            median_of(values_of(state_.accepted, [](const auto& one) { return std::abs(one.loss); }));
        state_.scale = std::max(typical, std::numeric_limits<double>::min());
    }
    if (steps() >= enough(options_.least)) lower_bounds();
}

void SpikeGuard::restore(SpikeGuardState state) {
    const SpikeGuardState::Bounds bounds = state.bounds.value_or(SpikeGuardState::Bounds{});
    bool sound = state.refused_in_a_row >= 0 && std::isfinite(bounds.diverged) && std::isfinite(bounds.calm) &&
                 std::isfinite(state.scale) && (state.scale > 0.0 || state.accepted.empty());
    for (const auto& one : state.accepted) {
        sound = sound && std::isfinite(one.loss) && std::isfinite(one.gradient_norm);
    }
    if (!sound) throw Error(ErrorKind::usage, "spike guard: this state is invalid");
    while (static_cast<std::int64_t>(state.accepted.size()) > options_.window) state.accepted.pop_front();
    state_ = std::move(state);
}

bool SpikeGuard::is_calm() const {
    if (state_.refused_in_a_row > 0) return false;
    if (state_.bounds) return level_of(state_.accepted) <= state_.bounds->calm;
    return state_.accepted.empty() || state_.accepted.back().loss <= state_.accepted.front().loss;
}

std::string SpikeGuard::why_unusual(double loss, double gradient_norm) const {
    if (!std::isfinite(loss)) return "loss is not finite";
    if (!std::isfinite(gradient_norm)) return "gradient norm is not finite";
    if (state_.accepted.empty()) return {};
    const auto exceeds = [](const char* what, double value, double bound) {
        return str_cat(what, " of ", value, " exceeds ", bound, ", the bound from the previous steps");
    };
    if (const double bound = bound_of_losses(); loss > bound) return exceeds("loss", loss, bound);
    if (steps() < options_.least) return {};
    // A gradient of zeros has no logarithm; it is below every bound anyway.
    const Usual norms = usual_of(
        values_of(state_.accepted, [](const auto& one) { return std::log(std::max(one.gradient_norm, 1e-300)); }),
        options_.least);
    const double norm_bound = std::exp(norms.median + options_.sigmas * norms.spread);
    return gradient_norm > norm_bound ? exceeds("gradient norm", gradient_norm, norm_bound) : std::string();
}

std::string SpikeGuard::why_climbing(double loss) const {
    if (!state_.bounds) return {};
    const double level = level_of(state_.accepted, loss);
    if (level <= state_.bounds->diverged) return {};
    return str_cat("median loss of the last ", level_steps, " steps has climbed to ", level, ", above the bound of ",
                   state_.bounds->diverged);
}

double SpikeGuard::room_at_first() const {
    const double missing = 1.0 - static_cast<double>(steps()) / static_cast<double>(options_.least);
    return std::max(missing, 0.0) * std::log(first_factor);
}

// The bound of a single loss.
double SpikeGuard::bound_of_losses() const {
    const Usual usual = usual_losses(state_, options_.least);
    const double median = knee * state_.scale * std::sinh(usual.median);
    return above(median, options_.sigmas * usual.spread + room_at_first(), least_rise, state_.scale);
}

void SpikeGuard::lower_bounds() {
    const double level = level_of(state_.accepted);
    const Usual usual = usual_losses(state_, options_.least);
    // Where half of the losses are near 0, the level jumps between both halves.
    const double spread = std::max(usual.spread, usual.spread_below);
    const double room = std::max(options_.sigmas * spread, std::log1p(least_climb)) + room_at_first();
    const SpikeGuardState::Bounds now{.diverged = above(level, room, least_climb, state_.scale),
                                      .calm = above(level, 0.5 * room, 0.5 * least_climb, state_.scale)};
    if (!state_.bounds) state_.bounds = now;
    state_.bounds->diverged = std::min(state_.bounds->diverged, now.diverged);
    state_.bounds->calm = std::min(state_.bounds->calm, now.calm);
}

bool ends_worse(const std::vector<double>& losses, std::optional<double> held_out) {
    const std::size_t count = std::min(level_steps, losses.size() / 2);
    if (count == 0) return false;
    double last = median_of({losses.end() - static_cast<std::ptrdiff_t>(count), losses.end()});
    if (held_out) last = std::isfinite(*held_out) ? std::max(last, *held_out) : *held_out;
    if (!std::isfinite(last)) return true;
    // The fewer first losses there are, the less reliable they are.
    for (const auto& [steps, factor] : {std::pair{1U, count < 4 ? 10.0 : 3.0}, {4U, 2.0}, {16U, 1.1}}) {
        if (count < steps) break;
        const double largest = *std::max_element(losses.begin(), losses.begin() + steps);
        if (last > largest + (factor - 1.0) * std::abs(largest)) return true;
    }
    return false;
}

}  // namespace microbatch
