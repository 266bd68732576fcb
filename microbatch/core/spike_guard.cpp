#include "microbatch/core/spike_guard.h"

#include <algorithm>
#include <cmath>
#include <iterator>
#include <utility>

#include "microbatch/core/error.h"
#include "microbatch/core/str_cat.h"

namespace microbatch {

namespace {

constexpr double least_relative_deviation = 1e-3;

struct Usual {
    double mean = 0.0, deviation = 0.0;

    double most(double sigmas) const { return mean + sigmas * deviation; }
};

// Two passes: the mean is far above the deviation.
template <class Iterator, class Value>
Usual usual_of(Iterator begin, Iterator end, const Value& value) {
    const auto count = static_cast<double>(std::distance(begin, end));
    Usual usual;
    for (auto at = begin; at != end; ++at) usual.mean += value(*at) / count;
    double squares = 0.0;
    for (auto at = begin; at != end; ++at) squares += (value(*at) - usual.mean) * (value(*at) - usual.mean);
    usual.deviation = std::sqrt(squares / (count - 1.0));
    return usual;
}

Usual widened(Usual usual, double scale) {
    usual.deviation = std::max(usual.deviation, least_relative_deviation * scale);
    return usual;
}

// A gradient of zeros has no logarithm; it is below every bound anyway.
double log_of(double norm) {
    return std::log(std::max(norm, 1e-300));
}

void validate(const SpikeGuardOptions& options) {
    const auto refuse = [](const std::string& what) { throw Error(ErrorKind::usage, "spike guard: " + what); };
    if (options.least < 2) refuse(str_cat("least is ", options.least, "; a deviation needs at least 2 steps"));
    if (options.window < options.least) {
        refuse(str_cat("the window of ", options.window, " steps is shorter than the ", options.least, " it needs"));
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
    std::string reason = why_climbing(with(loss, gradient_norm));
    return {reason.empty() ? Verdict::apply : Verdict::diverged, std::move(reason)};
}

void SpikeGuard::record(double loss, double gradient_norm, bool applied) {
    if (!applied) ++state_.refused_in_a_row;
    if (!why_unusual(loss, gradient_norm).empty()) return;
    state_ = with(loss, gradient_norm);
    if (applied) {
        state_.refused_in_a_row = 0;
    } else {
        state_.accepted.pop_back();
    }
}

void SpikeGuard::restore(SpikeGuardState state) {
    bool sound = state.refused_in_a_row >= 0 && std::isfinite(state.lowest_mean.value_or(0.0)) &&
                 std::isfinite(state.lowest_deviation) && std::isfinite(state.last_mean) && std::isfinite(state.scale);
    for (const Accepted& one : state.accepted) {
        sound = sound && std::isfinite(one.loss) && std::isfinite(one.gradient_norm);
    }
    if (!sound) throw Error(ErrorKind::usage, "spike guard: this is the state of none");
    while (static_cast<std::int64_t>(state.accepted.size()) > options_.window) state.accepted.pop_front();
    state_ = std::move(state);
}

bool SpikeGuard::is_calm() const {
    if (state_.refused_in_a_row > 0) return false;
    if (!state_.lowest_mean)
        return state_.accepted.empty() || state_.accepted.back().loss <= state_.accepted.front().loss;
    return state_.last_mean <= *state_.lowest_mean + state_.lowest_deviation;
}

std::string SpikeGuard::why_unusual(double loss, double gradient_norm) const {
    if (!std::isfinite(loss)) return "loss is not finite";
    if (!std::isfinite(gradient_norm)) return "gradient norm is not finite";
    if (static_cast<std::int64_t>(state_.accepted.size()) < options_.least) return {};
    const auto usual = [this](auto value) { return usual_of(state_.accepted.begin(), state_.accepted.end(), value); };
    const Usual losses = widened(usual([](const Accepted& one) { return one.loss; }), state_.scale);
    if (loss > losses.most(options_.sigmas)) {
        return str_cat("loss of ", loss, " is ", (loss - losses.mean) / losses.deviation, " deviations above ",
                       losses.mean);
    }
    Usual norms = usual([](const Accepted& one) { return one.gradient_norm; });
    norms = widened(norms, norms.mean);
    const Usual logs = usual([](const Accepted& one) { return log_of(one.gradient_norm); });
    if (gradient_norm > norms.most(options_.sigmas) && log_of(gradient_norm) > logs.most(options_.sigmas)) {
        return str_cat("gradient norm of ", gradient_norm, " is ", (gradient_norm - norms.mean) / norms.deviation,
                       " deviations above ", norms.mean);
    }
    return {};
}

// The state after this step, taken.
SpikeGuardState SpikeGuard::with(double loss, double gradient_norm) const {
    SpikeGuardState state = state_;
    state.accepted.push_back({loss, gradient_norm});
    if (static_cast<std::int64_t>(state.accepted.size()) > options_.window) state.accepted.pop_front();
    if (static_cast<std::int64_t>(state.accepted.size()) < options_.least) return state;
    Usual last = usual_of(state.accepted.end() - options_.least, state.accepted.end(),
                          [](const Accepted& one) { return one.loss; });
    if (!state.lowest_mean) state.scale = std::abs(last.mean);
    last = widened(last, state.scale);
    state.last_mean = last.mean;
    if (!state.lowest_mean || last.mean < *state.lowest_mean) {
        state.lowest_mean = last.mean;
        state.lowest_deviation = last.deviation;
    }
    return state;
}

std::string SpikeGuard::why_climbing(const SpikeGuardState& after) const {
    if (static_cast<std::int64_t>(after.accepted.size()) < options_.least) return {};
    if (after.last_mean <= *after.lowest_mean + options_.sigmas * after.lowest_deviation) return {};
    return str_cat("mean loss of the last ", options_.least, " steps has climbed to ", after.last_mean, " from ",
                   *after.lowest_mean);
}

}  // namespace microbatch
