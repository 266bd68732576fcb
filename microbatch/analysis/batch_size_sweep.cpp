#include "microbatch/analysis/batch_size_sweep.h"

#include <limits>

#include "microbatch/core/error.h"
#include "microbatch/core/str_cat.h"
#include "microbatch/run/trainer.h"

namespace microbatch {
namespace {

void validate(const BranchOptions& options) {
    const auto refuse = [](const auto&... what) {
        throw Error(ErrorKind::usage, str_cat("batch-size sweep: ", what...));
    };
    if (options.factors.empty() || options.factors.front() != 1) refuse("the first factor of the batch must be 1");
    for (std::size_t i = 1; i < options.factors.size(); ++i) {
        if (options.factors[i] <= options.factors[i - 1]) refuse("the factors of the batch must increase");
    }
    const std::int64_t largest = options.factors.back();
    if (options.batch < 1 || options.batch > std::numeric_limits<std::int64_t>::max() / largest) {
        refuse("the batch is ", options.batch, " with factors up to ", largest);
    }
    if (options.samples < options.batch * largest) {
        refuse(options.samples, " samples are fewer than the largest batch, ", options.batch * largest);
    }
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

/// Restores the job when it is destroyed.
class Undone {
public:
    explicit Undone(Accumulator& accumulator)
        : accumulator_(accumulator),
          before_(training_snapshot(accumulator)),
          rate_(accumulator.optimizer().learning_rate()) {
        before_.own();
    }
    Undone(const Undone&) = delete;
    Undone& operator=(const Undone&) = delete;
    ~Undone() { put_back(); }

    void put_back() {
        prepare_snapshot(accumulator_, StateReader(before_))();
        accumulator_.optimizer().set_learning_rate(rate_);
    }
    double rate() const { return rate_; }

private:
    Accumulator& accumulator_;
    StateDict before_;
    double rate_;
};

}  // namespace

std::vector<Branch> branch_by_batch(Accumulator& accumulator, const Dataset& dataset, const LossFunction& loss,
                                    const BranchOptions& options) {
    validate(options);
    Undone undone(accumulator);
    std::vector<Branch> branches;
    bool as_good = true;
    for (const std::int64_t factor : options.factors) {
        Branch branch{.batch = factor * options.batch};
        branch.learning_rate =
            scale_to_batch({.learning_rate = undone.rate()}, options.rule, options.batch, branch.batch).learning_rate;
        accumulator.optimizer().set_learning_rate(branch.learning_rate);
        Trainer trainer(accumulator, dataset, loss,
                        {.batch = branch.batch, .length = {options.samples, Unit::samples}, .seed = options.seed});
        branch.loss = trained_loss(trainer, options.samples, [&] {
            if (options.on_step) options.on_step(branch.batch);
        });
        undone.put_back();
        const double base = branches.empty() ? branch.loss : branches.front().loss;
        as_good = as_good && branch.loss <= base + options.tolerance;
        branch.as_good = as_good;
        branches.push_back(branch);
    }
    return branches;
}

}  // namespace microbatch
