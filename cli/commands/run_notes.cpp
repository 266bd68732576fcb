#include "cli/commands/run_notes.h"

#include <ATen/Parallel.h>
#include <ATen/Version.h>
#include <fmt/format.h>

#include <algorithm>
#include <nlohmann/json.hpp>
#include <stdexcept>

#include "microbatch/core/error.h"
#include "microbatch/io/json_number.h"

namespace microbatch::cli {
namespace {

nlohmann::ordered_json to_json(const Outcome& outcome) {
    nlohmann::ordered_json json;
    const StepReport& last = outcome.last.step;
    json["loss"] = json_number(last.loss);
    json["reason"] = last.reason;
    json["gradient_norm"] = json_number(last.gradient_norm);
    json["noise_batch"] = outcome.last.noise_batch ? json_number(*outcome.last.noise_batch) : nullptr;
    json["first_loss"] = json_number(outcome.first_loss);
    json["seconds"] = outcome.seconds;
    json["peak_bytes"] = outcome.peak_bytes;
    json["predicted_peak_bytes"] = outcome.predicted_peak_bytes;
    json["out_of_memory"] = outcome.out_of_memory;
    json["refused"] = outcome.refused;
    json["restores"] = outcome.restores;
    json["refused_in_a_row"] = outcome.refused_in_a_row;
    return json;
}

Outcome outcome_from(const nlohmann::json& json) {
    Outcome outcome;
    outcome.last.step.loss = number_from(json.at("loss"));
    outcome.last.step.reason = json.at("reason").get<std::string>();
    outcome.last.step.gradient_norm = number_from(json.at("gradient_norm"));
    if (!json.at("noise_batch").is_null()) outcome.last.noise_batch = number_from(json.at("noise_batch"));
    outcome.first_loss = number_from(json.at("first_loss"));
    outcome.seconds = number_from(json.at("seconds"));
    outcome.peak_bytes = count_from(json.at("peak_bytes"));
    outcome.predicted_peak_bytes = count_from(json.at("predicted_peak_bytes"));
    // Counted on from: none may be near its end.
    const auto times = [&json](const char* name, std::int64_t most) {
        return std::min(count_from(json.at(name)), most);
    };
    outcome.out_of_memory = times("out_of_memory", INT64_MAX / 2);
    outcome.refused = times("refused", INT64_MAX / 2);
    outcome.restores = times("restores", INT64_MAX / 2);
    outcome.refused_in_a_row = static_cast<int>(times("refused_in_a_row", 1000));
    return outcome;
}

}  // namespace

RunNotes notes_of_machine() {
    return {.threads = at::get_num_threads(), .processor = at::get_cpu_capability(), .version = MICROBATCH_VERSION};
}

std::string to_json_text(const RunNotes& notes) {
    nlohmann::ordered_json json;
    json["config"] = notes.config;
    json["threads"] = notes.threads;
    json["processor"] = notes.processor;
    json["version"] = notes.version;
    json["data"] = notes.data;
    json["outcome"] = to_json(notes.outcome);
    return json.dump(-1, ' ', false, nlohmann::ordered_json::error_handler_t::replace);
}

RunNotes run_notes_from(const std::string& text, const std::string& source) {
    try {
        const auto json = nlohmann::json::parse(text);
        RunNotes notes;
        json.at("config").get_to(notes.config);
        notes.threads = static_cast<int>(std::min<std::int64_t>(count_from(json.at("threads")), 1 << 20));
        json.at("processor").get_to(notes.processor);
        json.at("version").get_to(notes.version);
        notes.data = static_cast<std::uint32_t>(count_from(json.at("data")));
        notes.outcome = outcome_from(json.at("outcome"));
        return notes;
    } catch (const nlohmann::json::exception&) {
    } catch (const std::invalid_argument&) {
    }
    throw Error(ErrorKind::bad_data, fmt::format("{} is no checkpoint of `microbatch train`", source));
}

}  // namespace microbatch::cli
