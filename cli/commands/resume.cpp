#include "cli/commands/resume.h"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <map>
#include <utility>

#include "cli/options/config_file.h"
#include "cli/options/refuse.h"
#include "microbatch/core/error.h"
#include "microbatch/core/str_cat.h"
#include "microbatch/core/units.h"
#include "microbatch/io/checkpoint_store.h"

namespace microbatch::cli {
namespace {

using Values = std::map<std::string, std::string>;

// Another one is another run.
const std::vector<std::string> identity = {"model",   "layers", "heads",          "width",     "length", "norm",
                                           "dropout", "batch",  "batch-schedule", "optimizer", "seed"};
// Of a model: they say nothing of another one.
const std::vector<std::string> sizes = {"layers", "heads", "width", "length", "norm", "dropout"};
// Others keep the batch and its update, but not every bit.
const std::vector<std::string> how_it_is_run = {"micro-batch", "recompute", "memory"};
// Of no meaning for what is trained; data is told by its content, threads by their number.
const std::vector<std::string> of_no_matter = {"data", "threads",    "no-verify",     "checkpoint-every",
                                               "keep", "keep-every", "no-checkpoints"};

bool is_in(const std::vector<std::string>& keys, const std::string& key) {
    return std::find(keys.begin(), keys.end(), key) != keys.end();
}

const std::string& value_in(const Values& values, const std::string& key) {
    static const std::string none = "not given";
    const auto found = values.find(key);
    return found == values.end() ? none : found->second;
}

struct Differences {
    std::vector<std::string> identity, cut, others;
};

Differences compare(const RunNotes& before, const RunNotes& now) {
    const Values was = config_values(before.config, "the checkpoint's configuration");
    const Values is = config_values(now.config, "config.toml");
    Values all = was;
    all.insert(is.begin(), is.end());
    Differences differences;
    for (const auto& [key, ignored] : all) {
        const std::string &old = value_in(was, key), &given = value_in(is, key);
        if (old == given || is_in(of_no_matter, key)) continue;
        const std::string line = fmt::format("{} was {}, is {}", key, old, given);
        (is_in(identity, key)        ? differences.identity
         : is_in(how_it_is_run, key) ? differences.cut
                                     : differences.others)
            .push_back(line);
    }
    if (before.data != now.data) {
        differences.identity.push_back(
            fmt::format("the data was that of {}, is that of {}", value_in(was, "data"), value_in(is, "data")));
    }
    const auto machine = [&](const char* what, const auto& old, const auto& given) {
        if (old != given) differences.cut.push_back(fmt::format("{} was {}, is {}", what, old, given));
    };
    machine("threads", before.threads, now.threads);
    machine("the processor's kind", before.processor, now.processor);
    machine("the version of microbatch", before.version, now.version);
    return differences;
}

std::string with_note(const std::string& line, const char* note) {
    return line + note;
}

// The recorded cut, where auto was asked for and the budget is what it was.
void keep_cut(Settings& settings, const Values& was, bool micro_batch_given, bool recompute_given) {
    const auto budget = was.find("memory");
    const bool same_budget =
        budget != was.end() && settings.memory && parse_bytes(*settings.memory) == parse_bytes(budget->second);
    const auto decide = [&](std::string& setting, const char* key, bool given) {
        if (given && setting != "auto") return;
        const auto found = was.find(key);
        setting = same_budget && found != was.end() ? found->second : "auto";
    };
    decide(settings.micro_batch, "micro-batch", micro_batch_given);
    decide(settings.recompute, "recompute", recompute_given);
}

void refuse_another_run(const std::vector<std::string>& differences, std::int64_t steps, const Settings& settings) {
    if (differences.empty() || settings.resume_changed) return;
    refuse(fmt::format(
        "--resume: this is not the run of the checkpoint of step {}: {}; give what it was, name another --run, "
        "or go on all the same with --resume-changed",
        steps, fmt::join(differences, "; ")));
}

// "1k" is 1000.
bool is_same(const std::string& one, const std::string& other) {
    if (one == other) return true;
    try {
        return parse_count(one) == parse_count(other);
    } catch (const Error&) {
        return false;
    }
}

// Of flags that were given, before what was recorded is mixed with them. The sizes of one model say nothing of another.
std::vector<std::string> differences_of_flags(const CLI::App& command, const Values& was) {
    std::vector<std::string> differences;
    for (const std::string& key : identity) {
        const CLI::Option* option = command.get_option("--" + key);
        if (option->count() == 0 || is_same(option->results().back(), value_in(was, key))) continue;
        differences.push_back(fmt::format("{} was {}, is {}", key, value_in(was, key), option->results().back()));
    }
    return differences;
}

// Keys of the configuration that mean something only beside the value that another key had.
std::vector<std::string> outdated(const CLI::App& command, const Values& was) {
    std::vector<std::string> keys;
    const auto given = [&](const char* flag) -> const std::string* {
        const CLI::Option* option = command.get_option(std::string("--") + flag);
        if (option->count() == 0 || is_same(option->results().back(), value_in(was, flag))) return nullptr;
        return &option->results().back();
    };
    const auto leave_out = [&keys](const std::vector<std::string>& more) {
        keys.insert(keys.end(), more.begin(), more.end());
    };
    if (given("model")) leave_out(sizes);
    if (const std::string* shape = given("schedule")) {
        if (*shape == "constant") leave_out({"final-lr"});
        if (*shape != "wsd") leave_out({"decay"});
        if (*shape != "polynomial") leave_out({"power"});
    }
    if (given("optimizer")) leave_out({"lr", "weight-decay", "momentum", "nesterov"});
    if (given("batch")) leave_out({"batch-schedule", "micro-batch", "recompute"});
    if (given("batch-schedule")) leave_out({"batch", "micro-batch", "recompute"});
    return keys;
}

std::string value_of(const RunNotes& notes, const std::string& key) {
    return value_in(config_values(notes.config, "the configuration"), key);
}

// What was usual, and what is half done, says nothing of another run.
void begin_anew(TrainerState& state) {
    drop_open_batch(state);
    state.guard.reset();
    state.noise = {};
    if (!state.recovery) return;
    for (RecoveryState::Point& point : state.recovery->points) point.guard = SpikeGuard().state();
}

void begin_optimizer_anew(TrainerState& state) {
    state.optimizer.clear();
    std::fill(state.optimizer_counts.begin(), state.optimizer_counts.end(), std::size_t{0});
    if (state.recovery) state.recovery->points.clear();
}

// Why the optimizer does not take its state; empty if it does.
std::string misfit_of(const TrainerState& state, const Optimizer& optimizer) {
    try {
        optimizer.require_state(
            lists_of(state.optimizer_counts, state.optimizer, [](const StoredTensor& one) { return one.shape; }));
        return {};
    } catch (const Error& error) {
        return error.what();
    }
}

void reset_data(TrainerState& state, std::int64_t dataset_size) {
    if (state.sampler.epoch < INT64_MAX) state.sampler.epoch += 1;
    state.sampler.position = 0;
    state.dataset_size = dataset_size;
}

}  // namespace

std::filesystem::path checkpoints_of(const std::filesystem::path& run) {
    return run / "checkpoints";
}

std::optional<ResumePoint> find_resume_point(CLI::App& command, Settings& settings) {
    if (settings.run.empty()) refuse("--resume needs --run: the folder of the run that is to go on");
    CheckpointStore store(checkpoints_of(settings.run));
    std::optional<Checkpoint> newest = store.newest();
    if (!newest) return std::nullopt;
    RunNotes notes = run_notes_from(newest->notes, store.folder().string());
    const std::string source =
        fmt::format("the configuration of the checkpoint of step {}", newest->trainer.progress.steps);
    const Values was = config_values(notes.config, source);
    const bool micro_batch_given = command.get_option("--micro-batch")->count() > 0;
    const bool recompute_given = command.get_option("--recompute")->count() > 0;
    const CLI::Option* model = command.get_option("--model");
    const bool same_model = model->count() == 0 || model->results().back() == value_in(was, "model");
    // Of another kind of model the data, or a flag, would be refused before all differences are known.
    if (!same_model) refuse_another_run(differences_of_flags(command, was), newest->trainer.progress.steps, settings);
    const std::vector<std::string> without = outdated(command, was);
    try {
        apply_config(command, notes.config, source, without);
    } catch (const Error& error) {
        throw Error(ErrorKind::bad_data, error.what());
    }
    const bool same_batch = !is_in(without, "micro-batch");
    keep_cut(settings, same_batch ? was : Values(), micro_batch_given, recompute_given);
    return ResumePoint{std::move(*newest), std::move(notes), store.warnings(), store.damaged()};
}

void require_same_run(const ResumePoint& point, const RunNotes& now, const Settings& settings) {
    refuse_another_run(compare(point.notes, now).identity, point.steps(), settings);
}

void require_same_weights(const ResumePoint& point, const Parameters& weights_of_model) {
    const TrainerState& state = point.checkpoint.trainer;
    std::map<std::string, at::Tensor> weights;
    for (const StoredTensors* list : {&state.parameters, &state.buffers}) {
        for (const StoredTensor& one : *list) weights.emplace(one.name, one.shape);
    }
    for (const Parameter& one : weights_of_model) {
        const auto found = weights.find(one.name);
        if (found == weights.end()) {
            throw Error(ErrorKind::bad_data, fmt::format("the checkpoint of step {} has no {}: it is of another model",
                                                         point.steps(), one.name));
        }
        if (found->second.sizes() == one.tensor.sizes()) continue;
        throw Error(ErrorKind::bad_data,
                    str_cat("parameter ", one.name, " is of shape ", found->second.sizes(),
                            " in the checkpoint of step ", point.steps(), ", in this model of ", one.tensor.sizes()));
    }
    for (const Parameter& one : weights_of_model) weights.erase(one.name);
    if (weights.empty()) return;
    throw Error(ErrorKind::bad_data, fmt::format("the checkpoint of step {} has {}, which this model has not: it is of "
                                                 "another model",
                                                 point.steps(), weights.begin()->first));
}

std::vector<std::string> reconcile(ResumePoint& point, const RunNotes& now, const Settings& settings,
                                   std::int64_t dataset_size, const Optimizer& optimizer) {
    const Differences found = compare(point.notes, now);
    refuse_another_run(found.identity, point.steps(), settings);
    TrainerState& state = point.checkpoint.trainer;
    if (!found.identity.empty()) {
        begin_anew(state);
        state.sampler.seed = static_cast<std::uint64_t>(settings.seed);
        if (state.dataset_size != dataset_size) reset_data(state, dataset_size);
    }
    if (!found.cut.empty()) state.limits.clear();
    const std::string misfit = misfit_of(state, optimizer);
    if (!misfit.empty() && found.identity.empty() && found.others.empty()) {
        throw Error(ErrorKind::bad_data, fmt::format("the checkpoint of step {}: {}", point.steps(), misfit));
    }
    const bool another = value_of(point.notes, "optimizer") != value_of(now, "optimizer");
    std::vector<std::string> lines;
    if (another || !misfit.empty()) {
        begin_optimizer_anew(state);
        lines.emplace_back("the optimizer's state is begun anew, and there is nothing to go back to yet");
    }
    for (const std::string& line : found.identity) lines.push_back(with_note(line, ": another run from here on"));
    for (const std::string& line : found.cut) lines.push_back(with_note(line, ": the same batch; bits may differ"));
    for (const std::string& line : found.others) lines.push_back(line);
    return lines;
}

}  // namespace microbatch::cli
