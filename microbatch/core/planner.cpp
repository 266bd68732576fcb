#include "microbatch/core/planner.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <set>
#include <utility>
#include <vector>

#include "microbatch/core/plan_space.h"

namespace microbatch {
namespace {

// A plan is worthwhile only if it is at least this much faster than the best one so far.
constexpr double worthwhile = 0.99, tie = 1.01;
// A plan that seems at most this much slower than the fastest is timed again: noise can be as large.
constexpr double close = 1.3;
constexpr std::size_t most_finalists = 4;
constexpr int most_turns = 9;
// One more forward pass is a quarter to a third of a step; a model may recompute only a part of it.
constexpr double least_cost_of_recompute = 1.1;
// The share of the measuring time for plans that promise less than the noise.
constexpr double search_share = 2.0 / 3.0;
constexpr double large_gain = 0.95;
// If peaks are predicted to within this by matched allocations, the job counts as linear.
constexpr double affine_error = 0.01;
// Smaller sizes may seem slow because another process disturbed them, and their trials cost almost nothing.
constexpr std::int64_t telling = 16;
// For such a batch, the first two trials take most of the time of a step: they do not count.
constexpr std::int64_t small_batch = 16;
// More than any search needs: the search must end even if times and bytes are nonsense.
constexpr int most_trials = 100;
constexpr double infinity = std::numeric_limits<double>::infinity();

/// A plan to try.
struct Target {
    Mode* mode;
    std::int64_t size;
};

class Planner {
public:
    Planner(const PlannerOptions& options, Rehearsal& rehearsal)
        : options_(options),
          rehearsal_(rehearsal),
          known_{.options = options,
                 .kept = {.recompute = false, .trials = Trials(options.batch)},
                 .recomputed = {.recompute = true, .trials = Trials(options.batch)}} {}

    PlanReport run() {
        report_.batch = options_.batch;
        report_.budget_bytes = options_.budget_bytes;
        report_.given = options_.micro_batch.has_value();
        report_.fixed = rehearsal_.fixed();
        if (options_.micro_batch) {
            try_given(*options_.micro_batch);
        } else {
            search();
            time_finalists();
            complete_table();
        }
        if (!known_.any_fits()) find_least();
        finish();
        return report_;
    }

private:
    void try_given(std::int64_t size) {
        for (Mode* mode : {&known_.kept, &known_.recomputed}) {
            if (known_.allowed(*mode) && try_size(*mode, size)) return;
        }
    }

    void search() {
        for (Mode* mode : {&known_.kept, &known_.recomputed}) {
            if (known_.allowed(*mode) && !known_.hopeless() && !may_do_without(*mode)) begin(*mode);
        }
        try_all();
        // Recompute may be worthwhile at larger sizes although the first two were slow.
        Mode& mode = known_.recomputed;
        const bool untried = known_.allowed(mode) && !known_.hopeless() && mode.trials.empty();
        if (!untried || !known_.fits(known_.kept, known_.smallest) || may_do_without(mode)) return;
        if (!may_spend_on(mode, known_.smallest + 1)) return;
        begin(mode);
        try_all();
    }

    void try_all() {
        for (int trials = 0; trials < most_trials && try_next(); ++trials) {
        }
    }

    // The fastest few take turns in the remaining time, so that disturbances affect them equally.
    void time_finalists() {
        share_ = 1.0;
        std::vector<Target> finalists = fastest();
        if (finalists.size() < 2) return;
        bool any = true;
        for (int turn = 0; turn < most_turns && any; ++turn) {
            any = false;
            for (const Target& one : finalists) {
                if (!may_spend_on(*one.mode, one.size)) continue;
                time_again(one);
                any = true;
            }
        }
    }

    void complete_table() {
        Mode& mode = known_.recomputed;
        const bool needed =
            known_.fits(known_.kept, known_.smallest) && !known_.predicted_to_fit(known_.kept, options_.batch);
        if (!options_.whole_table || !needed || !known_.allowed(mode) || !mode.trials.empty()) return;
        choose_recomputed_ = false;
        begin(mode);
    }

    // The tried plans close to the best, by step time.
    std::vector<Target> fastest() {
        const auto seconds = [this](const Target& one) { return known_.step_seconds(*one.mode, one.size); };
        std::vector<Target> tried;
        for (Mode* mode : {&known_.kept, &known_.recomputed}) {
            for (const auto& [size, trial] : mode->trials.all()) {
                if (known_.fits(*mode, size) && seconds({mode, size}) <= close * best_step())
                    tried.push_back({mode, size});
            }
        }
        std::ranges::sort(tried, {}, seconds);
        tried.resize(std::min(tried.size(), most_finalists));
        return tried;
    }

    void time_again(const Target& one) {
        const Plan plan = known_.plan(*one.mode, one.size);
        if (options_.on_trial) options_.on_trial(plan);
        const bool cut = one.size < options_.batch;
        const double seconds = time_or(rehearsal_.seconds_again(plan, cut, options_.budget_bytes), infinity);
        report_.spent_seconds += time_or(cut ? 2.0 * seconds : seconds, 0.0);
        one.mode->trials.add_time(one.size, seconds);
    }

    // Recompute trades time for memory. Where not even the whole batch at once promises to be worth it, its trials
    // would only take time from the others.
    bool may_do_without(const Mode& mode) const {
        if (!mode.recompute) return false;
        if (known_.predicted_to_fit(known_.kept, options_.batch)) return true;
        if (!known_.fits(known_.kept, known_.smallest + 1)) return false;
        double best = infinity;
        for (const std::int64_t size : known_.sizes(known_.kept)) {
            if (known_.predicted_to_fit(known_.kept, size)) best = std::min(best, known_.least_step(known_.kept, size));
        }
        const double update = known_.update ? known_.update->seconds : 0.0;
        const double whole = known_.least_step(known_.kept, options_.batch) - update;
        return update + least_cost_of_recompute * whole > worthwhile * best;
    }

    // Tries the two sizes that predict all others. The whole batch, which holds no gradients in its forward pass, may
    // fit where they do not.
    void begin(Mode& mode) {
        const bool one = try_smallest(mode);
        const std::int64_t next = known_.smallest + 1;
        const bool both = one && options_.batch >= next && try_size(mode, next);
        // Some kernels treat a single sample differently. 3 then shows what 2 is like.
        if (both && !mode.trials.matched() && options_.batch > next + 1) try_size(mode, next + 1);
        if (options_.batch < small_batch) needed_seconds_ = spent_seconds();
        if (both) return;
        const std::int64_t batch = options_.batch;
        const bool known = known_.predict(mode, batch).has_value() || mode.trials.failed(batch);
        if (!known && !known_.hopeless() && known_.uncut_may_fit(mode) && may_spend_on(mode, batch))
            try_size(mode, batch);
    }

    // Large steps come first: the time per sample falls, and rises again where a cache overflows, which small sizes
    // cannot predict. They leave time for the most promising plan. Returns false if there is nothing more to try.
    bool try_next() {
        share_ = 1.0;
        std::optional<Target> target = most_promising();
        if (!target || known_.least_step(*target->mode, target->size) > large_gain * best_step()) {
            share_ = search_share;
            target = most_promising();
        }
        Mode& mode = known_.fits(known_.kept, known_.smallest) ? known_.kept : known_.recomputed;
        if (!mode.trials.empty() && (mode.not_paying < 2 || mode.trials.largest() < telling)) {
            const std::int64_t twice = known_.doubled(mode.trials.largest());
            for (const std::int64_t stride : {known_.doubled(twice), twice}) {
                const std::int64_t size = known_.evened(stride);
                if (!may_try(mode, size) || !may_spend_on(mode, size)) continue;
                if (target && !leaves_room(mode, size, *target)) continue;
                try_size(mode, size);
                return true;
            }
        }
        if (target) try_size(*target->mode, target->size);
        return target.has_value();
    }

    // Of the untried plans; in a tie the smallest micro-batch, which tells most for its time.
    std::optional<Target> most_promising() {
        std::vector<Target> targets;
        double best = worthwhile * best_step();
        for (Mode* mode : {&known_.kept, &known_.recomputed}) {
            for (const std::int64_t row : known_.sizes(*mode)) {
                for (const std::int64_t size : {row, row < options_.batch / 2 ? row + row / 2 : row}) {
                    if (may_try(*mode, size) && may_spend_on(*mode, size)) targets.push_back({mode, size});
                }
            }
        }
        std::optional<Target> result;
        const double enough = worthwhile * best_step();
        for (const Target& one : targets) best = std::min(best, known_.least_step(*one.mode, one.size));
        for (const Target& one : targets) {
            const double seconds = known_.least_step(*one.mode, one.size);
            if (seconds >= enough || seconds > tie * best || (result && result->size <= one.size)) continue;
            result = one;
        }
        return result;
    }

    bool may_try(const Mode& mode, std::int64_t size) const {
        return !mode.trials.contains(size) && known_.predicted_to_fit(mode, size);
    }

    // The trial itself may reveal that the model needs more samples.
    bool try_smallest(Mode& mode) {
        const std::int64_t size = known_.smallest;
        return try_size(mode, size) || (size < known_.smallest && try_size(mode, known_.smallest));
    }

    // Runs one trial, after the first one the optimizer's too. Returns false if it does not fit.
    bool try_size(Mode& mode, std::int64_t size) {
        const std::optional<PhasePeaks> expected = known_.predict(mode, size);
        if (!run_trial(mode, size, options_.budget_bytes)) {
            failed_seconds_ += time_or(mode.trials.seconds(size), 0.0);
        } else if (const std::optional<PhasePeaks> measured = known_.predict(mode, size); expected && measured) {
            mode.expected[size] = *expected;
            check_prediction(*expected, *measured);
        }
        if (known_.fits(mode, size)) {
            judge_pace(mode, size);
            return true;
        }
        if (size >= known_.smallest) mode.trials.add_failure(size);
        return false;
    }

    bool run_trial(Mode& mode, std::int64_t size, std::int64_t allowed_bytes) {
        const Plan plan = known_.plan(mode, size);
        if (options_.on_trial) options_.on_trial(plan);
        std::optional<MicroBatchTrial> trial = rehearse(plan, allowed_bytes);
        if (!trial) return false;
        report_.spent_seconds += time_or(trial->spent_seconds, 0.0);
        trial->seconds = time_or(trial->seconds, infinity);
        mode.trials.add(size, std::move(*trial));
        if (!known_.update && !known_.update_failed) try_update(allowed_bytes);
        return true;
    }

    // nullopt if it does not fit, or if the model cannot train on a single sample: then none may be left over either.
    std::optional<MicroBatchTrial> rehearse(const Plan& plan, std::int64_t allowed_bytes) {
        try {
            return rehearsal_.micro_batch(plan, plan.micro_batch < options_.batch, allowed_bytes);
        } catch (const TooFewSamples&) {
            if (plan.micro_batch >= options_.batch || options_.micro_batch || known_.smallest > 1) throw;
            known_.smallest = 2 + options_.batch % 2;
            return std::nullopt;
        }
    }

    void try_update(std::int64_t allowed_bytes) {
        known_.update = rehearsal_.update(allowed_bytes);
        if (!known_.update && allowed_bytes < options_.most_bytes)
            known_.update = rehearsal_.update(options_.most_bytes);
        known_.update_failed = !known_.update;
        if (known_.update_failed) return;
        report_.spent_seconds += time_or(known_.update->spent_seconds, 0.0);
        report_.fixed.optimizer_state += known_.update->state_bytes;
        known_.update->seconds = time_or(known_.update->seconds, 0.0) + options_.communication_seconds;
        report_.update_seconds = known_.update->seconds;
    }

    // Finds the smallest peak of all plans. Memory grows with the micro-batch, but a whole batch holds no gradients in
    // its forward pass.
    void find_least() {
        const std::set<std::int64_t> sizes{options_.micro_batch.value_or(known_.smallest),
                                           options_.micro_batch.value_or(options_.batch)};
        for (Mode* mode : {&known_.recomputed, &known_.kept}) {
            for (std::int64_t size : sizes) {
                if (!options_.micro_batch) size = std::max(size, known_.smallest);
                if (known_.allowed(*mode) && !mode->trials.contains(size)) try_below_least(*mode, size);
            }
        }
    }

    // Stops a trial as soon as it needs more than the smallest known peak, and skips it if no plan can need less.
    void try_below_least(Mode& mode, std::int64_t size) {
        const std::int64_t least = known_.least_peak();
        if (options_.most_bytes <= options_.budget_bytes || known_.update_failed) return;
        const std::int64_t allowed = std::min(options_.most_bytes, least - known_.later_state() - 1);
        if (least <= known_.update_peak() || (mode.trials.failed(size) && allowed <= options_.budget_bytes)) return;
        run_trial(mode, size, allowed);
        if (size < known_.smallest) try_below_least(mode, known_.smallest);
    }

    // A trial runs two micro-batches; one if the batch is not split.
    double micro_batch_cost(const Mode& mode, std::int64_t size) const {
        const double seconds = (mode.trials.empty() ? known_.kept : mode).trials.seconds(size);
        return size < options_.batch ? 2.0 * seconds : seconds;
    }

    double spent_seconds() const { return report_.spent_seconds + failed_seconds_; }

    // Whether these seconds are within what may be spent by now, if the best plan's step takes `step`.
    bool may_spend(double seconds, double step) const {
        return spent_seconds() - needed_seconds_ + seconds <=
               share_ * std::max(options_.most_steps * step, options_.least_seconds);
    }

    bool may_spend_on(const Mode& mode, std::int64_t size) const {
        return may_spend(micro_batch_cost(mode, size), best_step());
    }

    bool leaves_room(const Mode& mode, std::int64_t size, const Target& target) const {
        return may_spend(micro_batch_cost(mode, size) + micro_batch_cost(*target.mode, target.size),
                         known_.least_step(*target.mode, target.size));
    }

    double best_step() const { return std::min(known_.kept.best_seconds, known_.recomputed.best_seconds); }

    void judge_pace(Mode& mode, std::int64_t size) {
        const double seconds = known_.step_seconds(mode, size);
        mode.not_paying = seconds < worthwhile * mode.best_seconds ? 0 : mode.not_paying + 1;
        mode.best_seconds = std::min(mode.best_seconds, seconds);
    }

    void check_prediction(const PhasePeaks& expected, const PhasePeaks& measured) {
        const auto actual = static_cast<double>(std::max<std::int64_t>(measured.largest(), 1));
        const double error = std::abs(static_cast<double>(expected.largest()) - actual) / actual;
        report_.worst_relative_error = std::max(report_.worst_relative_error, error);
    }

    void finish() {
        for (const Mode* mode : {&known_.kept, &known_.recomputed}) {
            if (!mode->trials.matched()) report_.affine = false;
            for (const std::int64_t size : known_.sizes(*mode))
                report_.candidates.push_back(known_.candidate(*mode, size));
        }
        if (report_.worst_relative_error > affine_error) report_.affine = false;
        choose();
        report_.why =
            explain_choice(report_, options_.micro_batch.has_value(), options_.recompute == Recompute::always);
    }

    // Only a tried plan: the budget is a guarantee, a prediction is not.
    void choose() {
        const auto seconds = [](const Candidate& one) { return one.step_seconds > 0.0 ? one.step_seconds : infinity; };
        double fastest = infinity;
        for (const Candidate& one : report_.candidates) {
            if (may_choose(one)) fastest = std::min(fastest, seconds(one));
        }
        for (std::size_t i = 0; i < report_.candidates.size(); ++i) {
            const Candidate& one = report_.candidates[i];
            if (!may_choose(one) || seconds(one) > tie * fastest) continue;
            if (!report_.chosen || one.peak_bytes() < report_.candidates[*report_.chosen].peak_bytes()) {
                report_.chosen = i;
            }
        }
    }

    bool may_choose(const Candidate& one) const {
        return one.fits && one.measured && (choose_recomputed_ || !one.plan.recompute);
    }

    const PlannerOptions& options_;
    Rehearsal& rehearsal_;
    PlanSpace known_;
    double failed_seconds_ = 0.0;    // upper bound for the trials that ran out of memory
    double needed_seconds_ = 0.0;    // of the trials that do not count for a small batch
    double share_ = 1.0;             // of the measuring time that may be spent by now
    bool choose_recomputed_ = true;  // false if it was tried only for the table
    PlanReport report_;
};

}  // namespace

PlanReport make_plan(const PlannerOptions& options, Rehearsal& rehearsal) {
    validate(options);
    return Planner(options, rehearsal).run();
}

}  // namespace microbatch
