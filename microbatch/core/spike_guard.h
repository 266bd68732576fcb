#pragma once

#include <cstdint>
#include <deque>
#include <optional>
#include <string>
#include <vector>

namespace microbatch {

struct SpikeGuardOptions {
    std::int64_t window = 128;      ///< steps: the last ones that were applied say what is usual
    std::int64_t least = 64;        ///< steps: before so many, a loss has more room, and gradient norms are not judged
    double sigmas = 6.0;            ///< how many spreads above the median is too far
    std::int64_t most_refused = 9;  ///< in a row; one more is divergence
};

/// What to do with a batch whose gradients are known and not applied yet.
enum class Verdict {
    apply,
    refuse,    ///< leave out this batch: parameters as they are, on to the next
    diverged,  ///< leaving out batches does not help: go back to before, at a smaller rate, or stop
};

struct Judgement {
    Verdict verdict = Verdict::apply;
    std::string reason = {};  ///< what is wrong with this step, or with the last ones; empty if it is applied
};

/// All that a guard remembers.
struct SpikeGuardState {
    struct Accepted {
        double loss = 0.0, gradient_norm = 0.0;

        bool operator==(const Accepted&) const = default;
    };
    /// For the loss, typically. They only fall.
    struct Bounds {
        double diverged = 0.0, calm = 0.0;

        bool operator==(const Bounds&) const = default;
    };

    std::deque<Accepted> accepted = {};  ///< the last `window`
    std::int64_t refused_in_a_row = 0;
    double scale = 0.0;                 ///< the typical magnitude of the first losses
    std::optional<Bounds> bounds = {};  ///< none in the first steps

    bool operator==(const SpikeGuardState&) const = default;
};

/// Detects bad steps before they are taken, from the loss and the gradient norm of the whole batch.
///
/// Refused: a loss or norm that is not finite, or more than `sigmas` spreads above the median of the last `window`
/// applied steps. Both are compared by their logarithm, and the spread is how far above the median the upper sixteenth
/// begins: a few outliers do not move it, and it covers the long tails of small batches. A refused step never enters
/// the statistics.
///
/// Diverged: more than `most_refused` refusals in a row; or a climb in which no step stands out, when the median of the
/// last 16 losses is `sigmas` spreads above the lowest such median. That bound only falls: a climb cannot raise it.
///
/// Both bounds hold from the second step on. Until `least` steps are applied the spread is the median deviation, which
/// half of the steps do not move, and there is more room, by a factor that shrinks from 10 to 1. A loss that rises by
/// less than 2 % of the first losses, or a median that rises by less than 10 %, is no alarm.
///
/// Source:   OLMo-core's skip-step optimizer for window and sigmas. Deviation: medians and quantiles of the logarithm,
///           which a climb does not widen, for means and deviations; the first steps; the climb.
/// State:    a value; a copy of it goes with a snapshot of the parameters.
/// Cost:     sorts a few hundred numbers a step.
class SpikeGuard {
public:
    /// Errors: ErrorKind::usage unless 2 <= least <= window, sigmas is finite and above 0, most_refused at least 1.
    explicit SpikeGuard(const SpikeGuardOptions& options = {});

    /// What to do with the next batch; changes nothing.
    Judgement evaluate(double loss, double gradient_norm) const;

    /// Learns what became of a batch that was evaluated. One that never came to an end is not recorded, so there is
    /// nothing to take back.
    void record(double loss, double gradient_norm, bool applied);

    /// True if the last step was applied and the median of the last losses is well below the bound of divergence: half
    /// as far above its lowest. Before there is one: if the last loss is not above the first. What the parameters are
    /// then is worth going back to.
    bool is_calm() const;

    /// Steps refused since the last one that was applied.
    std::int64_t refused_in_a_row() const { return state_.refused_in_a_row; }

    const SpikeGuardState& state() const { return state_; }

    /// Continues from a state that a guard had.
    /// Errors: ErrorKind::usage if none could have it: a count below 0, a number that is not finite. Nothing has
    ///         changed then. What was accepted beyond the window is forgotten, as another window may be asked for now.
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

/// True if a run ends clearly worse than it began. `losses`: those of all steps that were applied and not undone, in
/// order; fewer than two say nothing. `held_out`: the loss on other data at the end, if it was measured.
///
/// Formula:  the median of the last losses, 16 or half of them, or the held-out loss is not finite, or is above three
///           times the first loss (ten times, of fewer than 8 losses), twice the largest of the first 4, or 1.1 times
///           the largest of the first 16.
bool ends_worse(const std::vector<double>& losses, std::optional<double> held_out = {});

}  // namespace microbatch
