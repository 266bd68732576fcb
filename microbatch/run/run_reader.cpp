#include "microbatch/run/run_reader.h"

#include <nlohmann/json.hpp>
#include <stdexcept>

#include "microbatch/core/error.h"
#include "microbatch/core/str_cat.h"
#include "microbatch/io/bounded_json.h"
#include "microbatch/io/json_number.h"
#include "microbatch/io/line_reader.h"

namespace microbatch {
namespace {

using Json = nlohmann::json;

constexpr std::size_t most_values = 1000;  // of a line, which has some 25

std::optional<double> number_or_none(const Json& value) {
    return value.is_null() ? std::nullopt : std::optional(number_from(value));
}

std::optional<std::int64_t> count_or_none(const Json& value) {
    return value.is_null() ? std::nullopt : std::optional(count_from(value));
}

LoggedStep read_line(const Json& line) {
    LoggedStep step{.step = count_from(line.at("step")),
                    .samples = count_from(line.at("samples")),
                    .tokens = count_from(line.at("tokens")),
                    .batch = count_from(line.at("batch")),
                    .loss = number_from(line.at("loss")),
                    .learning_rate = number_from(line.at("learning_rate")),
                    .gradient_norm = number_from(line.at("gradient_norm")),
                    .plan = {count_from(line.at("micro_batch")), line.at("recompute").get<bool>()},
                    .out_of_memory = count_from(line.at("out_of_memory")),
                    .seconds = number_from(line.at("step_seconds")),
                    .predicted_seconds = number_or_none(line.at("predicted_step_seconds")),
                    .update_seconds = number_from(line.at("update_seconds")),
                    .peak_bytes = count_from(line.at("peak_bytes")),
                    .predicted_peak_bytes = count_or_none(line.at("predicted_peak_bytes")),
                    .applied = line.at("applied"),
                    .reason = line.at("reason"),
                    .went_back_to = count_or_none(line.at("went_back_to")),
                    .noise_batch = number_or_none(line.at("noise_batch"))};
    return step;
}

// None if the line is not a step.
std::optional<LoggedStep> read_step(std::string_view text) {
    try {
        const LoggedStep step = read_line(parse_bounded(text, most_values));
        const bool sound = step.step > 0 && step.peak_bytes > 0 && step.seconds > 0.0 && step.plan.micro_batch > 0;
        return sound ? std::optional(step) : std::nullopt;
    } catch (const Json::exception&) {
        return std::nullopt;
    } catch (const std::invalid_argument&) {
        return std::nullopt;
    }
}

}  // namespace

LoggedRun read_run_log(const std::filesystem::path& folder) {
    const std::filesystem::path path = folder / "metrics.jsonl";
    const auto refuse = [](const auto&... what) { throw Error(ErrorKind::bad_data, str_cat(what...)); };
    if (!std::filesystem::is_regular_file(path)) refuse(folder.string(), " is no run: there is no ", path.string());
    LineReader lines(path);
    LoggedRun run;
    while (const auto line = lines.next()) {
        const std::optional<LoggedStep> step = read_step(*line);
        if (!step && !lines.is_whole()) {
            run.cut = true;
            break;
        }
        if (!step) refuse(path.string(), " line ", lines.number(), " is not a step as `train` writes it");
        run.steps.push_back(*step);
    }
    if (run.steps.empty()) refuse(path.string(), " holds no step");
    return run;
}

}  // namespace microbatch
