#include "microbatch/step/batch_norm_plan.h"

#include <c10/util/ScopeExit.h>

#include <algorithm>
#include <string_view>
#include <utility>

#include "microbatch/autograd/batch_norm_layers.h"
#include "microbatch/core/error.h"

namespace microbatch {
namespace {

// Exact BatchNorm is worth this many times the batch at once.
constexpr double most_times = 2.0;

const Candidate* whole_in(const PlanReport& report) {
    const auto found = std::ranges::find_if(report.candidates, [&](const Candidate& one) {
        return one.plan.micro_batch == report.batch && !one.plan.recompute;
    });
    return found == report.candidates.end() ? nullptr : &*found;
}

double seconds_at_once(const PlanReport& report) {
    const Candidate* whole = whole_in(report);
    if (whole != nullptr && whole->step_seconds > 0.0) return whole->step_seconds;
    return report.chosen ? report.choice().step_seconds : 0.0;
}

// Adds the batch at once, and chooses it if it is the fastest.
void add_whole(PlanReport& exact, const PlanReport& other) {
    const Candidate* whole = whole_in(other);
    if (whole == nullptr || whole_in(exact) != nullptr) return;
    Candidate row = *whole;
    row.plan.batch_norm = BatchNorm::exact;
    const bool fastest =
        row.fits && row.time_measured && (!exact.chosen || row.step_seconds < exact.choice().step_seconds);
    const auto place = std::ranges::find_if(exact.candidates, [](const Candidate& one) { return one.plan.recompute; });
    const auto index = static_cast<std::size_t>(place - exact.candidates.begin());
    exact.candidates.insert(place, std::move(row));
    if (exact.chosen && *exact.chosen >= index) ++*exact.chosen;
    if (!fastest) return;
    exact.chosen = index;
    exact.why = "the whole batch at once is the fastest that fits";
}

bool is_cut(const PlanReport& report) {
    return report.chosen && report.choice().plan.micro_batch < report.batch;
}

std::string times_native(const PlanReport& exact, const PlanReport& other) {
    const double native = seconds_at_once(other);
    if (!exact.chosen || native <= 0.0) return {};
    const auto tenths = static_cast<std::int64_t>(exact.choice().step_seconds / native * 10.0 + 0.5);
    return str_cat(tenths / 10, ".", tenths % 10, " times the step of ",
                   whole_in(other) != nullptr ? "the batch at once" : "deferred");
}

class PolicyPlanner {
public:
    PolicyPlanner(Accumulator& accumulator, const BatchSource& batch, const LossFunction& loss,
                  const PlannerOptions& options)
        : accumulator_(accumulator), batch_(batch), loss_(loss), options_(options) {
        options_.batch = batch.size();
    }

    PlanReport with(BatchNorm policy) {
        if (policy == BatchNorm::exact) return exact(plan(BatchNorm::deferred));
        PlanReport report = plan(policy);
        const bool is_shared = accumulator_.reducer().size() > 1;
        report.batch_norm = is_shared || is_cut(report) ? std::string(meaning(policy)) : at_once;
        return report;
    }

    PlanReport best() {
        if (accumulator_.reducer().size() > 1) return with(BatchNorm::deferred);
        PlanReport deferred = plan(BatchNorm::deferred);
        std::string reason;
        try {
            PlanReport found = exact(deferred);
            const double native = seconds_at_once(deferred);
            // A given micro-batch is for the same update every time: then no measured time decides.
            const bool pays = found.chosen && (options_.micro_batch || native <= 0.0 || !is_cut(found) ||
                                               found.choice().step_seconds <= most_times * native);
            if (pays) return found;
            reason =
                found.chosen ? str_cat("exact takes ", times_native(found, deferred)) : "exact does not fit the budget";
        } catch (const TooFewSamples&) {
            throw;
        } catch (const Error& error) {
            if (error.kind() != ErrorKind::usage) throw;
            reason = error.what();
        }
        deferred.batch_norm = is_cut(deferred) ? str_cat(meaning(BatchNorm::deferred), " (", reason, ")") : at_once;
        return deferred;
    }

private:
    static constexpr const char* at_once = "exact: the batch is not cut";

    static std::string_view meaning(BatchNorm policy) {
        switch (policy) {
            case BatchNorm::naive:
                return "naive: each micro-batch is normalised by itself and moves the running statistics";
            case BatchNorm::deferred:
                return "deferred: each micro-batch is normalised by itself; the running statistics move once "
                       "a step, by those of the batch";
            case BatchNorm::frozen:
                return "frozen: normalised by the running statistics, which do not move";
            case BatchNorm::exact:
                break;
        }
        return "exact: normalised by the whole batch";
    }

    PlanReport plan(BatchNorm policy) {
        options_.batch_norm = policy;
        return plan_batch(accumulator_, batch_, loss_, options_);
    }

    // A plan is chosen only if it was tried.
    PlanReport measured_if_faster(const PlanReport& deferred, const PlanReport& exact) {
        const Candidate* whole = whole_in(deferred);
        const bool promising = whole != nullptr && whole->fits && !whole->time_measured && !options_.micro_batch &&
                               (!exact.chosen || whole->step_seconds < exact.choice().step_seconds);
        if (!promising) return deferred;
        const auto before = std::exchange(options_.micro_batch, options_.batch);
        const auto put_back = c10::make_scope_exit([&] { options_.micro_batch = before; });
        return plan(BatchNorm::naive);
    }

    PlanReport exact(const PlanReport& deferred) {
        PlanReport report = plan(BatchNorm::exact);
        add_whole(report, measured_if_faster(deferred, report));
        report.batch_norm = at_once;
        if (is_cut(report)) {
            const std::string times = times_native(report, deferred);
            report.batch_norm = str_cat(meaning(BatchNorm::exact), times.empty() ? "" : "; ", times);
        }
        return report;
    }

    Accumulator& accumulator_;
    const BatchSource& batch_;
    const LossFunction& loss_;
    PlannerOptions options_;
};

}  // namespace

PlanReport plan_batch_norm(Accumulator& accumulator, const BatchSource& batch, const LossFunction& loss,
                           PlannerOptions options, std::optional<BatchNorm> policy) {
    if (!has_batch_norm(accumulator.model().buffers())) {
        require_that(!policy || policy == BatchNorm::naive, "the BatchNorm policy is ",
                     to_string(policy.value_or(BatchNorm::naive)),
                     ", but the model has no BatchNorm layer: leave the policy out");
        options.batch_norm = BatchNorm::naive;
        return plan_batch(accumulator, batch, loss, std::move(options));
    }
    accumulator.require_policy({.batch_norm = policy.value_or(BatchNorm::deferred)});
    PolicyPlanner planner(accumulator, batch, loss, options);
    return policy ? planner.with(*policy) : planner.best();
}

}  // namespace microbatch
