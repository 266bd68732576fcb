#include "microbatch/run/run_report.h"

#include <algorithm>
#include <cmath>
#include <cstdio>

#include "microbatch/core/batch_advice.h"
#include "microbatch/core/error.h"
#include "microbatch/core/median.h"
#include "microbatch/core/str_cat.h"
#include "microbatch/core/units.h"
#include "microbatch/io/file_system.h"

namespace microbatch {
namespace {

const std::string* find(const RunSettings& settings, std::string_view name) {
    const auto found =
        std::find_if(settings.begin(), settings.end(), [&](const auto& one) { return one.first == name; });
    return found == settings.end() ? nullptr : &found->second;
}

std::int64_t budget_of(const RunSettings& settings) {
    const std::string* memory = find(settings, "memory");
    try {
        return memory == nullptr ? 0 : parse_bytes(*memory);
    } catch (const Error&) {
        return 0;  // edited by hand: the chart has no line for the budget
    }
}

std::string rounded(const char* format, double value) {
    char text[64];
    std::snprintf(text, sizeof(text), format, value);
    return text;
}

std::vector<std::pair<std::string, std::string>> tiles_of(const LoggedRun& run, const RunSummary& summary) {
    const StepRecord& last = run.steps.back();
    std::int64_t peak = 0, refused = 0, restores = 0;
    double seconds = 0.0;
    std::vector<double> times;
    for (const StepRecord& step : run.steps) {
        peak = std::max(peak, step.peak_bytes);
        seconds += step.step_seconds;
        times.push_back(step.step_seconds);
        refused += step.applied ? 0 : 1;
        restores += step.rolled_back_to ? 1 : 0;
    }
    std::vector<std::pair<std::string, std::string>> tiles{
        {"steps", format_count(last.step)},
        {"samples", format_count(last.samples)},
        {"loss at the last step", rounded("%.5g", last.loss)},
    };
    if (summary.held_out_loss) tiles.push_back({"held-out loss", rounded("%.4f", *summary.held_out_loss)});
    tiles.push_back({"peak memory", format_bytes(peak)});
    tiles.push_back({"time per step (median)", rounded("%.3g s", median(times))});
    tiles.push_back({"total time", format_seconds(seconds)});
    if (last.noise_batch) tiles.push_back({"noise batch", format_count(std::llround(*last.noise_batch))});
    tiles.push_back({"refused steps", format_count(refused)});
    if (restores > 0) tiles.push_back({"roll-backs", format_count(restores)});
    return tiles;
}

// What `advise` would recommend from the noise alone; empty if the noise is undefined.
std::vector<ReportTable> advice_of(const LoggedRun& run) {
    const std::optional<double> noise = run.steps.back().noise_batch;
    if (!noise) return {};
    return {{.title = "Batch sizes that the noise suggests",
             .heading = {"for", "batch"},
             .rows = {{"fewest steps, within 10 %", format_count(batch_of_few_steps(*noise)) + " or more"},
                      {"knee: twice the fewest steps and samples",
                       format_count(std::max<std::int64_t>(1, std::llround(*noise)))},
                      {"fewest samples, within 10 %", format_count(batch_of_few_samples(*noise)) + " or less"},
                      {"this run, at the end", format_count(run.steps.back().batch)}},
             .note = "A proxy: language models can make use of batches several times as large. microbatch advise says "
                     "which batch is fastest on a machine, and --check tests it."}};
}

std::string title_of(const std::filesystem::path& folder, const RunSettings& settings) {
    std::string name = std::filesystem::absolute(folder).lexically_normal().filename().string();
    const std::string* model = find(settings, "model");
    if (model == nullptr) return name;
    return str_cat(name.empty() ? folder.string() : name, ": ", *model);
}

}  // namespace

std::string write_run_report(const std::filesystem::path& folder, const RunSettings& settings, const RunSummary& more) {
    const LoggedRun run = read_run_log(folder);
    const RunSummary summary = read_run_summary(folder).with(more);
    ReportText text{.title = title_of(folder, settings),
                    .tiles = tiles_of(run, summary),
                    .summary = summary,
                    .settings = settings,
                    .budget_bytes = budget_of(settings)};
    const std::vector<ReportTable> advice = advice_of(run);
    text.summary.tables.insert(text.summary.tables.begin(), advice.begin(), advice.end());
    write_whole(folder / "report.html", report_html(run, text));
    if (!summary.empty()) write_run_summary(folder, summary);
    if (!run.cut) return {};
    return str_cat((folder / "metrics.jsonl").string(), " ends in the middle of a line, which is skipped");
}

}  // namespace microbatch
