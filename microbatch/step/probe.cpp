#include "microbatch/step/probe.h"

#include <ATen/core/grad_mode.h>
#include <ATen/ops/empty.h>
#include <c10/util/ScopeExit.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <utility>
#include <vector>

#include "microbatch/core/error.h"
#include "microbatch/core/median.h"
#include "microbatch/memory/memory_trace.h"
#include "microbatch/memory/meter.h"
#include "microbatch/model/forward_state.h"
#include "microbatch/runtime/device.h"

namespace microbatch {
namespace {

// A micro-batch is timed again until it has run for this long, or this often, because short times are noisy. The
// planner times the best ones again anyway, and can use the time for more sizes.
constexpr double enough_seconds = 0.025;
constexpr std::size_t enough_times = 5;

using Clock = std::chrono::steady_clock;

double seconds_since(Clock::time_point start) {
    return std::chrono::duration<double>(Clock::now() - start).count();
}

// A device works on while the host goes on: its time is over when it has nothing left to do.
template <class Work>
double seconds_of(at::Device device, const Work& work) {
    wait_for(device);
    const auto started = Clock::now();
    work();
    wait_for(device);
    return seconds_since(started);
}

// The model may have parameters that the accumulator does not know; they still get gradients.
std::vector<at::Tensor> all_tensors_of(const Accumulator& accumulator) {
    Parameters all = accumulator.parameters();
    for (Parameter& parameter : accumulator.model().parameters()) all.push_back(std::move(parameter));
    return tensors_of(without_repeats(all));
}

at::Device device_of(const Accumulator& accumulator) {
    const Parameters& parameters = accumulator.parameters();
    const at::Device device = device_of(parameters);
    for (const Parameter& parameter : parameters) {
        if (parameter.tensor.device() == device) continue;
        throw Error(ErrorKind::usage, "parameter ", parameters.front().name, " is on ", device.str(), ", ",
                    parameter.name, " on ", parameter.tensor.device().str(), ": a plan is for a single device");
    }
    return device;
}

// The job, restored after every trial.
class LiveJob final : public Rehearsal {
public:
    LiveJob(Accumulator& accumulator, const BatchSource& batch, const LossFunction& loss)
        : accumulator_(accumulator),
          batch_(batch),
          samples_(batch.size()),
          loss_(loss),
          device_(device_of(accumulator)),
          meter_(meter_of(device_)),
          gradients_(all_tensors_of(accumulator)),
          tensors_(tensors_of(accumulator.parameters())) {}

    ~LiveJob() override {
        accumulator_.discard({});
        accumulator_.optimizer().end_dry_run();
        ActivationCheckpointing::set(accumulator_.model(), accumulator_.plan());
        meter_.release_cached();
    }

    std::int64_t budget() const { return meter_.budget(); }

    std::optional<MicroBatchTrial> micro_batch(const Plan& plan, bool cut, std::int64_t allowed_bytes) override {
        const auto started = Clock::now();
        // Of a batch that is open, the update's trial takes the gradients.
        const bool keep = !runs_exactly(plan, cut);
        const auto trial = attempt(
            allowed_bytes, [&] { return run(plan, cut); }, keep);
        if (!trial) return std::nullopt;
        last_ = plan;
        last_seconds_ = trial->seconds;
        MicroBatchTrial result = *trial;
        result.spent_seconds = seconds_since(started);
        if (std::max(peak_of(result.first), peak_of(result.later)) > allowed_bytes) return std::nullopt;
        return result;
    }

    double seconds_again(const Plan& plan, bool cut, std::int64_t allowed_bytes) override {
        return attempt(allowed_bytes, [&] { return warm_seconds(plan, cut); }).value_or(HUGE_VAL);
    }

    std::optional<UpdateTrial> update(std::int64_t allowed_bytes) override {
        const auto started = Clock::now();
        const bool had_state = accumulator_.optimizer().has_state();
        std::optional<UpdateTrial> result = attempt(allowed_bytes, [&] { return run_update(/*rehearse=*/true); });
        accumulator_.optimizer().end_dry_run();
        if (!result && had_state) result = attempt(allowed_bytes, [&] { return run_update(/*rehearse=*/false); });
        if (!result) return std::nullopt;
        if (had_state) {
            // The second state existed only in the dry run.
            result->later_peak_bytes -= result->state_bytes;
            result->first_peak_bytes = result->later_peak_bytes;
            result->state_bytes = 0;
        }
        result->spent_seconds = seconds_since(started);
        return result;
    }

    MemoryParts fixed() const override {
        MemoryParts parts;
        for (const at::Tensor& tensor : tensors_) {
            parts.parameters += static_cast<std::int64_t>(tensor.nbytes());
            if (tensor.requires_grad()) parts.gradients += static_cast<std::int64_t>(tensor.nbytes());
        }
        parts.other = std::max<std::int64_t>(0, live() - parts.parameters);
        return parts;
    }

private:
    std::int64_t live() const { return meter_.use().live_bytes - gradients_.bytes(); }
    std::int64_t peak() const { return meter_.use().peak_bytes - gradients_.bytes(); }

    // Runs an attempt with the job's state saved, and restores it. Empty if it ran out of memory: everything that the
    // attempt held is then freed. Otherwise, its gradients may be kept for the next attempt.
    template <class Run>
    auto attempt(std::int64_t allowed_bytes, const Run& run, bool keep = false) -> std::optional<decltype(run())> {
        const std::int64_t most = no_budget - gradients_.bytes();
        const std::int64_t budget = meter_.has_budget() ? meter_.budget() : no_budget;
        meter_.set_budget(std::min(allowed_bytes, most) + gradients_.bytes());
        const auto set_back = c10::make_scope_exit([&] {
            try {
                meter_.set_budget(budget);
            } catch (...) {  // a device that is lost: what the attempt threw says so
            }
        });
        try {
            auto result = unless_oom([&] {
                const ForwardStateScope before(accumulator_.model());
                auto value = run();
                if (!keep) discard();
                holds_gradients_ = keep;
                return value;
            });
            if (!result) discard();
            return result;
        } catch (...) {
            discard();
            throw;
        }
    }

    MicroBatchTrial run(const Plan& plan, bool cut) {
        if (runs_exactly(plan, cut)) return run_exactly(plan);
        MicroBatchTrial trial;
        std::vector<double> seconds;
        begin(plan);
        const double cold = seconds_of(device_, [&] { trial.first = profile_of([&] { add(plan.micro_batch, 0); }); });
        // If it is long enough to hide the extra cost of a first run, it counts as a sample, and a whole batch is not
        // run twice.
        double total = cold;
        if (cold >= enough_seconds) seconds.push_back(cold);
        while (seconds.empty() || (cut && trial.later.empty()) ||
               (total < enough_seconds && seconds.size() < enough_times)) {
            if (!cut) begin(plan);
            const auto number = static_cast<std::int64_t>(seconds.size()) + 1;
            seconds.push_back(seconds_of(device_, [&] {
                if (cut && trial.later.empty()) {
                    trial.later = profile_of([&] { add(plan.micro_batch, number); });
                } else {
                    add(plan.micro_batch, number);
                }
            }));
            total += seconds.back();
        }
        trial.seconds = lower_median(seconds);
        return trial;
    }

    static bool runs_exactly(const Plan& plan, bool cut) { return cut && plan.batch_norm == BatchNorm::exact; }

    // Its micro-batches cannot run alone. At every point of the work, memory grows by the same amount with each of them,
    // and so does the time: two short batches tell what the whole one takes.
    MicroBatchTrial run_exactly(const Plan& plan) {
        const std::int64_t count = micro_batch_count(samples_, plan.micro_batch);
        const ExactRun shorter = run_exactly(plan, 2);
        const ExactRun longer = count > 2 ? run_exactly(plan, 3) : shorter;
        MicroBatchTrial trial;
        trial.seconds = shorter.seconds / 2.0;
        if (count > 2) trial.seconds = std::min(trial.seconds, longer.seconds / 3.0);
        for (std::size_t i = 0; i < shorter.profile.size(); ++i) {
            const std::int64_t more = count > 2 ? longer.profile[i] - shorter.profile[i] : 0;
            trial.first.push_back(shorter.profile[i] + std::max<std::int64_t>(more, 0) * (count - 2));
        }
        trial.later = trial.first;
        return trial;
    }

    struct ExactRun {
        MemoryProfile profile;  // the peaks of the first micro-batch's piece and of all others, segment by segment
        double seconds = 0.0;
    };
    ExactRun run_exactly(const Plan& plan, std::int64_t count) {
        discard();
        ExactRun result;
        const SliceOf front(batch_, {0, std::min(count * plan.micro_batch, samples_)});
        const auto on_piece = [&](bool first, bool last) {
            if (!first && !last)
                return;  // the last one's peak is that of all after the first: it may have fewer samples
            result.profile.push_back(peak());
            meter_.reset_peak();
        };
        meter_.reset_peak();
        const LossFunction loss = [this](const Batch& micro) { return counted(loss_(micro)); };
        result.seconds = seconds_of(device_, [&] { accumulator_.gather_trial(front, loss, plan, on_piece); });
        return result;
    }

    double warm_seconds(const Plan& plan, bool cut) {
        if (runs_exactly(plan, cut)) {
            const double count =
                static_cast<double>(std::min<std::int64_t>(3, micro_batch_count(samples_, plan.micro_batch)));
            return run_exactly(plan, static_cast<std::int64_t>(count)).seconds / count;
        }
        begin(plan);
        if (cut) add(plan.micro_batch, 0);
        return seconds_of(device_, [&] { add(plan.micro_batch, cut ? 1 : 0); });
    }

    void discard() {
        accumulator_.discard({});
        holds_gradients_ = false;
    }

    void begin(const Plan& plan) {
        discard();
        accumulator_.begin_trial(plan);
    }

    // The micro-batch of this size and index, starting again at the front when the batch ends.
    void add(std::int64_t size, std::int64_t number) {
        const std::int64_t begin = (number % (samples_ / size)) * size;
        accumulator_.add(counted(loss_of(loss_, batch_.fetch({begin, begin + size}))));
    }

    // Samples of weight 0 have no backward pass; others of their shape have.
    static WeightedLoss counted(WeightedLoss loss) {
        if (loss.weight.is_known_zero() && loss.sum.defined() && loss.sum.requires_grad()) loss.weight = 1.0;
        return loss;
    }

    template <class Work>
    MemoryProfile profile_of(const Work& work) const {
        meter_.reset_peak();
        MemoryTrace trace(device_);
        work();
        MemoryProfile profile = trace.live_bytes();
        for (std::int64_t& bytes : profile) bytes -= gradients_.bytes();
        // The meter includes what the trace has not recorded: allocations of other threads.
        if (!trace.complete() || profile.empty() || peak_of(profile) < peak()) profile = {peak()};
        return profile;
    }

    UpdateTrial run_update(bool rehearse) {
        const auto started = Clock::now();
        if (!holds_gradients_) gather_last();
        UpdateTrial trial;
        meter_.reset_peak();
        const at::Tensor buffers = communication_buffers();
        trial.seconds = seconds_of(device_, [&] { accumulator_.finish(); });
        const std::int64_t norm_peak = peak();
        trial.first_peak_bytes = trial.later_peak_bytes = norm_peak;
        if (!rehearse) return trial;
        const std::int64_t before = live();
        accumulator_.dry_run_apply();
        trial.first_peak_bytes = peak();
        trial.state_bytes = live() - before;
        meter_.reset_peak();
        std::vector<double> seconds{trial.seconds + rehearse_again()};
        // A later step computes its gradient norm while the state already exists.
        trial.later_peak_bytes = std::max(peak(), norm_peak + trial.state_bytes);
        while (seconds_since(started) + last_seconds_ < enough_seconds && seconds.size() < enough_times) {
            gather_last();
            const double norm = seconds_of(device_, [&] { accumulator_.finish(); });
            seconds.push_back(norm + rehearse_again());
        }
        trial.seconds = lower_median(seconds);
        return trial;
    }

    // A trial does not communicate, but takes the memory for it.
    at::Tensor communication_buffers() const {
        const std::int64_t bytes =
            accumulator_.reducer().buffer_bytes(accumulator_.parameters(), accumulator_.grain() > 0);
        return bytes == 0 ? at::Tensor() : at::empty({bytes}, at::TensorOptions(device_).dtype(at::kByte));
    }

    void gather_last() {
        begin(last_);
        add(last_.micro_batch, 0);
    }

    // Returns its seconds. After a dry run, the gradients hold arbitrary numbers, and denormal ones would be slow.
    double rehearse_again() {
        refill_gradients();
        return seconds_of(device_, [&] { accumulator_.dry_run_apply(); });
    }

    void refill_gradients() const {
        at::NoGradGuard no_grad;
        for (const at::Tensor& tensor : tensors_) {
            if (tensor.grad().defined()) tensor.mutable_grad().fill_(1e-3);
        }
    }

    Accumulator& accumulator_;
    const BatchSource& batch_;
    std::int64_t samples_;
    const LossFunction& loss_;
    at::Device device_;
    Meter& meter_;
    ParkedGradients gradients_;
    std::vector<at::Tensor> tensors_;
    Plan last_;  // that was tried
    double last_seconds_ = 0.0;
    bool holds_gradients_ = false;  // of the last plan
};

}  // namespace

PlanReport plan_batch(Accumulator& accumulator, const BatchSource& batch, const LossFunction& loss,
                      PlannerOptions options) {
    accumulator.require_idle();
    options.batch = batch.size();
    require_that(options.batch >= 1, "the batch for planning is empty: give it at least one sample");
    options.offers_recompute = accumulator.offers_recompute(options.batch_norm);
    LiveJob job(accumulator, batch, loss);
    if (options.budget_bytes == 0) options.budget_bytes = job.budget();
    return make_plan(options, job);
}

}  // namespace microbatch
