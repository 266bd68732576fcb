#include "cli/report.h"

#include <fmt/format.h>

#include <toml++/toml.h>
#include <algorithm>
#include <cmath>
#include <fstream>
#include <memory>
#include <nlohmann/json.hpp>
#include <optional>

#include "cli/commands.h"
#include "cli/output.h"
#include "cli/settings.h"
#include "microbatch/core/error.h"
#include "microbatch/core/units.h"

namespace microbatch::cli {
namespace {

toml::table read_config(const std::filesystem::path& folder) {
    const std::filesystem::path file = folder / "config.toml";
    if (!std::filesystem::exists(file)) return {};
    try {
        return toml::parse_file(file.string());
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

std::vector<std::pair<std::string, std::string>> tiles_of(const LoggedRun& run, const RunExtras& extras) {
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
    if (extras.held_out_loss) tiles.push_back({"loss held out", fmt::format("{:.4f}", *extras.held_out_loss)});
    tiles.push_back({"peak memory", format_bytes(peak)});
    tiles.push_back({"time of a step (median)", fmt::format("{:.3g} s", median(times))});
    tiles.push_back({"time in all", clock_time(seconds)});
    if (last.noise_batch) tiles.push_back({"noise batch", format_count(std::llround(*last.noise_batch))});
    tiles.push_back({"steps refused", format_count(refused)});
    if (restores > 0) tiles.push_back({"times gone back", format_count(restores)});
    return tiles;
}

// Text that was written by this command, and may have been changed since.
template <class Read>
auto read_summary_part(const std::filesystem::path& file, Read read) {
    try {
        return read();
    } catch (const nlohmann::json::exception&) {
        throw Error(ErrorKind::bad_data, fmt::format("{} is not as `train` writes it", file.string()));
    }
}

RunExtras read_summary(const std::filesystem::path& file) {
    std::ifstream stream(file);
    if (!stream) return {};
    return read_summary_part(file, [&] {
        const auto json = nlohmann::json::parse(stream);
        RunExtras extras{.banner = json.at("banner").get<std::string>()};
        if (!json.at("held_out_loss").is_null()) extras.held_out_loss = json["held_out_loss"].get<double>();
        for (const auto& table : json.at("tables")) {
            extras.tables.push_back({table.at("title"), table.at("heading"), table.at("rows"), table.at("note")});
        }
        for (const auto& one : json.at("curves")) {
            ReportCurves curves{one.at("title"), one.at("along"), one.at("x"), {}, one.at("note")};
            for (const auto& line : one.at("lines")) {
                std::vector<double> values;
                for (const auto& y : line.at("y")) values.push_back(y.is_null() ? std::nan("") : y.get<double>());
                curves.lines.emplace_back(line.at("name").get<std::string>(), std::move(values));
            }
            extras.curves.push_back(std::move(curves));
        }
        return extras;
    });
}

nlohmann::ordered_json finite_or_null(double value) {
    return std::isfinite(value) ? nlohmann::ordered_json(value) : nlohmann::ordered_json();
}

void write_summary(const std::filesystem::path& file, const RunExtras& extras) {
    nlohmann::ordered_json json;
    json["banner"] = extras.banner;
    json["held_out_loss"] = extras.held_out_loss ? finite_or_null(*extras.held_out_loss) : nullptr;
    json["tables"] = nlohmann::ordered_json::array();
    for (const ReportTable& table : extras.tables) {
        json["tables"].push_back(
            {{"title", table.title}, {"heading", table.heading}, {"rows", table.rows}, {"note", table.note}});
    }
    json["curves"] = nlohmann::ordered_json::array();
    for (const ReportCurves& curves : extras.curves) {
        nlohmann::ordered_json lines = nlohmann::ordered_json::array();
        for (const auto& [name, values] : curves.lines) {
            nlohmann::ordered_json y = nlohmann::ordered_json::array();
            for (const double value : values) y.push_back(finite_or_null(value));
            lines.push_back({{"name", name}, {"y", y}});
        }
        json["curves"].push_back({{"title", curves.title},
                                  {"along", curves.along},
                                  {"x", curves.x},
                                  {"lines", lines},
                                  {"note", curves.note}});
    }
    write_report(file, json.dump(2, ' ', false, nlohmann::ordered_json::error_handler_t::replace) + "\n");
}

// What is there, and what is new.
RunExtras merged(RunExtras there, const RunExtras& more) {
    if (!more.banner.empty()) there.banner = more.banner;
    if (more.held_out_loss) there.held_out_loss = more.held_out_loss;
    if (!more.tables.empty()) there.tables = more.tables;
    if (!more.curves.empty()) there.curves = more.curves;
    return there;
}

// What `advise` would say of the batch by the noise alone; none where it is undefined.
std::vector<ReportTable> advice_of(const LoggedRun& run) {
    const std::optional<double> noise = run.steps.back().noise_batch;
    if (!noise) return {};
    const auto samples = [](double batch) { return format_count(std::max<std::int64_t>(1, std::llround(batch))); };
    return {{.title = "What the noise says of the batch",
             .heading = {"for", "batch"},
             .rows = {{"fewest steps, within 10 %", samples(10.0 * *noise) + " or more"},
                      {"knee: twice the fewest steps and samples", samples(*noise)},
                      {"fewest samples, within 10 %", samples(*noise / 10.0) + " or less"},
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

}  // namespace

std::string write_run_report(const std::filesystem::path& folder, const RunExtras& more) {
    const LoggedRun run = read_run_log(folder);
    const std::filesystem::path summary = folder / "summary.json";
    const RunExtras extras = merged(read_summary(summary), more);
    const toml::table config = read_config(folder);
    ReportText text{.title = title_of(folder, config),
                    .banner = extras.banner,
                    .tiles = tiles_of(run, extras),
                    .tables = advice_of(run),
                    .curves = extras.curves,
                    .budget_bytes = budget_of(config)};
    text.tables.insert(text.tables.end(), extras.tables.begin(), extras.tables.end());
    for (const auto& [key, node] : config) text.settings.emplace_back(std::string(key.str()), as_text(node));
    write_report(folder / "report.html", report_html(run, text));
    if (std::filesystem::exists(summary) || !extras.banner.empty() || extras.held_out_loss || !extras.tables.empty()) {
        write_summary(summary, extras);
    }
    return run.cut
               ? fmt::format("{} ends in the midst of a line, which is left out", (folder / "metrics.jsonl").string())
               : std::string();
}

namespace {

int report(const Settings& settings) {
    const std::string warning = write_run_report(settings.run);
    if (!warning.empty()) fmt::print(stderr, "warning: {}\n", warning);
    fmt::print("written   {}\n", (std::filesystem::path(settings.run) / "report.html").string());
    return 0;
}

}  // namespace

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
