#include "microbatch/io/run_log.h"

#include <charconv>
#include <nlohmann/json.hpp>
#include <string>
#include <string_view>

#include "microbatch/core/error.h"
#include "microbatch/core/text.h"
#include "microbatch/io/json_number.h"
#include "microbatch/io/line_reader.h"

namespace microbatch {
namespace {

void make_folder(const std::filesystem::path& folder) {
    std::error_code failure;
    std::filesystem::create_directories(folder, failure);
    if (failure) {
        throw Error(ErrorKind::usage, text("cannot make the run folder ", folder.string(), ": ", failure.message()));
    }
}

bool is_line_of(std::int64_t step, std::string_view line) {
    constexpr std::string_view begin = "{\"step\":";
    if (!line.starts_with(begin) || !line.ends_with('}')) return false;
    std::int64_t found = 0;
    const auto [end, failure] = std::from_chars(line.data() + begin.size(), line.data() + line.size(), found);
    return failure == std::errc() && found == step && *end == ',';
}

struct Kept {
    std::int64_t lines = 0;
    std::uint64_t bytes = 0;
};

// How much of a log is the lines of steps 1, 2, ..., `steps`.
Kept sound_part(const std::filesystem::path& path, std::int64_t steps) {
    LineReader lines(path);
    Kept kept;
    while (kept.lines < steps) {
        const auto line = lines.next();
        if (!line || !lines.is_whole() || !is_line_of(kept.lines + 1, *line)) break;
        ++kept.lines;
        kept.bytes = lines.offset();
    }
    return kept;
}

}  // namespace

RunLog::RunLog(const std::filesystem::path& folder) : path_(folder / "metrics.jsonl") {
    make_folder(folder);
    // A link that leads nowhere counts, too: writing through it would write elsewhere.
    std::error_code failure;
    if (std::filesystem::exists(std::filesystem::symlink_status(path_, failure))) {
        throw Error(ErrorKind::usage, text(path_.string(), " exists already: name a new folder for this run"));
    }
    file_.emplace(path_);
}

RunLog::RunLog(const std::filesystem::path& folder, std::int64_t steps) : path_(folder / "metrics.jsonl") {
    make_folder(folder);
    std::error_code failure;
    if (!std::filesystem::exists(std::filesystem::symlink_status(path_, failure))) {
        file_.emplace(path_);
        return;
    }
    if (!std::filesystem::is_regular_file(std::filesystem::symlink_status(path_, failure))) {
        throw Error(ErrorKind::usage, text(path_.string(), " is no file: it is in the way of the run's log"));
    }
    const Kept kept = sound_part(path_, steps);
    file_.emplace(path_, kept.bytes);
    lines_ = kept.lines;
}

std::string RunLog::write(const TrainerReport& report, const StepMeasures& measures) {
    nlohmann::ordered_json line;
    line["step"] = report.progress.steps;
    line["samples"] = report.progress.samples;
    line["tokens"] = report.progress.tokens;
    line["batch"] = report.samples;
    line["loss"] = json_number(report.step.loss);
    line["weight"] = json_number(report.step.weight);
    line["learning_rate"] = json_number(report.step.learning_rate);
    line["gradient_norm"] = json_number(report.step.gradient_norm);
    line["micro_batch"] = report.step.plan.micro_batch;
    line["micro_batches"] = report.step.micro_batches;
    line["recompute"] = report.step.plan.recompute;
    line["out_of_memory"] = report.step.out_of_memory;
    line["step_seconds"] = json_number(report.seconds);
    line["update_seconds"] = json_number(report.step.update_seconds);
    line["predicted_step_seconds"] = nullptr;
    if (measures.predicted_step_seconds) line["predicted_step_seconds"] = json_number(*measures.predicted_step_seconds);
    line["peak_bytes"] = measures.peak_bytes;
    line["predicted_peak_bytes"] = nullptr;
    if (measures.predicted_peak_bytes) line["predicted_peak_bytes"] = *measures.predicted_peak_bytes;
    line["applied"] = report.step.applied;
    line["reason"] = report.step.reason;
    line["went_back_to"] = nullptr;
    if (report.went_back_to) line["went_back_to"] = *report.went_back_to;
    line["gradient_variance"] = nullptr;
    line["squared_gradient"] = nullptr;
    if (const auto& noise = report.step.noise) {
        line["gradient_variance"] = json_number(noise->variance);
        line["squared_gradient"] = json_number(noise->squared_gradient);
    }
    line["noise_batch"] = nullptr;
    if (report.noise_batch) line["noise_batch"] = json_number(*report.noise_batch);
    ++lines_;
    return file_->append(line.dump(-1, ' ', false, nlohmann::json::error_handler_t::replace) + "\n");
}

}  // namespace microbatch
