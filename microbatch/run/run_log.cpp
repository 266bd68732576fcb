#include "microbatch/run/run_log.h"

#include <charconv>
#include <functional>
#include <nlohmann/json.hpp>
#include <stdexcept>
#include <string_view>

#include "microbatch/core/error.h"
#include "microbatch/io/line_reader.h"

namespace microbatch {
namespace {

void make_folder(const std::filesystem::path& folder) {
    std::error_code failure;
    std::filesystem::create_directories(folder, failure);
    if (failure)
        throw Error(ErrorKind::usage, "cannot create the run folder ", folder.string(), ": ", failure.message());
}

// The step of a line; empty if it is not a valid line.
std::optional<std::int64_t> step_of(std::string_view line) {
    constexpr std::string_view begin = "{\"step\":";
    if (!line.starts_with(begin) || !line.ends_with('}')) return std::nullopt;
    std::int64_t step = 0;
    const auto [end, failure] = std::from_chars(line.data() + begin.size(), line.data() + line.size(), step);
    const bool sound = failure == std::errc() && *end == ',' && nlohmann::json::accept(line);
    return sound ? std::optional(step) : std::nullopt;
}

// The lines of steps up to `steps`, each step once.
void for_each_kept(const std::filesystem::path& path, std::int64_t steps,
                   const std::function<void(std::string_view line, std::uint64_t end)>& call) {
    // An extremely long line, such as the zeros that a crash has left, is not a step.
    LineReader lines(path, LineReader::LongLines::pass_over);
    std::int64_t last = 0;
    while (const auto line = lines.next()) {
        const auto step = step_of(*line);
        if (!step || *step <= last || *step > steps || !lines.is_whole()) continue;
        last = *step;
        call(*line, lines.offset());
    }
}

struct Kept {
    std::int64_t lines = 0;
    std::uint64_t bytes = 0, end = 0;  // of the lines; the end of the last one

    bool is_begin() const { return bytes == end; }
};

Kept kept_of(const std::filesystem::path& path, std::int64_t steps) {
    Kept kept;
    for_each_kept(path, steps, [&kept](std::string_view line, std::uint64_t end) {
        ++kept.lines;
        kept.bytes += line.size() + 1;
        kept.end = end;
    });
    return kept;
}

// Without what is between the lines.
void mend(const std::filesystem::path& path, std::int64_t steps, FileSystem& files) {
    const auto write = [&](OutputFile& out) {
        for_each_kept(path, steps, [&out](std::string_view line, std::uint64_t) {
            out.write(line);
            out.write("\n");
        });
    };
    write_whole(path, write, files);
}

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

RunLog::RunLog(const std::filesystem::path& folder) : path_(folder / "metrics.jsonl") {
    make_folder(folder);
    // A broken link counts too: writing through it would write elsewhere.
    std::error_code failure;
    if (std::filesystem::exists(std::filesystem::symlink_status(path_, failure))) {
        throw Error(ErrorKind::usage, path_.string(), " already exists: name a new folder for this run");
    }
    file_.emplace(path_);
}

RunLog::RunLog(const std::filesystem::path& folder, std::int64_t steps, FileSystem& files)
    : path_(folder / "metrics.jsonl") {
    make_folder(folder);
    std::error_code failure;
    if (!std::filesystem::exists(std::filesystem::symlink_status(path_, failure))) {
        file_.emplace(path_);
        return;
    }
    if (!std::filesystem::is_regular_file(std::filesystem::symlink_status(path_, failure))) {
        throw Error(ErrorKind::usage, path_.string(), " is not a file: the log of the run cannot be written there");
    }
    const Kept kept = kept_of(path_, steps);
    if (!kept.is_begin()) mend(path_, steps, files);
    file_.emplace(path_, kept.bytes);
    lines_ = kept.lines;
}

std::string RunLog::write(const StepRecord& record) {
    ++lines_;
    return file_->append(to_json(record) + "\n");
}

LoggedRun read_run_log(const std::filesystem::path& folder) {
    const std::filesystem::path path = folder / "metrics.jsonl";
    const auto refuse = [](const auto&... what) { throw Error(ErrorKind::bad_data, what...); };
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
