#include "cli/options/config.h"

#include <fmt/format.h>

#include <toml++/toml.h>
#include <sstream>

#include "microbatch/io/file_system.h"

namespace microbatch::cli {

RunConfig config_of(const JobPlan& plan, const Plan& cut, Interval length, std::int64_t budget_bytes) {
    return {plan.settings, plan.model, plan.data.train->tokens_per_sample(), cut, length, budget_bytes};
}

std::string config_text(const RunConfig& config) {
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
    table.insert("checkpoint-every", s.checkpoint_every);
    table.insert("keep", s.keep);
    if (!s.keep_every.empty()) table.insert("keep-every", s.keep_every);
    table.insert("no-checkpoints", s.no_checkpoints);
    std::ostringstream text;
    text << table << '\n';
    return text.str();
}

void write_config(const std::filesystem::path& folder, const RunConfig& config) {
    write_whole(folder / "config.toml", config_text(config));
}

}  // namespace microbatch::cli
