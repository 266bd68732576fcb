#include "cli/config.h"

#include <fmt/format.h>

#include <toml++/toml.h>
#include <algorithm>
#include <fstream>
#include <vector>

#include "cli/nearest.h"
#include "microbatch/core/error.h"

namespace microbatch::cli {
namespace {

const std::vector<std::string> length_flags = {"steps", "samples", "tokens"};

[[noreturn]] void refuse(const std::string& message) {
    throw Error(ErrorKind::usage, message);
}

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

void apply_key(CLI::App& command, const std::string& file, const std::string& key, const toml::node& node) {
    const std::vector<std::string> names = flag_names(command);
    if (std::find(names.begin(), names.end(), key) == names.end()) {
        const std::string suggestion = nearest(key, names);
        refuse(fmt::format("{} line {}: the key '{}' does not exist{}", file, node.source().begin.line, key,
                           suggestion.empty() ? "; run with --help for those that do"
                                              : fmt::format("; did you mean '{}'?", suggestion)));
    }
    CLI::Option* option = command.get_option("--" + key);
    if (option->count() > 0) return;
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
    if (!stream || stream.peek() == std::ifstream::traits_type::eof()) {
        refuse(fmt::format("--config: {} is missing, empty or cannot be read", file));
    }
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

void write_config(const std::filesystem::path& folder, const JobPlan& plan, std::int64_t micro_batch, Interval length,
                  std::int64_t budget_bytes) {
    const Settings& s = plan.settings;
    toml::table table;
    table.insert("data", std::filesystem::absolute(s.data).string());
    table.insert("model", plan.model);
    if (s.layers) table.insert("layers", *s.layers);
    if (s.heads) table.insert("heads", *s.heads);
    if (s.width) table.insert("width", *s.width);
    if (s.length > 0) table.insert("length", s.length);
    if (!s.norm.empty()) table.insert("norm", s.norm);
    if (s.dropout > 0.0) table.insert("dropout", s.dropout);
    table.insert("batch", s.batch);
    table.insert("micro-batch", micro_batch);
    table.insert("memory", fmt::format("{}B", budget_bytes));
    table.insert(to_string(length.unit), length.count);
    const Schedule schedule = schedule_of(s, length, plan.data.train->tokens_per_sample());
    table.insert("optimizer", s.optimizer);
    table.insert("lr", schedule.peak);
    table.insert("final-lr", schedule.floor);
    table.insert("schedule", s.schedule);
    table.insert("warmup", s.warmup);
    if (schedule.shape == ScheduleShape::wsd) table.insert("decay", to_string(schedule.decay));
    if (schedule.shape == ScheduleShape::polynomial) table.insert("power", s.power);
    table.insert("clip", s.clip);
    table.insert("weight-decay", weight_decay_of(s));
    if (s.optimizer == "sgd") {
        table.insert("momentum", s.momentum);
        table.insert("nesterov", s.nesterov);
    }
    table.insert("seed", s.seed);
    table.insert("threads", s.threads);
    table.insert("no-verify", s.no_verify);
    const std::filesystem::path path = folder / "config.toml";
    std::ofstream file(path);
    file << table << '\n' << std::flush;
    if (!file) refuse(fmt::format("cannot write {}", path.string()));
}

}  // namespace microbatch::cli
