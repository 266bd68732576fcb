#include "microbatch/io/run_reader.h"

#include <cmath>
#include <fstream>
#include <limits>
#include <nlohmann/json.hpp>

#include "microbatch/core/error.h"
#include "microbatch/core/text.h"

namespace microbatch {
namespace {

using Json = nlohmann::json;

double number(const Json& value) {
    if (!value.is_string()) return value.get<double>();
    const auto& word = value.get_ref<const std::string&>();
    if (word == "inf") return std::numeric_limits<double>::infinity();
    if (word == "-inf") return -std::numeric_limits<double>::infinity();
    if (word == "nan") return std::numeric_limits<double>::quiet_NaN();
    return Json(word).get<double>();  // throws
}

std::optional<double> number_or_none(const Json& value) {
    return value.is_null() ? std::nullopt : std::optional(number(value));
}

std::optional<std::int64_t> count_or_none(const Json& value) {
    return value.is_null() ? std::nullopt : std::optional(value.get<std::int64_t>());
}

LoggedStep read_line(const Json& line) {
    LoggedStep step{.step = line.at("step"),
                    .samples = line.at("samples"),
                    .tokens = line.at("tokens"),
                    .batch = line.at("batch"),
                    .loss = number(line.at("loss")),
                    .learning_rate = number(line.at("learning_rate")),
                    .gradient_norm = number(line.at("gradient_norm")),
                    .plan = {line.at("micro_batch").get<std::int64_t>(), line.at("recompute").get<bool>()},
                    .out_of_memory = line.at("out_of_memory"),
                    .seconds = number(line.at("step_seconds")),
                    .predicted_seconds = number_or_none(line.at("predicted_step_seconds")),
                    .update_seconds = number(line.at("update_seconds")),
                    .peak_bytes = line.at("peak_bytes"),
                    .predicted_peak_bytes = count_or_none(line.at("predicted_peak_bytes")),
                    .applied = line.at("applied"),
                    .reason = line.at("reason"),
                    .went_back_to = count_or_none(line.at("went_back_to")),
                    .noise_batch = number_or_none(line.at("noise_batch"))};
    return step;
}

// None if the line is not a step.
std::optional<LoggedStep> read_step(const std::string& text) {
    try {
        const LoggedStep step = read_line(Json::parse(text));
        const bool sound = step.step > 0 && step.peak_bytes > 0 && step.seconds > 0.0 && step.plan.micro_batch > 0;
        return sound ? std::optional(step) : std::nullopt;
    } catch (const Json::exception&) {
        return std::nullopt;
    }
}

}  // namespace

LoggedRun read_run_log(const std::filesystem::path& folder) {
    const std::filesystem::path path = folder / "metrics.jsonl";
    const auto refuse = [](const auto&... what) { throw Error(ErrorKind::bad_data, text(what...)); };
    std::ifstream file(path, std::ios::binary);
    // Opening a folder works; reading from it does not.
    if (!file || (file.peek(), file.bad())) refuse(folder.string(), " is no run: there is no ", path.string());
    file.clear();
    LoggedRun run;
    std::string line;
    for (std::int64_t number = 1; std::getline(file, line); ++number) {
        const std::optional<LoggedStep> step = read_step(line);
        if (!step && file.eof()) {
            run.cut = true;
            break;
        }
        if (!step) refuse(path.string(), " line ", number, " is not a step as `train` writes it");
        run.steps.push_back(*step);
    }
    if (run.steps.empty()) refuse(path.string(), " holds no step");
    return run;
}

}  // namespace microbatch
