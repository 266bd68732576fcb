#pragma once

#include <cstdint>
#include <deque>
#include <optional>
#include <string>
#include <vector>

namespace microbatch {

struct SpikeGuardOptions {
    std::int64_t window = 128;      ///< steps: the statistics cover the last applied steps
    std::int64_t least = 64;        ///< steps: until then, a loss has more room, and gradient norms are not checked
    double sigmas = 6.0;            ///< the bound: this many spreads above the median
    std::int64_t most_refused = 9;  ///< in a row; one more means divergence
};

/// What to do with a batch whose gradients are known but not yet applied.
enum class Verdict {
    apply,
    refuse,    ///< skip this batch: the parameters do not change
    diverged,  ///< skipping batches does not help: roll back and lower the rate, or stop
};

struct Judgement {
    Verdict verdict = Verdict::apply;
    std::string reason = {};  ///< what is wrong with this step, or with the last ones; empty if it is applied
};

/// The complete state of a guard.
struct SpikeGuardState {
    struct Accepted {
        double loss = 0.0, gradient_norm = 0.0;

        bool operator==(const Accepted&) const = default;
    };
    /// For the loss, after the first steps. They only fall.
    struct Bounds {
        double diverged = 0.0, calm = 0.0;

        bool operator==(const Bounds&) const = default;
    };

    std::deque<Accepted> accepted = {};  ///< the last `window`
    std::int64_t refused_in_a_row = 0;
    double scale = 0.0;                 ///< the typical magnitude of the first losses
    std::optional<Bounds> bounds = {};  ///< empty in the first steps

    bool operator==(const SpikeGuardState&) const = default;
};

/// Detects bad steps before they are applied, from the loss and the gradient norm of the whole batch.
///
/// Refused: a loss or norm that is not finite, or is more than `sigmas` spreads above the median of the last `window`
///          applied steps. Both are compared on a logarithmic scale. The spread is the distance from the median to the
///          start of the top sixteenth: a few outliers do not move it, and it covers the long tails of small batches. A
///          refused step never enters the statistics.
///
/// Diverged: more than `most_refused` refused steps in a row; or a climb in which no single step stands out, when the
///           median of the last 16 losses is `sigmas` spreads above the lowest such median. This bound only falls: a
///           climb cannot raise it.
///
/// Both bounds hold from the second step on. Until `least` steps have been applied, the spread is the median deviation,
/// which half of the steps cannot move, and there is more room, by a factor that shrinks from 10 to 1. A loss that
/// rises by less than 2 % of the first losses, or a median that rises by less than 10 %, raises no alarm.
///
/// Source:   OLMo-core's skip-step optimizer for window and sigmas. Deviation: medians and quantiles of the logarithm,
///           which a climb does not widen, instead of means and deviations; the first steps; the climb.
/// State:    a value; a snapshot of the parameters includes a copy of it.
/// Cost:     sorts a few hundred numbers per step.
class SpikeGuard {
public:
    /// Errors: ErrorKind::usage unless 2 <= least <= window, sigmas is finite and above 0, most_refused at least 1.
    explicit SpikeGuard(const SpikeGuardOptions& options = {});

    /// Decides about the next batch; changes nothing.
    Judgement evaluate(double loss, double gradient_norm) const;

    /// Records the result of an evaluated batch. A batch that was not completed is not recorded, so nothing has to be
    /// undone.
    void record(double loss, double gradient_norm, bool applied);

    /// True if the last step was applied and the median of the last losses is well below the bound of divergence: at
    /// most half as far above its lowest value. Before there is a median: if the last loss is not above the first. The
    /// parameters are then worth a snapshot.
    bool is_calm() const;

    /// Refused steps since the last applied one.
    std::int64_t refused_in_a_row() const { return state_.refused_in_a_row; }

    const SpikeGuardState& state() const { return state_; }

    /// Continues from a saved state.
    /// Errors: ErrorKind::usage if the state is invalid: a count below 0, a number that is not finite. Nothing has
    ///         changed then. Applied steps beyond the window are dropped, because the window may have changed.
    void restore(SpikeGuardState state);

private:
    std::int64_t steps() const { return static_cast<std::int64_t>(state_.accepted.size()); }
    double room_at_first() const;
    double bound_of_losses() const;
    std::string why_unusual(double loss, double gradient_norm) const;
    std::string why_climbing(double loss) const;
    void lower_bounds();

    SpikeGuardOptions options_;
    SpikeGuardState state_;
};

/// True if a run ends clearly worse than it began. `losses`: those of all steps that were applied and not rolled back,
/// in order; fewer than two are not enough. `held_out`: the held-out loss at the end, if it was measured.
///
/// Formula:  the median of the last losses, 16 or half of them, or the held-out loss is not finite, or is above three
///           times the first loss (ten times, of fewer than 8 losses), twice the largest of the first 4, or 1.1 times
///           the largest of the first 16.
bool ends_worse(const std::vector<double>& losses, std::optional<double> held_out = {});

}  // namespace microbatch
