#include "cli/config.h"

#include <fmt/format.h>

#include <toml++/toml.h>
#include <algorithm>
#include <fstream>
#include <vector>

#include "cli/flags.h"
#include "cli/nearest.h"
#include "cli/refuse.h"
#include "microbatch/core/error.h"

namespace microbatch::cli {
namespace {

const std::vector<std::string> length_flags = {"steps", "samples", "tokens"};

std::string as_text(const toml::node& node, const std::string& key) {
    if (const auto text = node.value_exact<std::string>()) return *text;
    if (const auto whole = node.value_exact<std::int64_t>()) return fmt::format("{}", *whole);
    if (const auto real = node.value_exact<double>()) return fmt::format("{}", *real);
    if (const auto flag = node.value_exact<bool>()) return *flag ? "true" : "false";
    refuse(fmt::format("the key {} must be a string, a number or a boolean", key));
}

std::vector<std::string> flag_names(CLI::App& command) {
    std::vector<std::string> names;
    for (const CLI::Option* option : command.get_options()) {
        for (const std::string& name : option->get_lnames()) {
            if (name != "help" && name != "config") names.push_back(name);
        }
    }
    return names;
}

// One file serves train, plan and compare: what only another of them knows is left to it.
bool is_flag_of_another(CLI::App& command, const std::string& key) {
    for (CLI::App* other : command.get_parent()->get_subcommands([](CLI::App*) { return true; })) {
        const std::vector<std::string> names = flag_names(*other);
        if (std::find(names.begin(), names.end(), key) != names.end()) return true;
    }
    return false;
}

void apply_key(CLI::App& command, const std::string& file, const std::string& key, const toml::node& node) {
    const std::vector<std::string> names = flag_names(command);
    if (std::find(names.begin(), names.end(), key) == names.end()) {
        if (is_flag_of_another(command, key)) return;
        const std::string suggestion = nearest(key, names);
        refuse(fmt::format("{} line {}: the key '{}' does not exist{}", file, node.source().begin.line, key,
                           suggestion.empty() ? "; run with --help for those that do"
                                              : fmt::format("; did you mean '{}'?", suggestion)));
    }
    CLI::Option* option = command.get_option("--" + key);
    if (option->count() > 0) return;
    const std::string where = fmt::format("{} line {}: the key {}", file, node.source().begin.line, key);
    const std::string type = option->get_type_name();
    const bool is_switch = option->get_expected_min() == 0;
    const bool is_text =
        type == "PATH" || type == "NAME" || type == "DIR" || type == "INTERVAL" || type == "SIZE" || type == "TEXT";
    if (is_switch && !node.is_boolean()) refuse(where + " must be true or false");
    if (is_text && !node.is_string()) refuse(where + " must be a string");
    try {
        option->add_result(as_text(node, key));
        option->run_callback();
    } catch (const CLI::Error& error) {
        refuse(fmt::format("{} line {}: {}", file, node.source().begin.line, reworded(error)));
    } catch (const Error& error) {
        refuse(fmt::format("{} line {}: {}", file, node.source().begin.line, error.what()));
    }
}

}  // namespace

void apply_config(CLI::App& command, const Settings& settings) {
    if (settings.config.empty()) return;
    const std::string& file = settings.config;
    std::ifstream stream(file, std::ios::binary);
    // Opening a folder works; reading from it does not.
    if (!stream || (stream.peek(), stream.bad()))
        refuse(fmt::format("--config: {} is missing or cannot be read", file));
    stream.clear();
    toml::table table;
    try {
        table = toml::parse(stream, file);
    } catch (const toml::parse_error& error) {
        refuse(fmt::format("{} line {}: {}", file, error.source().begin.line, error.description()));
    }
    const bool has_length = std::any_of(length_flags.begin(), length_flags.end(), [&command](const std::string& name) {
        const CLI::Option* option = command.get_option_no_throw("--" + name);
        return option != nullptr && option->count() > 0;
    });
    for (const auto& [key, node] : table) {
        const std::string name(key.str());
        // A length on the command line wins over a length of another unit in the file.
        const bool is_length = std::find(length_flags.begin(), length_flags.end(), name) != length_flags.end();
        if (!(is_length && has_length)) apply_key(command, file, name, node);
    }
}

RunConfig config_of(const JobPlan& plan, const Plan& cut, Interval length, std::int64_t budget_bytes) {
    return {plan.settings, plan.model, plan.data.train->tokens_per_sample(), cut, length, budget_bytes};
}

void write_config(const std::filesystem::path& folder, const RunConfig& config) {
    const Settings& s = config.settings;
    toml::table table;
    table.insert("data", std::filesystem::absolute(s.data).string());
    table.insert("model", config.model);
    if (s.layers) table.insert("layers", *s.layers);
    if (s.heads) table.insert("heads", *s.heads);
    if (s.width) table.insert("width", *s.width);
    if (s.length > 0) table.insert("length", s.length);
    if (!s.norm.empty()) table.insert("norm", s.norm);
    if (s.dropout > 0.0) table.insert("dropout", s.dropout);
    table.insert("batch", s.batch);
    if (!s.batch_schedule.empty()) table.insert("batch-schedule", s.batch_schedule);
    table.insert("micro-batch", config.cut.micro_batch);
    table.insert("recompute", config.cut.recompute ? "always" : "never");
    table.insert("memory", fmt::format("{}B", config.budget_bytes));
    table.insert(to_string(config.length.unit), config.length.count);
    const Schedule schedule = schedule_of(s, config.length, config.tokens_per_sample, s.batch);
    table.insert("optimizer", s.optimizer);
    table.insert("lr", learning_rate_of(s));
    if (schedule.shape != ScheduleShape::constant) table.insert("final-lr", s.final_lr.value_or(0.0));
    // A batch that changes has the first as its reference; written, the rule holds for other commands, too.
    const bool grows = !s.batch_schedule.empty();
    if (s.reference_batch || grows) {
        table.insert("lr-rule", to_string(rate_rule_of(s)));
        table.insert("reference-batch", s.reference_batch.value_or(s.batch));
    }
    table.insert("schedule", s.schedule);
    table.insert("warmup", s.warmup);
    if (schedule.shape == ScheduleShape::wsd) table.insert("decay", to_string(schedule.decay));
    if (schedule.shape == ScheduleShape::polynomial) table.insert("power", schedule.power);
    table.insert("clip", s.clip);
    table.insert("weight-decay", weight_decay_of(s));
    if (s.optimizer == "sgd") {
        table.insert("momentum", momentum_of(s));
        table.insert("nesterov", s.nesterov);
    }
    table.insert("seed", s.seed);
    if (s.threads > 0) table.insert("threads", s.threads);
    table.insert("no-verify", s.no_verify);
    table.insert("no-guard", s.no_guard);
    table.insert("restores", s.restores);
    table.insert("noise-every", s.noise_every);
    const std::filesystem::path path = folder / "config.toml";
    std::ofstream file(path);
    file << table << '\n' << std::flush;
    if (!file) refuse(fmt::format("cannot write {}", path.string()));
}

}  // namespace microbatch::cli
