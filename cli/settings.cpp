#include "cli/settings.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <vector>

#include "cli/machine.h"
#include "microbatch/core/error.h"

namespace microbatch::cli {
namespace {

[[noreturn]] void refuse(const std::string& message) {
    throw Error(ErrorKind::usage, message);
}

// Puts the flag's name in front of what the library says about its value.
template <class Read>
auto read_flag(const char* flag, Read read) {
    try {
        return read();
    } catch (const Error& error) {
        throw Error(error.kind(), fmt::format("{}: {}", flag, error.what()));
    }
}

void require(bool holds, const char* flag, const auto& value, const char* allowed) {
    if (!holds) refuse(fmt::format("{} is {}; it must be {}", flag, value, allowed));
}

// A flag that counts: "64", "10k", "1M".
template <class Target>
CLI::Option* add_count(CLI::App& command, const char* flag, Target& target, const char* help, std::int64_t least = 0) {
    return command.add_option_function<std::string>(
        flag,
        [flag, &target, least](const std::string& text) {
            const std::int64_t count = read_flag(flag, [&] { return parse_count(text); });
            if (count < least) refuse(fmt::format("{} is {}; it must be at least {}", flag, count, least));
            target = count;
        },
        help);
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

void refuse_empty_values(const CLI::App& command) {
    for (const CLI::Option* option : command.get_options()) {
        for (const std::string& value : option->results()) {
            if (value.empty()) refuse(fmt::format("{} is empty: give it a value, or leave it out", option->get_name()));
        }
    }
}

std::string reworded(const CLI::Error& error) {
    const std::string message = error.what();
    const std::size_t twice = message.find(": At Most 1 required but received");
    if (twice != std::string::npos) return message.substr(0, twice) + " is given twice";
    const std::string prefix = "Could not convert: ";
    if (!message.starts_with(prefix)) return message;
    return fmt::format("cannot read {}: a number is expected", message.substr(prefix.size()));
}

void add_job_options(CLI::App& command, Settings& s) {
    const char* what = "What is trained";
    command
        .add_option("--data", s.data,
                    "A text file or a folder of text (each byte a token), a .bin of uint16 tokens, or a folder with "
                    "IDX images and labels (.gz or not)")
        ->type_name("PATH")
        ->group(what);
    command
        .add_option("--model", s.model,
                    "gpt-tiny (0.8M parameters), gpt-small (10.8M), gpt2 (124M), resnet or mlp; without it resnet for "
                    "images and gpt-tiny for the rest")
        ->type_name("NAME")
        ->group(what);
    add_count(command, "--layers", s.layers, "Blocks of a gpt, hidden layers of an mlp, blocks a stage of a resnet")
        ->type_name("N")
        ->group(what);
    add_count(command, "--heads", s.heads, "Attention heads of a gpt")->type_name("N")->group(what);
    add_count(command, "--width", s.width, "Width of the model")->type_name("N")->group(what);
    add_count(command, "--length", s.length, "Tokens a sample, for a gpt", 1)->type_name("N")->group(what);
    command.add_option("--norm", s.norm, "batch or group, for a resnet (default batch)")
        ->type_name("NAME")
        ->group(what);
    command.add_option("--dropout", s.dropout, "Dropout of a gpt (default 0)")->type_name("P")->group(what);

    const char* batch = "Batch and memory";
    add_count(command, "--batch", s.batch, "Samples per optimizer step (default 64)")->type_name("N")->group(batch);
    command
        .add_option("--micro-batch", s.micro_batch,
                    "Samples per forward/backward; auto (the default) measures and takes the fastest that fits")
        ->type_name("N|auto")
        ->group(batch);
    command
        .add_option("--recompute", s.recompute,
                    "auto (the default), never or always: compute activations of blocks again in backward, not keep "
                    "them; slower, less memory, the same gradients")
        ->type_name("NAME")
        ->group(batch);
    command
        .add_option("--memory", s.memory,
                    "Budget of all tensors of the process, such as 400MiB or 2GiB; without it four fifths of the "
                    "memory that is free")
        ->type_name("SIZE")
        ->group(batch);

    const char* optimizer = "Optimizer";
    command.add_option("--optimizer", s.optimizer, "adamw (default) or sgd")->type_name("NAME")->group(optimizer);
    command.add_option("--lr", s.lr, "Peak learning rate (default 0.001 for adamw, 0.05 for sgd)")
        ->type_name("X")
        ->group(optimizer);
    command
        .add_option(
            "--lr-rule", s.lr_rule,
            "How the rate follows the batch: linear, sqrt, adam-sde (betas and epsilon, too), beta2-time (beta2 "
            "alone) or none (default: sqrt for adamw, linear for sgd)")
        ->type_name("NAME")
        ->group(optimizer);
    add_count(command, "--reference-batch", s.reference_batch,
              "The batch for which --lr and --final-lr are right; without it they are taken as they are")
        ->type_name("N")
        ->group(optimizer);
    command.add_option("--clip", s.clip, "Largest gradient norm of the batch (default 1; inf: no clipping)")
        ->type_name("X")
        ->group(optimizer);
    command
        .add_option("--weight-decay", s.weight_decay,
                    "Decoupled weight decay, not on biases and norms (default 0.1 for adamw, 0.0005 for sgd)")
        ->type_name("X")
        ->group(optimizer);
    command.add_option("--momentum", s.momentum, "Momentum of sgd (default 0.9)")->type_name("X")->group(optimizer);
    command.add_flag("--nesterov", s.nesterov, "Nesterov momentum for sgd")->group(optimizer);
    command.add_option("--schedule", s.schedule, "constant, linear, cosine (default), wsd or polynomial")
        ->type_name("NAME")
        ->group(optimizer);
    command.add_option("--warmup", s.warmup, "Linear warmup, such as \"100 steps\" or \"1M tokens\" (default none)")
        ->type_name("INTERVAL")
        ->group(optimizer);
    command.add_option("--final-lr", s.final_lr, "Learning rate at the end (default 0)")
        ->type_name("X")
        ->group(optimizer);
    command.add_option("--decay", s.decay, "Length of wsd's final decay (default a fifth of the run)")
        ->type_name("INTERVAL")
        ->group(optimizer);
    command.add_option("--power", s.power, "Power of the polynomial schedule (default 2)")
        ->type_name("X")
        ->group(optimizer);

    const char* run = "Run";
    add_count(command, "--seed", s.seed, "Same seed, threads and cut: same bits (default 1)")
        ->type_name("N")
        ->group(run);
    add_count(command, "--threads", s.threads, "Threads of torch's kernels (default: torch's own choice)", 1)
        ->type_name("N")
        ->group(run);
    command.add_option("--config", s.config, "TOML file with any of these flags as keys; flags win")
        ->type_name("FILE")
        ->group(run);
    command.add_flag("--json", s.json, "Print one JSON document for a program to read; the rest goes to stderr")
        ->group(run);
}

void add_train_options(CLI::App& command, Settings& s) {
    command
        .add_option("--batch-schedule", s.batch_schedule,
                    "The batch over the run, \"32 at 0, 128 at 2M tokens\", or \"seesaw to 512\": it doubles where the "
                    "rate has halved; the rate follows by --lr-rule")
        ->type_name("TEXT")
        ->group("Batch and memory");
    const char* group = "Guard and noise";
    command
        .add_flag("--no-guard", s.no_guard,
                  "Refuse only what is not finite; not losses and gradient norms far beyond those of the last 128 "
                  "steps, nor a run whose loss climbs")
        ->group(group);
    add_count(command, "--restores", s.restores,
              "How often a run that diverges goes back to a snapshot, at a smaller rate, before it is stopped (default "
              "3)")
        ->type_name("N")
        ->group(group);
    add_count(command, "--noise-every", s.noise_every,
              "Measure the gradient's noise every N steps, where a copy of the gradients fits (default 20; 0: never)")
        ->type_name("N")
        ->group(group);
}

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

void add_length_options(CLI::App& command, Settings& s, const std::string& fallback) {
    const std::string group = fmt::format("How long (one of them; default {})", fallback);
    command.add_option("--steps", s.steps, "Optimizer steps, such as 500 or 10k")->type_name("N")->group(group);
    command.add_option("--samples", s.samples, "Samples, such as 60000 or 1M")->type_name("N")->group(group);
    command.add_option("--tokens", s.tokens, "Tokens, such as 10M (an image counts as one)")
        ->type_name("N")
        ->group(group);
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
