#include "microbatch/run/run_reader.h"

#include <optional>
#include <stdexcept>
#include <string_view>

#include "microbatch/core/error.h"
#include "microbatch/core/str_cat.h"
#include "microbatch/io/line_reader.h"

namespace microbatch {
namespace {

// Empty if the line is not a step.
std::optional<StepRecord> read_step(std::string_view text) {
    try {
        const StepRecord step = step_record_from(text);
        const bool sound = step.step > 0 && step.peak_bytes >= 0 && step.step_seconds > 0.0 && step.micro_batch > 0;
        return sound ? std::optional(step) : std::nullopt;
    } catch (const std::invalid_argument&) {
        return std::nullopt;
    }
}

}  // namespace

LoggedRun read_run_log(const std::filesystem::path& folder) {
    const std::filesystem::path path = folder / "metrics.jsonl";
    const auto refuse = [](const auto&... what) { throw Error(ErrorKind::bad_data, str_cat(what...)); };
    if (!std::filesystem::is_regular_file(path)) refuse(folder.string(), " is not a run: there is no ", path.string());
    LineReader lines(path);
    LoggedRun run;
    while (const auto line = lines.next()) {
        const std::optional<StepRecord> step = read_step(*line);
        if (!step && !lines.is_whole()) {
            run.cut = true;
            break;
        }
        if (!step) refuse(path.string(), " line ", lines.number(), " is not a valid step");
        run.steps.push_back(*step);
    }
    if (run.steps.empty()) refuse(path.string(), " has no steps");
    return run;
}

}  // namespace microbatch
