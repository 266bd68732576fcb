#include "microbatch/analysis/batch_size_sweep.h"

#include <c10/util/ScopeExit.h>

#include <algorithm>
#include <functional>
#include <limits>

#include "microbatch/core/error.h"
#include "microbatch/run/trainer.h"

namespace microbatch {
namespace {

void validate(const BranchOptions& options) {
    const auto& factors = options.factors;
    require_that(!factors.empty() && factors.front() == 1, "batch-size sweep: the first factor of the batch must be 1");
    require_that(std::adjacent_find(factors.begin(), factors.end(), std::greater_equal<>()) == factors.end(),
                 "batch-size sweep: the factors of the batch must increase");
    const std::int64_t largest = factors.back();
    require_that(options.batch >= 1 && options.batch <= std::numeric_limits<std::int64_t>::max() / largest,
                 "batch-size sweep: the batch is ", options.batch, " with factors up to ", largest);
    require_that(options.samples >= options.batch * largest, "batch-size sweep: ", options.samples,
                 " samples are fewer than the largest batch, ", options.batch * largest);
}

// The mean over the last quarter of the samples.
double trained_loss(Trainer& trainer, std::int64_t samples, const std::function<void()>& on_step) {
    double sum = 0.0, weight = 0.0;
    while (!trainer.done()) {
        if (on_step) on_step();
        const TrainerReport report = trainer.step();
        if (report.progress.samples <= samples - samples / 4) continue;
        sum += report.step.loss * report.step.weight;
        weight += report.step.weight;
    }
    return weight > 0.0 ? sum / weight : std::numeric_limits<double>::quiet_NaN();
}

}  // namespace

std::vector<Branch> branch_by_batch(Accumulator& accumulator, const Dataset& dataset, const LossFunction& loss,
                                    const BranchOptions& options) {
    validate(options);
    const double rate = accumulator.optimizer().learning_rate();
    StateDict before = training_snapshot(accumulator);
    before.own();
    const auto put_back = [&] {
        prepare_snapshot(accumulator, StateReader(before))();
        accumulator.optimizer().set_learning_rate(rate);
    };
    const auto at_end = c10::make_scope_exit(put_back);
    std::vector<Branch> branches;
    bool as_good = true;
    for (const std::int64_t factor : options.factors) {
        Branch branch{.batch = factor * options.batch};
        branch.learning_rate =
            scale_to_batch({.learning_rate = rate}, options.rule, options.batch, branch.batch).learning_rate;
        accumulator.optimizer().set_learning_rate(branch.learning_rate);
        Trainer trainer(accumulator, dataset, loss,
                        {.batch = branch.batch, .length = {options.samples, Unit::samples}, .seed = options.seed});
        branch.loss = trained_loss(trainer, options.samples, [&] {
            if (options.on_step) options.on_step(branch.batch);
        });
        put_back();
        const double base = branches.empty() ? branch.loss : branches.front().loss;
        as_good = as_good && branch.loss <= base + options.tolerance;
        branch.as_good = as_good;
        branches.push_back(branch);
    }
    return branches;
}

}  // namespace microbatch
