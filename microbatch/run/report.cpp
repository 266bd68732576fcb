#include "microbatch/run/report.h"

#include <cmath>
#include <nlohmann/json.hpp>
#include <string_view>

#include "microbatch/core/str_cat.h"
#include "microbatch/run/report_files.h"

namespace microbatch {
namespace {

using Json = nlohmann::ordered_json;

constexpr std::size_t most_points = 10'000;
constexpr std::size_t most_events = 1'000;

// A refused step is always drawn, even if others are omitted.
bool is_drawn(const LoggedRun& run, std::size_t i) {
    const std::size_t stride = (run.steps.size() + most_points - 1) / most_points;
    return i % stride == 0 || i + 1 == run.steps.size() || !run.steps[i].applied;
}

// A count without ".0"; what is not finite becomes null when it is written.
Json short_number(double value) {
    const bool whole = std::abs(value) < 0x1p53 && value == std::floor(value);
    return whole ? Json(static_cast<std::int64_t>(value)) : Json(value);
}

Json columns_of(const LoggedRun& run) {
    Json columns;
    for (const StepField& field : step_fields()) {
        if (!field.charted) continue;
        Json& column = columns[field.key] = Json::array();
        for (std::size_t i = 0; i < run.steps.size(); ++i) {
            if (!is_drawn(run, i)) continue;
            const std::optional<double> number = field.number(run.steps[i]);
            column.push_back(number ? short_number(*number) : Json());
        }
    }
    return columns;
}

void add_events(const LoggedRun& run, Json& document) {
    Json events = Json::array();
    std::size_t left_out = 0;
    const auto add = [&](const StepRecord& step, const char* kind, const std::string& what) {
        if (events.size() >= most_events)
            ++left_out;
        else
            events.push_back({{"step", step.step}, {"kind", kind}, {"text", what}});
    };
    for (const StepRecord& step : run.steps) {
        if (step.out_of_memory > 0) {
            add(step, "out of memory",
                str_cat("repeated in micro-batches of ", step.micro_batch, step.recompute ? " with recompute" : ""));
        }
        if (!step.applied) add(step, "refused", step.reason);
        if (step.rolled_back_to) add(step, "rolled back", str_cat("to the weights of step ", *step.rolled_back_to));
    }
    document["events"] = std::move(events);
    document["events_left_out"] = left_out;
}

Json document_of(const LoggedRun& run, const ReportText& text) {
    Json document;
    document["banner"] = text.summary.banner;
    document["tiles"] = text.tiles;
    document["budget_bytes"] = text.budget_bytes;
    document["columns"] = columns_of(run);
    add_events(run, document);
    document["tables"] = text.summary.tables;
    document["curves"] = text.summary.curves;
    document["settings"] = text.settings;
    return document;
}

// Inside a script element, only "<" is harmful; in JSON, it occurs only in strings.
std::string script_safe(std::string json) {
    for (std::size_t at = json.find('<'); at != std::string::npos; at = json.find('<', at)) {
        json.replace(at, 1, "\\u003c");
    }
    return json;
}

std::string escaped(std::string_view plain) {
    std::string result;
    for (const char c : plain) result += c == '&' ? "&amp;" : c == '<' ? "&lt;" : c == '>' ? "&gt;" : std::string(1, c);
    return result;
}

}  // namespace

std::string report_html(const LoggedRun& run, const ReportText& text) {
    const std::string title = escaped(text.title);
    const std::string json = script_safe(document_of(run, text).dump(-1, ' ', false, Json::error_handler_t::replace));
    const std::pair<std::string_view, std::string_view> parts[] = {{"title", title},
                                                                   {"run", json},
                                                                   {"page.css", report_files::page_css},
                                                                   {"page.js", report_files::page_js},
                                                                   {"uplot.css", report_files::uplot_css},
                                                                   {"uplot.js", report_files::uplot_js}};
    std::string html;
    std::string_view rest = report_files::page_html;
    for (std::size_t open = rest.find("{{"); open != std::string_view::npos; open = rest.find("{{")) {
        html += rest.substr(0, open);
        const std::size_t close = rest.find("}}", open);
        const std::string_view name = rest.substr(open + 2, close - open - 2);
        for (const auto& [part, content] : parts) {
            if (part == name) html += content;
        }
        rest.remove_prefix(close + 2);
    }
    html += rest;
    return html;
}

}  // namespace microbatch
