#include "cli/options/settings.h"

#include <c10/util/Exception.h>
#include <fmt/format.h>

#include <algorithm>
#include <filesystem>

#include "cli/options/options.h"
#include "cli/options/refuse.h"
#include "microbatch/memory/meter.h"
#include "microbatch/runtime/device.h"

namespace microbatch::cli {
namespace {

const OptimizerDefaults& defaults_of(const Settings& settings) {
    return settings.optimizer == "sgd" ? sgd_defaults : adamw_defaults;
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
        refuse("--batch-schedule \"{}\": write seesaw, \"seesaw to 512\" or \"32 at 0, 128 at 2M tokens\"",
               settings.batch_schedule);
    }
    return read_flag("--batch-schedule", [&] { return parse_count(settings.batch_schedule.substr(to.size())); });
}

void validate_batch_schedule(const Settings& settings) {
    if (settings.batch_schedule.empty()) return;
    const RateRule rule = rate_rule_of(settings);
    if (rule == RateRule::adam_sde || rule == RateRule::beta2_time) {
        refuse(
            "--lr-rule {} contradicts --batch-schedule: it would change Adam's betas during the run; choose "
            "none, linear or sqrt",
            to_string(rule));
    }
}

void validate_rate_rule(const Settings& settings) {
    if (!settings.reference_batch && settings.batch_schedule.empty() && rate_rule_of(settings) != RateRule::none) {
        refuse("--lr-rule {} needs --reference-batch: the batch that --lr was tuned for", settings.lr_rule);
    }
    constants_of(settings, settings.batch);
}

void validate_micro_batch(const Settings& settings) {
    if (!settings.micro_batch) return;
    const std::int64_t size = *settings.micro_batch;
    if (!settings.batch_schedule.empty() && !is_seesaw(settings)) {
        const std::int64_t smallest = smallest_batch(parse_batch_schedule(settings.batch_schedule));
        if (size > smallest) {
            refuse(
                "--batch-schedule \"{}\" has a batch of {} samples, below --micro-batch {}: choose a smaller "
                "--micro-batch",
                settings.batch_schedule, smallest, size);
        }
    }
    if (size > settings.batch) {
        refuse("--micro-batch {} is larger than --batch {}: choose a smaller one", size, settings.batch);
    }
}

}  // namespace

void resolve_batch(Settings& settings, bool batch_given) {
    if (settings.batch_schedule.empty() || is_seesaw(settings)) return;
    const BatchSchedule schedule =
        read_flag("--batch-schedule", [&] { return parse_batch_schedule(settings.batch_schedule); });
    const std::int64_t first = schedule.front().batch;
    if (batch_given && settings.batch != first) {
        refuse("--batch {} contradicts --batch-schedule, which begins with {}", settings.batch, first);
    }
    read(*find_option("batch"), fmt::format("{}", first), settings);
}

at::Device device_of(const Settings& settings) {
    return read_flag("--device", [&] {
        try {
            const at::Device device(settings.device);
            require_device(device);
            return device;
        } catch (const c10::Error&) {
            refuse("\"{}\" is no device; write cpu, cuda or cuda:1", settings.device);
        }
    });
}

std::int64_t memory_budget_of(const Settings& settings) {
    const at::Device device = device_of(settings);
    if (settings.memory.empty()) return available_of(device) / 5 * 4 / settings.processes;
    return read_flag("--memory", [&] {
        const std::int64_t bytes = parse_bytes(settings.memory);
        if (!device.is_cpu()) require_budget_fits(meter_of(device), bytes);
        return bytes;
    });
}

Interval length_of(const Settings& settings, Interval fallback) {
    std::optional<Interval> found;
    for (const Interval& each :
         {Interval{settings.steps.value_or(0), Unit::steps}, Interval{settings.samples.value_or(0), Unit::samples},
          Interval{settings.tokens.value_or(0), Unit::tokens}}) {
        if (each.count == 0) continue;
        if (found) refuse("--{} contradicts --{}: give one length", to_string(each.unit), to_string(found->unit));
        found = each;
    }
    return found.value_or(fallback);
}

Schedule schedule_of(const Settings& settings, Interval length, std::int64_t tokens_per_sample) {
    auto in_lengths_unit = [&](const char* flag, const std::string& text) {
        return read_flag(flag, [&] {
            const Interval interval = parse_interval(text);
            Interval converted = convert(interval, length.unit, settings.batch, tokens_per_sample);
            // With a smaller last batch, a run of n steps has fewer samples than n batches.
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
    schedule.peak = constants_of(settings, settings.batch).learning_rate;
    schedule.floor = settings.final_lr.value_or(0.0) * (reference > 0.0 ? schedule.peak / reference : 1.0);
    schedule.warmup = in_lengths_unit("--warmup", settings.warmup);
    schedule.length = length;
    if (schedule.shape == ScheduleShape::wsd) {
        schedule.decay = settings.decay.empty() ? Interval{std::max<std::int64_t>(1, length.count / 5), length.unit}
                                                : in_lengths_unit("--decay", settings.decay);
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
        return seesaw(schedule_of(settings, length, tokens_per_sample), settings.batch, largest_of_seesaw(settings));
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
    return settings.momentum.value_or(default_momentum);
}

double learning_rate_of(const Settings& settings) {
    return settings.lr.value_or(defaults_of(settings).lr);
}

double weight_decay_of(const Settings& settings) {
    return settings.weight_decay.value_or(defaults_of(settings).weight_decay);
}

void validate(const Settings& settings) {
    if (settings.data.empty())
        refuse("--data is missing: name a text file, a .bin file of tokens or a folder of images");
    require_options_apply(settings);
    if (settings.nesterov && momentum_of(settings) == 0.0) refuse("--nesterov contradicts --momentum 0");
    validate_rate_rule(settings);
    validate_batch_schedule(settings);
    validate_micro_batch(settings);
    if (settings.grain > 1 && !settings.invariant) {
        refuse("--grain {} is for the invariant mode: add --invariant, or leave it out", settings.grain);
    }
    memory_budget_of(settings);
}

Settings resolved(Settings settings, const Plan& cut, Interval length, std::int64_t tokens_per_sample,
                  std::int64_t budget_bytes) {
    const Schedule schedule = schedule_of(settings, length, tokens_per_sample);
    const bool follows_batch = settings.reference_batch || !settings.batch_schedule.empty();
    // A changing batch scales from its first one; recorded, the rule also applies to other commands.
    const std::int64_t reference = settings.reference_batch.value_or(settings.batch);
    settings.lr_rule = follows_batch ? to_string(rate_rule_of(settings)) : "";
    if (follows_batch) settings.reference_batch = reference;
    settings.data = std::filesystem::absolute(settings.data).string();
    settings.micro_batch = settings.invariant ? std::nullopt : std::optional(cut.micro_batch);
    settings.recompute = cut.recompute ? "always" : "never";
    if (settings.norm == "batch") settings.batch_norm = to_string(cut.batch_norm);
    settings.memory = fmt::format("{}B", budget_bytes);
    settings.steps = settings.samples = settings.tokens = std::nullopt;
    auto& count = length.unit == Unit::steps     ? settings.steps
                  : length.unit == Unit::samples ? settings.samples
                                                 : settings.tokens;
    count = length.count;
    settings.lr = learning_rate_of(settings);
    settings.final_lr = settings.final_lr.value_or(0.0);
    settings.weight_decay = weight_decay_of(settings);
    settings.momentum = momentum_of(settings);
    settings.decay = to_string(schedule.decay);
    settings.power = schedule.power;
    if (settings.dropout == 0.0) settings.dropout.reset();
    return settings;
}

}  // namespace microbatch::cli
