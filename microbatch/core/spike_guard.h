#pragma once

#include <cstdint>
#include <deque>
#include <optional>
#include <string>

namespace microbatch {

struct SpikeGuardOptions {
    std::int64_t window = 128;      ///< steps: the last accepted ones say what is usual
    std::int64_t least = 64;        ///< steps: before so many are accepted only what is not finite is refused
    double sigmas = 6.0;            ///< how far beyond the usual is too far
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

    std::deque<Accepted> accepted = {};  ///< the last `window`
    std::int64_t refused_in_a_row = 0;
    std::optional<double> lowest_mean = {};  ///< of `least` losses
    double lowest_deviation = 0.0;           ///< of those
    double last_mean = 0.0;                  ///< of `least` losses
    double scale = 0.0;                      ///< of the loss: the mean of the first `least`

    bool operator==(const SpikeGuardState&) const = default;
};

/// Tells bad steps before they are taken, from the loss and the gradient norm of the whole batch.
///
/// A step is refused if one of both is not finite, or beyond what is usual: mean + sigmas * deviation of the last
/// `window` accepted steps. Of the gradient norm, which varies by factors, the same of its logarithm must be exceeded
/// too. A deviation counts as at least a thousandth of the mean (of losses that of the first `least`): numbers that are
/// all the same say nothing of what is far, nor do losses near 0. What is refused never enters the statistics, so that
/// they stay those of before the spike however long it lasts.
///
/// Diverged: more than `most_refused` in a row; or the mean loss of the last `least` accepted steps is as far above the
/// lowest such mean there was: a climb so slow that every step of it looks usual.
///
/// Source:   OLMo-core's skip-step optimizer for window and sigmas; deviations: the logarithm, the climb.
/// State:    a value; a copy of it goes with a snapshot of the parameters: who goes back goes on with the copy.
/// Cost:     some hundred additions a step.
class SpikeGuard {
public:
    /// Errors: ErrorKind::usage unless 2 <= least <= window, sigmas is finite and above 0, most_refused at least 1.
    explicit SpikeGuard(const SpikeGuardOptions& options = {});

    /// What to do with the next batch; changes nothing.
    Judgement evaluate(double loss, double gradient_norm) const;

    /// Learns what became of a batch that was evaluated. One that never came to an end is not recorded, so there is
    /// nothing to take back.
    void record(double loss, double gradient_norm, bool applied);

    /// True if the last step was applied and the mean loss is not far above its lowest: within a deviation of it, or,
    /// in the first `least` steps, the loss is not above the first. What the parameters are then is worth going back
    /// to.
    bool is_calm() const;

    /// Steps refused since the last one that was applied.
    std::int64_t refused_in_a_row() const { return state_.refused_in_a_row; }

    const SpikeGuardState& state() const { return state_; }

    /// Goes on from a state that a guard had.
    /// Errors: ErrorKind::usage if none could have it: a count below 0, a number that is not finite. Nothing has
    /// changed
    ///         then. What was accepted beyond the window is forgotten, as another window may be asked for now.
    void restore(SpikeGuardState state);

private:
    using Accepted = SpikeGuardState::Accepted;

    std::string why_unusual(double loss, double gradient_norm) const;
    std::string why_climbing(const SpikeGuardState& after) const;
    SpikeGuardState with(double loss, double gradient_norm) const;

    SpikeGuardOptions options_;
    SpikeGuardState state_;
};

}  // namespace microbatch
