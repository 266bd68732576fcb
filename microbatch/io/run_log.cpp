#include "microbatch/io/run_log.h"

#include <cerrno>
#include <cstring>
#include <nlohmann/json.hpp>
#include <string>

#include "microbatch/core/error.h"
#include "microbatch/core/text.h"
#include "microbatch/io/json_number.h"

namespace microbatch {
RunLog::RunLog(const std::filesystem::path& folder) : path_(folder / "metrics.jsonl") {
    std::error_code failure;
    std::filesystem::create_directories(folder, failure);
    if (failure) {
        throw Error(ErrorKind::usage, text("cannot make the run folder ", folder.string(), ": ", failure.message()));
    }
    // A link that leads nowhere counts, too: writing through it would write elsewhere.
    if (std::filesystem::exists(std::filesystem::symlink_status(path_, failure))) {
        throw Error(ErrorKind::usage, text(path_.string(), " exists already: name a new folder for this run"));
    }
    errno = 0;
    file_.open(path_, std::ios::binary | std::ios::trunc);
    if (!file_) throw Error(ErrorKind::usage, text("cannot write ", path_.string(), ": ", std::strerror(errno)));
}

void RunLog::write(const TrainerReport& report, const StepMeasures& measures) {
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
    file_ << line.dump(-1, ' ', false, nlohmann::json::error_handler_t::replace) << '\n' << std::flush;
    if (!file_) throw Error(ErrorKind::usage, text("cannot write ", path_.string(), ": is the disk full?"));
    ++lines_;
}

}  // namespace microbatch
