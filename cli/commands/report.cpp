#include "cli/commands/report.h"

#include <fmt/format.h>

#include <toml++/toml.h>
#include <algorithm>
#include <cmath>
#include <memory>
#include <optional>

#include "cli/commands/commands.h"
#include "cli/options/flags.h"
#include "cli/options/settings.h"
#include "cli/print/output.h"
#include "microbatch/core/batch_advice.h"
#include "microbatch/core/error.h"
#include "microbatch/core/units.h"
#include "microbatch/io/file_system.h"
#include "microbatch/io/input_file.h"

namespace microbatch::cli {
namespace {

toml::table read_config(const std::filesystem::path& folder) {
    constexpr std::uint64_t most_bytes = std::uint64_t{1} << 20U;
    const std::filesystem::path file = folder / "config.toml";
    if (!std::filesystem::exists(file)) return {};
    try {
        return toml::parse(InputFile(file).read_all(most_bytes), file.string());
    } catch (const toml::parse_error& error) {
        throw Error(ErrorKind::bad_data,
                    fmt::format("{} line {}: {}", file.string(), error.source().begin.line, error.description()));
    }
}

std::string as_text(const toml::node& node) {
    if (const auto text = node.value<std::string>(); text && node.is_string()) return *text;
    if (const auto number = node.value<std::int64_t>(); number && node.is_integer()) return fmt::format("{}", *number);
    if (const auto number = node.value<double>(); number && node.is_floating_point())
        return fmt::format("{:g}", *number);
    if (const auto flag = node.value<bool>()) return *flag ? "yes" : "no";
    return "?";
}

std::int64_t budget_of(const toml::table& config) {
    const auto memory = config["memory"].value<std::string>();
    try {
        return memory ? parse_bytes(*memory) : 0;
    } catch (const Error&) {
        return 0;  // changed by hand: a chart without its line
    }
}

std::vector<std::pair<std::string, std::string>> tiles_of(const LoggedRun& run, const RunSummary& summary) {
    const LoggedStep& last = run.steps.back();
    std::int64_t peak = 0, refused = 0, restores = 0;
    double seconds = 0.0;
    std::vector<double> times;
    for (const LoggedStep& step : run.steps) {
        peak = std::max(peak, step.peak_bytes);
        seconds += step.seconds;
        times.push_back(step.seconds);
        refused += step.applied ? 0 : 1;
        restores += step.went_back_to ? 1 : 0;
    }
    std::vector<std::pair<std::string, std::string>> tiles{
        {"steps", format_count(last.step)},
        {"samples", format_count(last.samples)},
        {"loss at the last step", fmt::format("{:.5g}", last.loss)},
    };
    if (summary.held_out_loss) tiles.push_back({"loss held out", fmt::format("{:.4f}", *summary.held_out_loss)});
    tiles.push_back({"peak memory", format_bytes(peak)});
    tiles.push_back({"time of a step (median)", fmt::format("{:.3g} s", median(times))});
    tiles.push_back({"time in all", clock_time(seconds)});
    if (last.noise_batch) tiles.push_back({"noise batch", format_count(std::llround(*last.noise_batch))});
    tiles.push_back({"steps refused", format_count(refused)});
    if (restores > 0) tiles.push_back({"times gone back", format_count(restores)});
    return tiles;
}

// What `advise` would say of the batch by the noise alone; none where it is undefined.
std::vector<ReportTable> advice_of(const LoggedRun& run) {
    const std::optional<double> noise = run.steps.back().noise_batch;
    if (!noise) return {};
    return {{.title = "What the noise says of the batch",
             .heading = {"for", "batch"},
             .rows = {{"fewest steps, within 10 %", format_count(batch_of_few_steps(*noise)) + " or more"},
                      {"knee: twice the fewest steps and samples",
                       format_count(std::max<std::int64_t>(1, std::llround(*noise)))},
                      {"fewest samples, within 10 %", format_count(batch_of_few_samples(*noise)) + " or less"},
                      {"this run, at its end", format_count(run.steps.back().batch)}},
             .note =
                 "A proxy: language models may use several times as much. microbatch advise says which is soonest on a "
                 "machine, and --check tries it."}};
}

std::string title_of(const std::filesystem::path& folder, const toml::table& config) {
    const std::string name = std::filesystem::absolute(folder).lexically_normal().filename().string();
    const auto model = config["model"].value<std::string>();
    return model ? fmt::format("{}: {}", name.empty() ? folder.string() : name, *model) : name;
}

int report(const Settings& settings) {
    const std::string warning = write_run_report(settings.run);
    if (!warning.empty()) fmt::print(stderr, "warning: {}\n", warning);
    fmt::print("written   {}\n", (std::filesystem::path(settings.run) / "report.html").string());
    return 0;
}

}  // namespace

std::string write_run_report(const std::filesystem::path& folder, const RunSummary& more) {
    const LoggedRun run = read_run_log(folder);
    const RunSummary summary = read_run_summary(folder).with(more);
    const toml::table config = read_config(folder);
    ReportText text{.title = title_of(folder, config),
                    .banner = summary.banner,
                    .tiles = tiles_of(run, summary),
                    .tables = advice_of(run),
                    .curves = summary.curves,
                    .budget_bytes = budget_of(config)};
    text.tables.insert(text.tables.end(), summary.tables.begin(), summary.tables.end());
    for (const auto& [key, node] : config) text.settings.emplace_back(std::string(key.str()), as_text(node));
    write_whole(folder / "report.html", report_html(run, text));
    if (!summary.empty()) write_run_summary(folder, summary);
    if (!run.cut) return {};
    return fmt::format("{} ends in the midst of a line, which is left out", (folder / "metrics.jsonl").string());
}

void add_report(CLI::App& application, Action& action) {
    CLI::App* command = application.add_subcommand("report", "Write report.html of a run: charts of what it did");
    auto settings = std::make_shared<Settings>();
    command->add_option("run", settings->run, "Folder of the run, or of one that is still going on")
        ->type_name("DIR")
        ->required();
    command->footer(
        "Example:\n"
        "  microbatch report runs/gpt-tiny-20261124-120000\n"
        "`train` writes the same page at its end. It needs no network; uPlot is in it. For TensorBoard the folder has\n"
        "events.out.tfevents.*, too.");
    command->callback([command, settings, &action] {
        action = [command, settings] {
            refuse_empty_values(*command);
            return report(*settings);
        };
    });
}

}  // namespace microbatch::cli
