#include "cli/options/settings.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <vector>

#include "cli/options/refuse.h"
#include "microbatch/core/error.h"
#include "microbatch/memory/machine.h"

namespace microbatch::cli {
namespace {

void require(bool holds, const char* flag, const auto& value, const char* allowed) {
    if (!holds) refuse(fmt::format("{} is {}; it must be {}", flag, value, allowed));
}

const std::string& length_text(const Settings& settings, Unit unit) {
    if (unit == Unit::steps) return settings.steps;
    return unit == Unit::samples ? settings.samples : settings.tokens;
}

void validate_optimizer(const Settings& settings) {
    require(settings.optimizer == "adamw" || settings.optimizer == "sgd", "--optimizer", settings.optimizer,
            "adamw or sgd");
    if (settings.optimizer == "adamw" && settings.nesterov) {
        refuse("--nesterov contradicts --optimizer adamw: it is a setting of sgd");
    }
    if (settings.optimizer == "adamw" && settings.momentum) {
        refuse("--momentum contradicts --optimizer adamw: it is a setting of sgd");
    }
    if (settings.nesterov && momentum_of(settings) == 0.0) refuse("--nesterov contradicts --momentum 0");
    if (settings.lr)
        require(std::isfinite(*settings.lr) && *settings.lr >= 0.0, "--lr", *settings.lr, "finite and 0 or more");
    require(settings.clip > 0.0, "--clip", settings.clip, "above 0 (inf: no clipping)");
    if (settings.weight_decay) {
        require(std::isfinite(*settings.weight_decay) && *settings.weight_decay >= 0.0, "--weight-decay",
                *settings.weight_decay, "finite and 0 or more");
    }
    const double momentum = momentum_of(settings);
    require(momentum >= 0.0 && momentum < 1.0, "--momentum", momentum, "from 0 to below 1");
}

bool is_seesaw(const Settings& settings) {
    return settings.batch_schedule.starts_with("seesaw");
}

// "seesaw" or "seesaw to 512".
std::int64_t largest_of_seesaw(const Settings& settings) {
    constexpr std::int64_t usual_growth = 16;
    const std::string to = "seesaw to ";
    if (settings.batch_schedule == "seesaw") return usual_growth * settings.batch;
    if (!settings.batch_schedule.starts_with(to)) {
        refuse(fmt::format("--batch-schedule \"{}\": write seesaw, \"seesaw to 512\" or \"32 at 0, 128 at 2M tokens\"",
                           settings.batch_schedule));
    }
    return read_flag("--batch-schedule", [&] { return parse_count(settings.batch_schedule.substr(to.size())); });
}

void validate_batch_schedule(const Settings& settings) {
    if (settings.batch_schedule.empty()) return;
    const RateRule rule = rate_rule_of(settings);
    if (rule == RateRule::adam_sde || rule == RateRule::beta2_time) {
        refuse(
            fmt::format("--lr-rule {} contradicts --batch-schedule: it would have to change Adam's betas during the "
                        "run; choose none, linear or sqrt",
                        to_string(rule)));
    }
}

void validate_rate_rule(const Settings& settings) {
    if (settings.reference_batch) {
        require(*settings.reference_batch >= 1, "--reference-batch", *settings.reference_batch, "at least 1");
    } else if (settings.batch_schedule.empty() && rate_rule_of(settings) != RateRule::none) {
        refuse(fmt::format(
            "--lr-rule {} has nothing to start from; say with --reference-batch for which batch --lr is right",
            settings.lr_rule));
    }
    constants_of(settings, settings.batch);
}

}  // namespace

void resolve_batch(Settings& settings, bool batch_given) {
    if (settings.batch_schedule.empty() || is_seesaw(settings)) return;
    const BatchSchedule schedule =
        read_flag("--batch-schedule", [&] { return parse_batch_schedule(settings.batch_schedule); });
    const std::int64_t first = schedule.front().batch;
    if (batch_given && settings.batch != first) {
        refuse(fmt::format("--batch {} contradicts --batch-schedule, which begins with {}", settings.batch, first));
    }
    settings.batch = first;
}

std::int64_t memory_budget_of(const Settings& settings) {
    if (!settings.memory) return available_memory_bytes() / 5 * 4;
    return read_flag("--memory", [&] { return parse_bytes(*settings.memory); });
}

std::optional<std::int64_t> micro_batch_of(const Settings& settings) {
    if (settings.micro_batch == "auto") return std::nullopt;
    const std::int64_t size = read_flag("--micro-batch", [&] { return parse_count(settings.micro_batch); });
    require(size >= 1, "--micro-batch", size, "at least 1, or auto");
    if (!settings.batch_schedule.empty() && !is_seesaw(settings)) {
        const std::int64_t smallest = smallest_batch(parse_batch_schedule(settings.batch_schedule));
        if (size > smallest) {
            refuse(
                fmt::format("--batch-schedule \"{}\" goes down to {} samples, below --micro-batch {}: a batch is cut "
                            "into micro-batches",
                            settings.batch_schedule, smallest, size));
        }
    }
    if (size > settings.batch) {
        refuse(fmt::format("--micro-batch {} is larger than --batch {}: a batch is cut into micro-batches", size,
                           settings.batch));
    }
    return size;
}

Interval length_of(const Settings& settings, Interval fallback) {
    std::optional<Interval> found;
    for (const Unit unit : {Unit::steps, Unit::samples, Unit::tokens}) {
        const std::string& text = length_text(settings, unit);
        if (text.empty()) continue;
        const std::string flag = fmt::format("--{}", to_string(unit));
        if (found) refuse(fmt::format("{} contradicts --{}: say once how long", flag, to_string(found->unit)));
        found = Interval{read_flag(flag.c_str(), [&] { return parse_count(text); }), unit};
        require(found->count > 0, flag.c_str(), found->count, "above 0");
    }
    return found.value_or(fallback);
}

Schedule schedule_of(const Settings& settings, Interval length, std::int64_t tokens_per_sample, std::int64_t batch) {
    auto in_lengths_unit = [&](const char* flag, const std::string& text) {
        return read_flag(flag, [&] {
            const Interval interval = parse_interval(text);
            Interval converted = convert(interval, length.unit, settings.batch, tokens_per_sample);
            // A last, smaller batch makes a run of n steps shorter than n batches.
            const Interval steps = convert(length, Unit::steps, settings.batch, tokens_per_sample);
            if (interval.unit == Unit::steps && interval.count <= steps.count) {
                converted.count = std::min(converted.count, length.count);
            }
            return converted;
        });
    };
    Schedule schedule;
    schedule.shape = read_flag("--schedule", [&] { return parse_schedule(settings.schedule); });
    const double reference = learning_rate_of(settings);
    schedule.peak = constants_of(settings, batch).learning_rate;
    schedule.floor = settings.final_lr.value_or(0.0) * (reference > 0.0 ? schedule.peak / reference : 1.0);
    if (settings.final_lr && schedule.shape == ScheduleShape::constant) {
        refuse("--final-lr contradicts --schedule constant: its rate does not change");
    }
    if (settings.power && schedule.shape != ScheduleShape::polynomial) {
        refuse(fmt::format("--power contradicts --schedule {}: it is a setting of polynomial", settings.schedule));
    }
    schedule.warmup = in_lengths_unit("--warmup", settings.warmup);
    schedule.length = length;
    if (schedule.shape == ScheduleShape::wsd) {
        schedule.decay = settings.decay.empty() ? Interval{std::max<std::int64_t>(1, length.count / 5), length.unit}
                                                : in_lengths_unit("--decay", settings.decay);
    } else if (!settings.decay.empty()) {
        refuse(fmt::format("--decay contradicts --schedule {}: it is a setting of wsd", settings.schedule));
    }
    schedule.power = settings.power.value_or(schedule.power);
    read_flag("--schedule", [&] {
        microbatch::validate(schedule);
        return true;
    });
    return schedule;
}

BatchSchedule batches_of(const Settings& settings, Interval length, std::int64_t tokens_per_sample) {
    if (settings.batch_schedule.empty()) return {{settings.batch, {}}};
    return read_flag("--batch-schedule", [&] {
        if (!is_seesaw(settings)) return parse_batch_schedule(settings.batch_schedule);
        return seesaw(schedule_of(settings, length, tokens_per_sample, settings.batch), settings.batch,
                      largest_of_seesaw(settings));
    });
}

RateRule rate_rule_of(const Settings& settings) {
    if (!settings.lr_rule.empty()) return read_flag("--lr-rule", [&] { return parse_rate_rule(settings.lr_rule); });
    if (!settings.reference_batch && settings.batch_schedule.empty()) return RateRule::none;
    return settings.optimizer == "sgd" ? RateRule::linear : RateRule::sqrt;
}

RateConstants constants_of(const Settings& settings) {
    RateConstants constants{.learning_rate = learning_rate_of(settings)};
    if (settings.optimizer == "adamw") constants.adam = RateConstants::Adam{};
    return constants;
}

RateConstants constants_of(const Settings& settings, std::int64_t batch) {
    const RateRule rule = rate_rule_of(settings);
    if (rule == RateRule::none || !settings.reference_batch) return constants_of(settings);
    return read_flag("--lr-rule",
                     [&] { return scale_to_batch(constants_of(settings), rule, *settings.reference_batch, batch); });
}

double momentum_of(const Settings& settings) {
    return settings.momentum.value_or(0.9);
}

double learning_rate_of(const Settings& settings) {
    return settings.lr.value_or(settings.optimizer == "sgd" ? 0.05 : 1e-3);
}

double weight_decay_of(const Settings& settings) {
    return settings.weight_decay.value_or(settings.optimizer == "sgd" ? 5e-4 : 0.1);
}

void validate(const Settings& settings) {
    if (settings.data.empty()) refuse("--data is missing: name a text file, a .bin of tokens or a folder with images");
    constexpr std::int64_t largest_batch = std::int64_t{1} << 31;
    require(settings.batch >= 1 && settings.batch <= largest_batch, "--batch", settings.batch, "from 1 to 2^31");
    require(settings.threads <= 1024, "--threads", settings.threads, "from 1 to 1024");
    require(settings.dropout >= 0.0 && settings.dropout < 1.0, "--dropout", settings.dropout, "from 0 to below 1");
    if (!settings.norm.empty()) {
        require(settings.norm == "batch" || settings.norm == "group", "--norm", settings.norm, "batch or group");
    }
    validate_optimizer(settings);
    validate_rate_rule(settings);
    validate_batch_schedule(settings);
    micro_batch_of(settings);
    if (settings.recompute != "auto" && settings.recompute != "never" && settings.recompute != "always") {
        refuse(fmt::format("--recompute {}: choose auto, never or always", settings.recompute));
    }
    memory_budget_of(settings);
}

}  // namespace microbatch::cli
