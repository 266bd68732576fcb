#include "microbatch/core/schedule.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <numbers>
#include <string>

#include "microbatch/core/error.h"
#include "microbatch/core/str_cat.h"

namespace microbatch {
namespace {

struct NamedShape {
    std::string_view name;
    ScheduleShape shape;
};

constexpr std::array<NamedShape, 5> shapes{{
    {"constant", ScheduleShape::constant},
    {"linear", ScheduleShape::linear},
    {"cosine", ScheduleShape::cosine},
    {"wsd", ScheduleShape::wsd},
    {"polynomial", ScheduleShape::polynomial},
}};

void require(bool condition, const std::string& message) {
    if (!condition) throw Error(ErrorKind::usage, message);
}

void validate_rates(const Schedule& schedule) {
    require(std::isfinite(schedule.peak) && schedule.peak >= 0,
            str_cat("the peak learning rate is ", schedule.peak, "; it must be finite and 0 or more"));
    require(std::isfinite(schedule.floor) && schedule.floor >= 0 && schedule.floor <= schedule.peak,
            str_cat("the learning rate at the end (floor) is ", schedule.floor, "; it must be from 0 to the peak, ",
                    schedule.peak));
    require(schedule.shape != ScheduleShape::polynomial || (std::isfinite(schedule.power) && schedule.power > 0),
            str_cat("the power of the polynomial schedule is ", schedule.power, "; it must be finite and above 0"));
}

void require_not_negative(std::string_view name, Interval interval) {
    require(interval.count >= 0,
            str_cat("the ", name, " of the schedule is ", to_string(interval), "; it must be 0 or more"));
}

void require_same_unit(std::string_view name, Interval interval, Interval length) {
    require(interval.count == 0 || interval.unit == length.unit,
            str_cat("the ", name, " is ", to_string(interval), " but the length of the schedule is ", to_string(length),
                    "; state both in the same unit"));
}

void validate_length(const Schedule& schedule) {
    const std::string_view name = to_string(schedule.shape);
    const bool ends = schedule.length.count > 0 && schedule.length.unit == schedule.warmup.unit;
    if (schedule.shape == ScheduleShape::constant && !ends) return;
    require(schedule.length.count > 0, str_cat("the ", name, " schedule has no length; state where its decay ends"));
    require_same_unit("warmup", schedule.warmup, schedule.length);
    std::int64_t room = schedule.length.count;
    std::string taken = str_cat("warmup (", to_string(schedule.warmup), ")");
    if (schedule.shape == ScheduleShape::wsd) {
        require(schedule.decay.count > 0, "the wsd schedule has no decay; state how long its final decay is");
        require_same_unit("decay", schedule.decay, schedule.length);
        room -= schedule.decay.count;
        taken += str_cat(" and decay (", to_string(schedule.decay), ")");
    }
    require(schedule.warmup.count <= room,
            str_cat("the ", name, " schedule has no room for ", taken, ": its length is ", to_string(schedule.length),
                    "; shorten them or lengthen the run"));
}

/// How much of [begin, end] lies before `at`, from 0 to 1; 1 at the end even if the stretch is empty.
double part_done(std::int64_t at, std::int64_t begin, std::int64_t end) {
    if (at >= end) return 1;
    if (at <= begin) return 0;
    return static_cast<double>(at - begin) / static_cast<double>(end - begin);
}

// std::lerp is exact at both ends and monotone; peak + (floor - peak) * x is neither.
double decayed(const Schedule& schedule, std::int64_t before, std::int64_t after) {
    const std::int64_t length = schedule.length.count;
    if (schedule.shape == ScheduleShape::wsd) {
        if (before >= length) return schedule.floor;
        // Below the peak in every batch that reaches into the decay, however short that is; at the floor in none.
        const auto done = static_cast<double>(std::max<std::int64_t>(0, after - (length - schedule.decay.count)));
        const double all = static_cast<double>(schedule.decay.count) + static_cast<double>(after - before);
        return std::lerp(schedule.peak, schedule.floor, std::min(done / all, 1.0));
    }
    const double x = part_done(before, schedule.warmup.count, length);
    if (schedule.shape == ScheduleShape::cosine) {
        return std::lerp(schedule.floor, schedule.peak, (1 + std::cos(std::numbers::pi * x)) / 2);
    }
    if (schedule.shape == ScheduleShape::polynomial) {
        return std::lerp(schedule.floor, schedule.peak, std::pow(1 - x, schedule.power));
    }
    return std::lerp(schedule.peak, schedule.floor, x);
}

bool is_negative(const Progress& progress) {
    return progress.steps < 0 || progress.samples < 0 || progress.tokens < 0;
}

}  // namespace

ScheduleShape parse_schedule(std::string_view name) {
    std::string names;
    for (const NamedShape& each : shapes) {
        if (each.name == name) return each.shape;
        names += str_cat(names.empty() ? "" : ", ", each.name);
    }
    throw Error(ErrorKind::usage, str_cat("unknown schedule \"", name, "\"; choose one of ", names));
}

std::string_view to_string(ScheduleShape shape) {
    return shapes.at(static_cast<std::size_t>(shape)).name;
}

void validate(const Schedule& schedule) {
    validate_rates(schedule);
    require_not_negative("warmup", schedule.warmup);
    require_not_negative("length", schedule.length);
    require_not_negative("decay", schedule.decay);
    validate_length(schedule);
}

double learning_rate(const Schedule& schedule, const Progress& before, const Progress& batch) {
    validate(schedule);
    require(!is_negative(before) && !is_negative(batch),
            str_cat("the learning rate was requested at negative progress: before ", before.steps, " steps, ",
                    before.samples, " samples, ", before.tokens, " tokens, batch ", batch.steps, " steps, ",
                    batch.samples, " samples, ", batch.tokens, " tokens; count from 0"));
    const Progress after = before + batch;
    const Interval warmup = schedule.warmup;
    if (before.in(warmup.unit) < warmup.count) {
        const auto reached = static_cast<double>(std::min(after.in(warmup.unit), warmup.count));
        return schedule.peak * (reached / static_cast<double>(warmup.count));
    }
    if (schedule.shape == ScheduleShape::constant) return schedule.peak;
    return decayed(schedule, before.in(schedule.length.unit), after.in(schedule.length.unit));
}

}  // namespace microbatch
