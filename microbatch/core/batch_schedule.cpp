#include "microbatch/core/batch_schedule.h"

#include <algorithm>

#include "microbatch/core/error.h"
#include "microbatch/core/str_cat.h"

namespace microbatch {
namespace {

[[noreturn]] void refuse(const std::string& what) {
    throw Error(ErrorKind::usage, str_cat("the batch schedule ", what, "; write \"32 at 0, 128 at 2M tokens\""));
}

std::string_view trimmed(std::string_view input) {
    const auto begin = input.find_first_not_of(" \t");
    if (begin == std::string_view::npos) return {};
    return input.substr(begin, input.find_last_not_of(" \t") - begin + 1);
}

BatchStage parse_stage(std::string_view input) {
    const std::string_view stage = trimmed(input);
    const auto at = stage.find(" at ");
    if (at == std::string_view::npos) refuse(str_cat("has an invalid stage \"", stage, "\""));
    const std::string_view from = trimmed(stage.substr(at + 4));
    // 0 is the same in every unit.
    return {parse_count(trimmed(stage.substr(0, at))), from == "0" ? Interval{} : parse_interval(from)};
}

Progress progress_of(Interval interval) {
    Progress progress;
    if (interval.unit == Unit::steps) progress.steps = interval.count;
    if (interval.unit == Unit::samples) progress.samples = interval.count;
    if (interval.unit == Unit::tokens) progress.tokens = interval.count;
    return progress;
}

// Where the rate falls to `rate`; the end if it never does.
std::int64_t first_at_or_below(const Schedule& schedule, double rate) {
    std::int64_t above = schedule.warmup.count, below = schedule.length.count;
    while (above < below) {
        const std::int64_t middle = above + (below - above) / 2;
        const Progress before = progress_of({middle, schedule.length.unit});
        learning_rate(schedule, before, {}) <= rate ? below = middle : above = middle + 1;
    }
    return below;
}

}  // namespace

BatchSchedule parse_batch_schedule(std::string_view input) {
    BatchSchedule schedule;
    while (true) {
        const auto comma = input.find(',');
        schedule.push_back(parse_stage(input.substr(0, comma)));
        if (comma == std::string_view::npos) break;
        input.remove_prefix(comma + 1);
    }
    validate(schedule);
    return schedule;
}

std::string to_string(const BatchSchedule& schedule) {
    std::string result;
    for (const BatchStage& stage : schedule) {
        result += str_cat(result.empty() ? "" : ", ", stage.batch, " at ", to_string(stage.from));
    }
    return result;
}

void validate(const BatchSchedule& schedule) {
    if (schedule.empty()) refuse("has no stage");
    if (schedule.front().from.count != 0) refuse("does not define the start: its first stage must be at 0");
    for (std::size_t i = 0; i < schedule.size(); ++i) {
        const BatchStage& stage = schedule[i];
        if (stage.batch < 1) refuse(str_cat("has a batch of ", stage.batch, "; it must be at least 1"));
        if (i == 0) continue;
        const BatchStage& before = schedule[i - 1];
        if (i > 1 && stage.from.unit != before.from.unit) {
            refuse(str_cat("mixes ", to_string(before.from.unit), " and ", to_string(stage.from.unit)));
        }
        if (stage.from.count <= before.from.count) {
            refuse(str_cat("continues at ", to_string(stage.from), ", which is not after ", to_string(before.from)));
        }
    }
}

std::int64_t batch_at(const BatchSchedule& schedule, const Progress& progress) {
    std::int64_t batch = schedule.front().batch;
    for (const BatchStage& stage : schedule) {
        if (progress.in(stage.from.unit) >= stage.from.count) batch = stage.batch;
    }
    return batch;
}

std::int64_t smallest_batch(const BatchSchedule& schedule) {
    return std::min_element(schedule.begin(), schedule.end(),
                            [](const auto& one, const auto& other) { return one.batch < other.batch; })
        ->batch;
}

std::int64_t largest_batch(const BatchSchedule& schedule) {
    return std::max_element(schedule.begin(), schedule.end(),
                            [](const auto& one, const auto& other) { return one.batch < other.batch; })
        ->batch;
}

BatchSchedule seesaw(const Schedule& schedule, std::int64_t batch, std::int64_t most) {
    validate(schedule);
    const auto need = [](bool holds, const std::string& what) {
        if (!holds) throw Error(ErrorKind::usage, "seesaw: " + what);
    };
    need(batch >= 1, str_cat("the batch is ", batch, "; it must be at least 1"));
    need(most >= batch, str_cat("the largest batch of ", most, " is below the first of ", batch));
    need(schedule.shape != ScheduleShape::constant && schedule.floor < schedule.peak,
         "the batch grows as the learning rate falls, but this schedule does not fall; use cosine or linear");
    need(schedule.length.unit != Unit::steps,
         "if the length is in steps, a larger batch trains on more samples; give the length in samples or "
         "tokens");
    BatchSchedule result{{batch, {0, schedule.length.unit}}};
    double rate = schedule.peak;
    for (std::int64_t next = batch; next <= most / 2;) {
        next *= 2;
        rate /= 2.0;
        const std::int64_t from = first_at_or_below(schedule, rate);
        if (from >= schedule.length.count) break;
        // Two halvings at the same place, at the end of a short run.
        if (from == result.back().from.count) result.pop_back();
        result.push_back({next, {from, schedule.length.unit}});
    }
    return result;
}

}  // namespace microbatch
