#include <c10/util/Exception.h>
#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <nlohmann/json.hpp>
#include <optional>
#include <vector>

#include "cli/commands/commands.h"
#include "cli/commands/job.h"
#include "cli/commands/process.h"
#include "cli/print/output.h"
#include "cli/print/progress.h"
#include "microbatch/analysis/batch_size_sweep.h"
#include "microbatch/core/batch_advice.h"
#include "microbatch/core/error.h"
#include "microbatch/core/units.h"
#include "microbatch/io/json.h"
#include "microbatch/memory/budget_allocator.h"
#include "microbatch/memory/meter.h"
#include "microbatch/run/outcome.h"
#include "microbatch/run/run_memory.h"

namespace microbatch::cli {
namespace {

// How many batches of the base size each branch trains on, and the minimum number of steps of a branch.
constexpr std::int64_t branch_batches = 64, branch_steps = 8;

struct Noise {
    std::optional<double> batch;  // in samples; empty if undefined
    std::int64_t measures = 0;
};

// The rate is constant, so settings of the schedule are dropped.
Settings at_constant_rate(Settings settings) {
    settings.schedule = "constant";
    settings.final_lr.reset();
    settings.power.reset();
    settings.decay.clear();
    return settings;
}

Noise measure_noise_of_run(std::FILE* out, const JobPlan& plan, const Job& job, Interval length, std::int64_t budget) {
    const Settings constant = at_constant_rate(plan.settings);
    Trainer trainer(*job.accumulator, *plan.data.train, job.loss,
                    {.batch = plan.settings.batch,
                     .length = length,
                     .schedule = schedule_of(constant, length, plan.data.train->tokens_per_sample()),
                     .seed = plan.settings.seed,
                     .guard = SpikeGuardOptions{.most_refused = most_refused_in_a_row - 1},
                     .noise_every = 1});
    ProgressLine progress(out, length, speed_unit(plan), budget);
    Noise noise;
    std::vector<NoiseMeasure> measures;
    double weight_per_sample = 1.0;
    while (!trainer.done()) {
        if (interrupted()) throw Interrupted();
        const TrainerReport report = trainer.step();
        progress.update(report, memory_use_of(device_of(plan.settings)).peak_bytes);
        if (report.diverged) {
            progress.finish();
            throw Error(ErrorKind::stopped,
                        fmt::format("the run diverged at step {}: {}; use a lower --lr than {:g} or a --warmup",
                                    report.progress.steps, report.step.reason, learning_rate_of(plan.settings)));
        }
        if (!report.step.noise || !report.step.applied) continue;
        measures.push_back(*report.step.noise);
        weight_per_sample = report.step.weight / static_cast<double>(report.samples);
    }
    progress.finish();
    noise.measures = static_cast<std::int64_t>(measures.size());
    // The first half belongs to an outdated gradient; of the rest, numerator and denominator are averaged separately.
    NoiseMeasure sum;
    for (std::size_t i = measures.size() / 2; i < measures.size(); ++i) {
        sum.variance += measures[i].variance;
        sum.squared_gradient += measures[i].squared_gradient;
    }
    if (sum.variance > 0.0 && sum.squared_gradient > 0.0) {
        noise.batch = sum.variance / sum.squared_gradient / weight_per_sample;
    }
    return noise;
}

// Empty if the rule is undefined.
std::optional<double> rate_by(const Settings& settings, RateRule rule, std::int64_t batch) {
    try {
        const std::int64_t reference = settings.reference_batch.value_or(settings.batch);
        return scale_to_batch(constants_of(settings), rule, reference, batch).learning_rate;
    } catch (const Error&) {
        return std::nullopt;
    }
}

std::vector<RateRule> rules_for(const Settings& settings) {
    if (settings.optimizer == "sgd") return {RateRule::linear, RateRule::sqrt};
    return {RateRule::sqrt, RateRule::adam_sde, RateRule::linear};
}

std::string bar(double share) {
    constexpr double longest = 30.0;
    return std::string(static_cast<std::size_t>(std::lround(std::clamp(share, 0.0, 1.0) * longest)), '#');
}

// The batch of the table that is nearest to this one.
std::int64_t nearest_batch(const BatchAdvice& advice, double batch) {
    const auto far = [batch](const BatchCost& cost) {
        return std::abs(std::log(static_cast<double>(cost.batch) / batch));
    };
    return std::min_element(advice.table.begin(), advice.table.end(),
                            [&](const auto& one, const auto& other) { return far(one) < far(other); })
        ->batch;
}

void print_costs(std::FILE* out, const Settings& settings, const BatchAdvice& advice) {
    std::vector<std::string> heading{"", "batch", "micro-batch", "time per step", "steps", "samples", "time"};
    const std::vector<RateRule> rules = rules_for(settings);
    for (const RateRule rule : rules) heading.push_back(fmt::format("rate ({})", to_string(rule)));
    std::vector<std::vector<std::string>> rows{heading};
    for (std::size_t i = 0; i < advice.table.size(); ++i) {
        const BatchCost& cost = advice.table[i];
        std::string mark = i == advice.soonest ? "fastest" : "";
        if (cost.batch == nearest_batch(advice, advice.noise_batch)) mark += mark.empty() ? "knee" : ", knee";
        if (cost.batch == settings.batch) mark += mark.empty() ? "yours" : ", yours";
        std::vector<std::string> row{mark,
                                     std::to_string(cost.batch),
                                     std::to_string(cost.micro_batch),
                                     fmt::format("{:.1f} ms", 1e3 * cost.step_seconds),
                                     fmt::format("{:.2f} x", cost.steps),
                                     fmt::format("{:.2f} x", cost.samples),
                                     fmt::format("{:.2f} x", cost.time)};
        for (const RateRule rule : rules) {
            const std::optional<double> rate = rate_by(settings, rule, cost.batch);
            row.push_back(rate ? fmt::format("{:.3g}", *rate) : "-");
        }
        rows.push_back(row);
    }
    print_table(out, rows);
    print(out, "steps, samples and time to reach the same loss, relative to the smallest of each\n\n");
    print(out, "time to reach the same loss, by batch\n");
    double most = 1.0;
    for (const BatchCost& cost : advice.table) most = std::max(most, cost.time);
    for (const BatchCost& cost : advice.table) {
        print(out, "{:>8}  {:<30}  {:.2f} x\n", cost.batch, bar(cost.time / most), cost.time);
    }
}

std::string describe_accumulation(const BatchAdvice& advice) {
    const BatchCost& soonest = advice.table[advice.soonest];
    const BatchCost& uncut = advice.soonest_uncut;
    if (!soonest.is_cut()) {
        return fmt::format("not needed: the batch that reaches the same loss fastest, {}, is one micro-batch",
                           soonest.batch);
    }
    const double gain = 100.0 * (1.0 - soonest.time / uncut.time);
    if (advice.accumulation_pays()) {
        return fmt::format(
            "worth it: a batch of {} in micro-batches of {} reaches the same loss {:.0f} % faster than one of {} in "
            "one piece",
            soonest.batch, soonest.micro_batch, gain, uncut.batch);
    }
    return fmt::format(
        "not worth it for time: a batch of {} in one piece reaches the same loss as fast as {} accumulated (within "
        "{:.1f} %)",
        uncut.batch, soonest.batch, std::max(0.0, gain));
}

std::string beyond_data(std::int64_t batch, const BatchAdvice& advice) {
    if (batch <= advice.samples) return "";
    return fmt::format("; too large for the data, which has {} samples", format_count(advice.samples));
}

void print_advice(std::FILE* out, const Settings& settings, const Noise& noise, const BatchAdvice& advice) {
    print(out, "noise     as large as the gradient at a batch of {} samples ({} measurements at a batch of {})\n",
          format_count(std::llround(advice.noise_batch)), noise.measures, settings.batch);
    print(out, "          a proxy: language models can use batches several times as large; --check tests it\n\n");
    print_costs(out, settings, advice);
    const std::int64_t few_steps = batch_of_few_steps(advice.noise_batch);
    const std::int64_t knee = std::max<std::int64_t>(1, std::llround(advice.noise_batch));
    print(out, "\nfewest steps     a batch of {} or more: within 10 % of the fewest steps that any batch needs{}\n",
          format_count(few_steps), beyond_data(few_steps, advice));
    print(out, "fewest samples   a batch of {} or less: within 10 % of the fewest samples\n",
          format_count(batch_of_few_samples(advice.noise_batch)));
    print(out, "knee             {}: twice the minimum of both{}\n", format_count(knee), beyond_data(knee, advice));
    print(out, "fastest          {}, by the time per step on this machine\n",
          format_count(advice.table[advice.soonest].batch));
    print(out, "accumulation     {}\n", describe_accumulation(advice));
}

// The user's rule, if there is one that changes only the rate.
RateRule rule_of_branches(const Settings& settings) {
    if (settings.lr_rule.empty()) return settings.optimizer == "sgd" ? RateRule::linear : RateRule::sqrt;
    const RateRule rule = parse_rate_rule(settings.lr_rule);
    if (rule == RateRule::adam_sde) return RateRule::sqrt;
    return rule == RateRule::beta2_time ? RateRule::none : rule;
}

std::vector<Branch> check_branches(std::FILE* out, const JobPlan& plan, const Job& job) {
    BranchOptions options{.batch = plan.settings.batch,
                          .samples = std::min(branch_batches * plan.settings.batch, plan.data.train->size()),
                          .rule = rule_of_branches(plan.settings),
                          .seed = plan.settings.seed + 1};
    // No branch sees a sample twice: memorised samples say nothing about new ones.
    std::erase_if(options.factors, [&](std::int64_t factor) {
        return factor > 1 && factor * plan.settings.batch > options.samples / branch_steps;
    });
    if (options.factors.size() < 2) return {};
    std::int64_t shown = 0;
    options.on_step = [&](std::int64_t batch) {
        if (interrupted()) throw Interrupted();
        if (batch == shown) return;
        shown = batch;
        print(out, "check     training at a batch of {}\n", batch);
    };
    return branch_by_batch(*job.accumulator, *plan.data.train, job.loss, options);
}

void print_branches(std::FILE* out, const std::vector<Branch>& branches) {
    std::vector<std::vector<std::string>> rows{{"", "batch", "rate", "loss", "relative to the first"}};
    std::int64_t critical = 0;
    for (const Branch& branch : branches) {
        rows.push_back({branch.as_good ? "as good" : "", std::to_string(branch.batch),
                        fmt::format("{:.3g}", branch.learning_rate), fmt::format("{:.4f}", branch.loss),
                        fmt::format("{:+.4f}", branch.loss - branches.front().loss)});
        if (branch.as_good) critical = branch.batch;
    }
    print_table(out, rows);
    if (critical == 0) {
        print(out, "critical         undefined: the loss of the first batch is not finite\n");
        return;
    }
    print(out, "critical         {}{}: the largest batch whose loss is at most 0.01 worse\n",
          critical == branches.back().batch ? "at least " : "", critical);
}

void print_too_few(std::FILE* out, const JobPlan& plan) {
    print(out, "check            skipped: {} steps at twice the batch need {} samples, and the data has {}\n",
          branch_steps, format_count(2 * branch_steps * plan.settings.batch), format_count(plan.data.train->size()));
}

nlohmann::ordered_json to_json(const BatchCost& cost, const Settings& settings) {
    nlohmann::ordered_json row{
        {"batch", cost.batch},          {"micro_batch", cost.micro_batch},  {"step_seconds", cost.step_seconds},
        {"relative_steps", cost.steps}, {"relative_samples", cost.samples}, {"relative_time", cost.time}};
    for (const RateRule rule : rules_for(settings)) {
        row["learning_rate"][std::string(to_string(rule))] = json_value(rate_by(settings, rule, cost.batch));
    }
    return row;
}

void print_json(const JobPlan& plan, const Noise& noise, const std::optional<BatchAdvice>& advice,
                const std::vector<Branch>& branches) {
    nlohmann::ordered_json document{{"model", plan.model},
                                    {"batch", plan.settings.batch},
                                    {"data_samples", plan.data.train->size()},
                                    {"noise_batch", json_value(noise.batch)},
                                    {"measures", noise.measures},
                                    {"batches", nlohmann::ordered_json::array()},
                                    {"soonest_batch", nullptr},
                                    {"accumulation_pays", nullptr},
                                    {"branches", nlohmann::ordered_json::array()}};
    if (advice) {
        for (const BatchCost& cost : advice->table) document["batches"].push_back(to_json(cost, plan.settings));
        document["soonest_batch"] = advice->table[advice->soonest].batch;
        document["accumulation_pays"] = advice->accumulation_pays();
    }
    for (const Branch& branch : branches) {
        document["branches"].push_back({{"batch", branch.batch},
                                        {"learning_rate", branch.learning_rate},
                                        {"loss", json_value(branch.loss)},
                                        {"as_good", branch.as_good}});
    }
    print(stdout, "{}\n", document.dump(2));
}

int advise_on_batch(const Arguments& arguments) {
    const Settings& settings = arguments.settings;
    validate(settings);
    if (settings.batch < 2) {
        throw Error(ErrorKind::usage, "--batch 1: measuring noise requires two micro-batches; raise --batch");
    }
    const Interval length = length_of(settings, default_length);
    const std::int64_t budget = memory_budget_of(settings);
    std::FILE* out = settings.json ? stderr : stdout;
    use_threads(settings);
    install_budget_allocator();
    watch_interrupts();
    const JobPlan plan = open_job(settings, length);
    require_whole_batch(plan);
    require_enough_data(settings.batch, plan.data.train->size());
    const Job job = make_job_to_plan(plan, budget);
    const PlanReport report = plan_job(plan, job, budget, out);
    job.accumulator->set_plan(settings.micro_batch ? report.choice().plan : plan_with_noise(report));
    meter_of(device_of(settings)).set_budget(budget);
    print(out, "model     {}\n", plan.model_description);
    print_data(out, plan.data, 10);
    print(out, "measuring noise: {} at a batch of {} in micro-batches of {}\n", to_string(length), settings.batch,
          job.accumulator->plan().micro_batch);
    const Noise noise = measure_noise_of_run(out, plan, job, length, budget);
    std::optional<BatchAdvice> advice;
    if (noise.batch) {
        advice = advise_batch(*noise.batch, timed_cuts(report), report.update_seconds,
                              largest_to_compare(*noise.batch, settings.batch), plan.data.train->size());
        print_advice(out, settings, noise, *advice);
    } else {
        print(out, "noise     undefined after {} measurements: {}\n", noise.measures,
              noise.measures == 0 ? "the batch was not split, or a copy of the gradients did not fit in memory"
                                  : "the noise hides the gradient; measure longer (--steps) or with a larger --batch");
    }
    std::vector<Branch> branches;
    if (settings.check) {
        try {
            branches = check_branches(out, plan, job);
            branches.empty() ? print_too_few(out, plan) : print_branches(out, branches);
        } catch (const c10::OutOfMemoryError&) {
            print(out, "check     skipped: a copy of the parameters and the optimizer state does not fit in memory\n");
        }
    }
    if (settings.json) print_json(plan, noise, advice, branches);
    return 0;
}

}  // namespace

CommandSpec advise_command() {
    return {.command = command::advise,
            .name = "advise",
            .summary =
                "Measure the gradient noise; recommend a batch size and a learning rate, and say whether accumulation "
                "pays off",
            .footer = R"(Example:
  microbatch advise --data /usr/share/games/fortunes --batch 64 --memory 100MiB --check
Trains briefly at a constant rate, and measures at every step how much the gradients of the micro-batches differ.
The noise scale usually grows as a model trains: measure again later, or see noise_batch in the metrics.jsonl of a run.
The rates are --lr scaled by each rule, assuming that --lr was tuned for --reference-batch, or else for --batch.)",
            .length = to_string(default_length),
            .run = advise_on_batch};
}

}  // namespace microbatch::cli
