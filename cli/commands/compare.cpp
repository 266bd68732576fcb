#include <fmt/format.h>

#include <algorithm>
#include <limits>
#include <nlohmann/json.hpp>
#include <numeric>

#include "cli/commands/commands.h"
#include "cli/commands/job.h"
#include "cli/commands/process.h"
#include "cli/commands/strategy.h"
#include "cli/options/refuse.h"
#include "cli/print/output.h"
#include "microbatch/core/batch_advice.h"
#include "microbatch/core/error.h"
#include "microbatch/core/units.h"
#include "microbatch/io/json.h"
#include "microbatch/memory/budget_allocator.h"

namespace microbatch::cli {
namespace {

constexpr std::int64_t default_batches = 16;  // of --batch samples each, on which every strategy trains

/// A temporary folder, deleted at the end; or the one that --run names, which is kept.
class WorkFolder {
public:
    explicit WorkFolder(const std::string& named) : keep_(!named.empty()), path_(named) {
        if (keep_) {
            std::error_code failure;
            std::filesystem::create_directories(path_, failure);
            if (failure) refuse("cannot create --run {}: {}", named, failure.message());
            return;
        }
        std::string name = (std::filesystem::temp_directory_path() / "microbatch-compare-XXXXXX").string();
        if (::mkdtemp(name.data()) == nullptr) refuse("cannot create {}", name);
        path_ = name;
    }
    WorkFolder(const WorkFolder&) = delete;
    WorkFolder& operator=(const WorkFolder&) = delete;
    ~WorkFolder() {
        std::error_code ignored;
        if (keep_) {
            std::filesystem::remove(path_, ignored);  // if it is empty
        } else {
            std::filesystem::remove_all(path_, ignored);
        }
    }

    const std::filesystem::path& path() const { return path_; }
    bool is_kept() const { return keep_; }

private:
    bool keep_;
    std::filesystem::path path_;
};

// Before anything is measured.
void refuse_used_folder(const std::string& run) {
    if (run.empty() || !std::filesystem::exists(run)) return;
    refuse("--run {} exists already; name a new folder for this comparison", run);
}

double mean_of(const std::vector<double>& values) {
    return std::accumulate(values.begin(), values.end(), 0.0) / static_cast<double>(values.size());
}

std::string describe_losses(const Strategy& strategy) {
    if (!strategy.failure.empty()) return "did not finish";
    if (!strategy.ran) return "-";
    if (strategy.diverged) return "diverged";
    const auto [least, most] = std::minmax_element(strategy.held_out.begin(), strategy.held_out.end());
    const std::string mean = fmt::format("{:.4f}", mean_of(strategy.held_out));
    return strategy.held_out.size() == 1 ? mean : fmt::format("{} ({:.4f} to {:.4f})", mean, *least, *most);
}

struct PlannedCuts {
    Plan cut;
    std::int64_t native_peak_bytes = 0;
};

// How the batch is accumulated, and the memory it would need in one piece, which is predicted, not tried.
PlannedCuts plan_cuts(std::FILE* out, const JobPlan& plan, std::int64_t budget) {
    const Job job = make_job_to_plan(plan, budget);
    PlannedCuts cuts{.cut = plan_job(plan, job, budget, out).choice().plan};
    const std::int64_t machine = room_to_measure(plan.settings, budget);
    const PlanReport native = plan_native(plan, job, machine);
    for (const Candidate& candidate : native.candidates) {
        if (candidate.micro_batches == 1) cuts.native_peak_bytes = candidate.peak_bytes();
    }
    if (plan.settings.batches.empty() && cuts.cut.micro_batch == plan.batch && plan.batch > 1) {
        cuts.cut.micro_batch = std::max<std::int64_t>(1, plan.batch / 4);
        print(out, "the plan is the whole batch of {}; for comparison, it is also accumulated in micro-batches of {}\n",
              plan.batch, cuts.cut.micro_batch);
    }
    return cuts;
}

std::vector<std::int64_t> parse_batches(const std::string& list) {
    std::vector<std::int64_t> batches;
    std::string_view rest = list;
    while (true) {
        const auto comma = rest.find(',');
        std::string one(rest.substr(0, comma));
        std::erase(one, ' ');
        try {
            batches.push_back(parse_count(one));
        } catch (const Error& error) {
            refuse("--batches \"{}\": {}; write \"16, 64, 256\"", list, error.what());
        }
        const std::int64_t last = batches.back();
        if (last < 1 || last > std::int64_t{1} << 31) refuse("--batches \"{}\": a batch must be from 1 to 2^31", list);
        if (std::count(batches.begin(), batches.end(), last) > 1) {
            refuse("--batches \"{}\": {} is listed twice", list, last);
        }
        if (comma == std::string_view::npos) return batches;
        rest.remove_prefix(comma + 1);
    }
}

// The plan is for the largest of the --batches; a step in intervals means a step of that batch.
void resolve_batches(Arguments& arguments) {
    Settings& settings = arguments.settings;
    if (settings.batches.empty()) return;
    const std::vector<std::int64_t> batches = parse_batches(settings.batches);
    if (arguments.flags.contains("batch")) {
        refuse("--batch {} contradicts --batches \"{}\", which names every batch", settings.batch, settings.batches);
    }
    settings.batch = *std::max_element(batches.begin(), batches.end());
}

std::vector<Strategy> strategies_of(const Settings& settings, const PlannedCuts& cuts, std::int64_t budget) {
    std::vector<Strategy> strategies;
    if (!settings.batches.empty()) {
        for (const std::int64_t batch : parse_batches(settings.batches)) {
            Plan cut = cuts.cut;
            cut.micro_batch = std::min(cut.micro_batch, batch);
            strategies.push_back(
                {.name = fmt::format("batch {}", batch), .batch = batch, .plan = cut, .memory_bytes = budget});
        }
        return strategies;
    }
    const std::int64_t batch = settings.batch, machine = room_to_measure(settings, budget);
    strategies = {{.name = "small batch", .batch = cuts.cut.micro_batch, .plan = cuts.cut, .memory_bytes = budget},
                  {.name = "accumulated", .batch = batch, .plan = cuts.cut, .memory_bytes = budget},
                  {.name = "native", .batch = batch, .plan = {.micro_batch = batch}, .memory_bytes = machine}};
    Strategy& native = strategies.back();
    native.peak_bytes = cuts.native_peak_bytes;
    native.can_run = native.peak_bytes > 0 && native.peak_bytes <= machine;
    return strategies;
}

std::vector<std::vector<std::string>> rows_of(const JobPlan& plan, const std::vector<Strategy>& strategies,
                                              std::int64_t samples, std::int64_t budget) {
    std::vector<std::vector<std::string>> rows{{"strategy", "batch", "micro-batch", "rate", "peak memory", "fits",
                                                "gradient variance", "time per step", "time per sample", "time",
                                                "held-out loss", "sharpness"}};
    for (const Strategy& s : strategies) {
        auto measured = [&s](const std::string& figure) { return s.ran ? figure : std::string("-"); };
        rows.push_back({s.name, std::to_string(s.batch), std::to_string(s.plan.micro_batch),
                        fmt::format("{:.4g}", constants_of(plan.settings, s.batch).learning_rate),
                        format_bytes(s.peak_bytes) + (s.ran ? "" : " predicted"), s.peak_bytes <= budget ? "yes" : "no",
                        s.variance ? fmt::format("{:.3g}", *s.variance) : "-",
                        measured(fmt::format("{:.1f} ms", 1e3 * s.step_seconds)),
                        measured(fmt::format("{:.3f} ms", 1e3 * s.sample_seconds(samples))),
                        measured(fmt::format("{:.1f} s", s.seconds)), describe_losses(s),
                        s.curvature ? fmt::format("{:.3g}", *s.curvature) : "-"});
    }
    return rows;
}

std::string describe_comparison(const JobPlan& plan, std::int64_t samples, std::int64_t seeds, std::int64_t budget) {
    const RateRule rule = rate_rule_of(plan.settings);
    return fmt::format("{}; {} samples each, the same {} and schedule, {}; memory budget {}", plan.model_description,
                       format_count(samples), seeds == 1 ? "seed" : fmt::format("{} seeds", seeds),
                       rule == RateRule::none ? "the same rate"
                                              : fmt::format("the rate by the rule {} from batch {}", to_string(rule),
                                                            *plan.settings.reference_batch),
                       format_bytes(budget));
}

const char* const what_stands_there =
    "Gradient variance: the trace of the covariance of the batch's mean gradient, with all strategies at the same "
    "parameters. Sharpness: the largest eigenvalue of the Hessian at the end, over 32 samples.";

void print_strategies(std::FILE* out, const std::string& title, const std::vector<Strategy>& strategies,
                      const std::vector<std::vector<std::string>>& rows, std::int64_t data_samples) {
    print(out, "\n{}\n\n", title);
    print_table(out, rows);
    for (const Strategy& each : strategies) {
        if (!each.can_run) {
            print(out, "\n{} was not run: its predicted peak exceeds the free memory of this machine\n", each.name);
        }
        const std::string repetition = describe_repetition(each.batch, data_samples);
        if (!repetition.empty()) print(out, "\n{}: {}\n", each.name, repetition);
    }
}

nlohmann::ordered_json to_json(const JobPlan& plan, const Strategy& s, std::int64_t samples, std::int64_t budget) {
    const auto if_ran = [&s](double value) { return s.ran ? json_value(value) : nullptr; };
    return {{"strategy", s.name},
            {"batch", s.batch},
            {"peak_learning_rate", constants_of(plan.settings, s.batch).learning_rate},
            {"micro_batch", s.plan.micro_batch},
            {"recompute", s.plan.recompute},
            {"ran", s.ran},
            {"diverged", s.diverged},
            {"failure", s.failure.empty() ? nullptr : json_value(s.failure)},
            {"peak_bytes", s.peak_bytes},  // predicted, if it was not run
            {"fits", s.peak_bytes <= budget},
            {"gradient_variance", json_value(s.variance)},
            {"step_seconds", if_ran(s.step_seconds)},
            {"sample_seconds", if_ran(s.sample_seconds(samples))},
            {"seconds", if_ran(s.seconds)},
            {"held_out_loss", if_ran(mean_of(s.held_out))},
            {"held_out_losses", json_value(s.held_out)},
            {"sharpness", json_value(s.curvature)},
            {"losses_along", json_value(s.losses_along)}};
}

void print_json(const JobPlan& plan, const std::vector<Strategy>& strategies, std::int64_t samples, std::int64_t seeds,
                std::int64_t budget) {
    nlohmann::ordered_json document{{"model", plan.model},
                                    {"data", plan.settings.data},
                                    {"data_samples", plan.data.train->size()},
                                    {"samples", samples},
                                    {"seeds", seeds},
                                    {"budget_bytes", budget},
                                    {"distances", distances()}};
    for (const Strategy& s : strategies) document["strategies"].push_back(to_json(plan, s, samples, budget));
    print(stdout, "{}\n", document.dump(2));
}

ReportCurves curves_of(const std::vector<Strategy>& strategies) {
    ReportCurves curves{
        .title = "Sharp or flat: the loss along a random direction",
        .along = "distance",
        .x = distances(),
        .note =
            "At the end of each run. Each filter of the direction has the norm of the model's filter (Li et "
            "al. 2018). Where the loss rises steeply, the minimum is sharp."};
    for (const Strategy& each : strategies) {
        if (!each.losses_along.empty()) curves.lines.push_back({each.name, each.losses_along});
    }
    return curves;
}

// Adds the comparison to the page of every run.
void write_comparison(std::FILE* out, const std::filesystem::path& folder, const std::string& title, std::uint64_t seed,
                      std::int64_t seeds, const std::vector<Strategy>& strategies,
                      std::vector<std::vector<std::string>> rows) {
    ReportTable table{
        .title = "Strategies", .heading = rows.front(), .rows = {}, .note = title + ". " + what_stands_there};
    rows.erase(rows.begin());
    table.rows = std::move(rows);
    for (const Strategy& each : strategies) {
        for (std::int64_t run = 0; run < static_cast<std::int64_t>(each.held_out.size()) && run < seeds; ++run) {
            const std::filesystem::path of_run = folder_of(folder, each, seed + static_cast<std::uint64_t>(run));
            write_report_of(of_run, {.tables = {table}, .curves = {curves_of(strategies)}});
            print(out, "written   {}\n", (of_run / "report.html").string());
        }
    }
}

int compare_strategies(Arguments& arguments) {
    resolve_batches(arguments);
    const Settings& settings = arguments.settings;
    validate(settings);
    refuse_used_folder(settings.run);
    const WorkFolder folder(settings.run);
    if (settings.seed > std::numeric_limits<std::uint64_t>::max() - static_cast<std::uint64_t>(settings.seeds)) {
        refuse("--seed {} with --seeds {}: the last seed must be below 2^64", settings.seed, settings.seeds);
    }
    const std::int64_t budget = memory_budget_of(settings);
    const Interval asked = length_of(settings, {default_batches * settings.batch, Unit::samples});
    std::FILE* out = settings.json ? stderr : stdout;
    use_threads(settings);
    install_budget_allocator();
    watch_interrupts();
    const JobPlan plan = open_job(settings, asked);
    require_whole_batch(plan);
    const std::int64_t tokens_per_sample = plan.data.train->tokens_per_sample();
    const std::int64_t samples = convert(asked, Unit::samples, settings.batch, tokens_per_sample).count;
    schedule_of(settings, {samples, Unit::samples}, tokens_per_sample);
    std::vector<Strategy> strategies = strategies_of(settings, plan_cuts(out, plan, budget), budget);
    for (const Strategy& each : strategies) constants_of(settings, each.batch);  // a rule may be undefined
    print_data(out, plan.data, 10);
    for (std::int64_t run = 0; run < settings.seeds; ++run) {
        const std::uint64_t seed = settings.seed + static_cast<std::uint64_t>(run);
        for (Strategy& each : strategies) {
            if (each.can_run && each.failure.empty()) train_in_child(out, plan, samples, seed, folder.path(), each);
        }
    }
    measure_at_the_end(out, plan, folder.path(), strategies[std::min<std::size_t>(1, strategies.size() - 1)],
                       strategies);
    const auto rows = rows_of(plan, strategies, samples, budget);
    const std::string title = describe_comparison(plan, samples, settings.seeds, budget);
    print_strategies(out, title, strategies, rows, plan.data.train->size());
    if (folder.is_kept()) write_comparison(out, folder.path(), title, settings.seed, settings.seeds, strategies, rows);
    if (settings.json) print_json(plan, strategies, samples, settings.seeds, budget);
    return 0;
}

}  // namespace

CommandSpec compare_command() {
    return {.command = command::compare,
            .name = "compare",
            .summary = "Compare training with a small batch, the batch accumulated, and the batch in one piece",
            .footer = R"(Examples:
  microbatch compare --data /usr/share/games/fortunes --batch 64 --memory 64MiB --samples 1280
  microbatch compare --data notes.txt --batches "8, 64, 512" --reference-batch 64 --run runs/sizes
Every strategy trains on the same samples in its own process. A strategy that exceeds the budget also runs if the
machine has enough memory, and is marked as not fitting. Gradient variance: the trace of the covariance of the
batch's mean gradient, with all strategies at the same parameters. Sharpness: the largest eigenvalue of the
Hessian at the end of the run.)",
            .length = fmt::format("{} batches", default_batches),
            .run = compare_strategies};
}

}  // namespace microbatch::cli
