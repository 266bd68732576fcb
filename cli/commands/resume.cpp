#include "cli/commands/resume.h"

#include <ATen/Parallel.h>
#include <ATen/Version.h>
#include <fmt/format.h>
#include <fmt/ranges.h>

#include <utility>

#include "cli/options/config.h"
#include "cli/options/refuse.h"
#include "microbatch/core/error.h"
#include "microbatch/core/units.h"
#include "microbatch/io/checkpoint.h"
#include "microbatch/run/recovery.h"

namespace microbatch::cli {
namespace {

void save_files(const StateWriter& writer, const DataListing& listing) {
    writer.put("count", listing.count);
    writer.put("bytes", listing.bytes);
    writer.put("listed", listing.files.size());
    for (std::size_t i = 0; i < listing.files.size(); ++i) {
        const StateWriter file = writer.section(std::to_string(i));
        file.put("name", listing.files[i].name);
        file.put("bytes", listing.files[i].bytes);
        file.put("checksum", listing.files[i].checksum);
    }
}

DataListing files_from(const StateReader& reader) {
    DataListing listing{.files = {}, .count = reader.count("count"), .bytes = reader.seed("bytes")};
    const std::int64_t listed = reader.count("listed", 0, DataListing::most_files);
    for (std::int64_t i = 0; i < listed; ++i) {
        const StateReader file = reader.section(std::to_string(i));
        listing.files.push_back(
            {file.word("name"), file.seed("bytes"), static_cast<std::uint32_t>(file.count("checksum", 0, UINT32_MAX))});
    }
    return listing;
}

Differences compare(const RunNotes& before, const RunNotes& now) {
    const Values was = config_values(before.config, "the checkpoint's configuration");
    const Values is = config_values(now.config, "config.toml");
    Differences found = differences(was, is);
    if (before.data != now.data) {
        const std::string &old = value_in(was, "data"), &given = value_in(is, "data");
        const std::string how = describe_difference(before.files, now.files);
        const std::string what = old == given ? fmt::format("the data of {} has changed", given)
                                              : fmt::format("the data was {}, is {}", old, given);
        found.another_run.push_back(how.empty() ? what : fmt::format("{}: {}", what, how));
    }
    const auto machine = [&](const char* what, const auto& old, const auto& given) {
        if (old != given) found.another_cut.push_back(fmt::format("{} was {}, is {}", what, old, given));
    };
    machine("threads", before.threads, now.threads);
    machine("the processor type", before.processor, now.processor);
    machine("the microbatch version", before.version, now.version);
    return found;
}

// Keeps the recorded plan if the setting is auto and the budget is the same.
void keep_cut(Settings& settings, const Values& was, const Values& given) {
    const auto budget = was.find("memory");
    const bool same_budget =
        budget != was.end() && !settings.memory.empty() && memory_budget_of(settings) == parse_bytes(budget->second);
    for (const char* name : {"micro-batch", "recompute", "batch-norm"}) {
        if (given.contains(name) && given.at(name) != "auto") continue;
        // Another norm has no use for the policy of the last one.
        const bool other_norm =
            std::string_view(name) == "batch-norm" && (given.contains("norm") || given.contains("model"));
        const bool keeps = same_budget && was.contains(name) && !other_norm;
        read(*find_option(name), keeps ? was.at(name) : "auto", settings);
    }
}

void refuse_another_run(const std::vector<std::string>& differences, std::int64_t steps, const Settings& settings) {
    if (differences.empty() || settings.resume_changed) return;
    refuse(
        "--resume: the checkpoint of step {} is from a different run: {}; restore these settings, name another --run, "
        "or "
        "continue anyway with --resume-changed",
        steps, fmt::join(differences, "; "));
}

std::int64_t steps_of(const StateDict& state) {
    return manifest_of(state).progress.steps;
}

std::string value_of(const RunNotes& notes, const std::string& key) {
    return value_in(config_values(notes.config, "the configuration"), key);
}

void set_numbers(StateDict& state, const std::vector<const char*>& names, const StateScalar& value) {
    for (const char* name : names) state.set(name, value);
}

// Statistics and partial work do not apply to a different run.
void begin_anew(StateDict& state) {
    drop_partial_batch(state);
    for (const char* section : {"gate/", "recovery/0/gate/", "recovery/1/gate/"}) state.erase(section);
    set_numbers(state, {"noise/weight", "noise/variance", "noise/squared_gradient"}, 0.0);
}

void begin_optimizer_anew(StateDict& state) {
    for (const char* section : {"optimizer/", "recovery/0/", "recovery/1/"}) state.erase(section);
    if (state.has("recovery/")) state.set("recovery/points", std::int64_t{0});
}

void begin_data_anew(StateDict& state, std::int64_t dataset_size) {
    const std::int64_t epoch = StateReader(state).section("data").count("epoch");
    state.set("data/epoch", epoch < INT64_MAX ? epoch + 1 : epoch);
    state.set("data/position", std::int64_t{0});
    state.set("data/size", dataset_size);
}

// Why a state does not match; empty if it does.
template <class Prepare>
std::string misfit_of(Prepare prepare) {
    try {
        prepare();
        return {};
    } catch (const Error& error) {
        return error.what();
    }
}

void require_fit(const std::string& misfit, const StateDict& state) {
    if (misfit.empty()) return;
    throw Error(ErrorKind::bad_data, fmt::format("the checkpoint of step {}: {}", steps_of(state), misfit));
}

}  // namespace

StateDict RunNotes::save() const {
    StateDict state;
    const StateWriter writer(state);
    writer.put("config", config);
    writer.put("threads", threads);
    writer.put("processor", processor);
    writer.put("version", version);
    writer.put("data", data);
    save_files(writer.section("files"), files);
    return state;
}

RunNotes RunNotes::from(const StateDict& state) {
    const StateReader reader = StateReader(state).section("notes");
    if (!reader.has("config")) {
        throw Error(ErrorKind::bad_data,
                    "the run was not started by the command: resume it where it was started, such as in Python with "
                    "mb.Trainer(run=..., resume=True)");
    }
    return {.config = reader.word("config"),
            .threads = static_cast<int>(reader.count("threads", 1, 1 << 20)),
            .processor = reader.word("processor"),
            .version = reader.word("version"),
            .data = static_cast<std::uint32_t>(reader.count("data", 0, UINT32_MAX)),
            .files = files_from(reader.section("files"))};
}

RunNotes RunNotes::of_machine() {
    return {.threads = at::get_num_threads(), .processor = at::get_cpu_capability(), .version = MICROBATCH_VERSION};
}

void fill_from_checkpoint(Arguments& arguments, RunFolder& folder) {
    Settings& settings = arguments.settings;
    const RunNotes notes = RunNotes::from(*folder.state());
    const Values given = arguments.given;
    const std::int64_t steps = steps_of(*folder.state());
    const std::string source = fmt::format("the configuration of the checkpoint of step {}", steps);
    const Values was = config_values(notes.config, source), now = overridden(was, given);
    const std::set<std::string> without = outdated(was, now);
    // The settings are still those of the newest checkpoint, which the user wants to change.
    if (!manifest_of(*folder.state()).healthy && !differences(was, now).noted.empty()) folder.use_healthy();
    // With a different model, its data or an option would be refused before all differences are known.
    if (value_in(was, "model") != value_in(now, "model"))
        refuse_another_run(differences(was, now).another_run, steps, settings);
    try {
        apply_config(arguments, notes.config, source, without);
    } catch (const Error& error) {
        throw Error(ErrorKind::bad_data, error.what());
    }
    keep_cut(settings, without.contains("micro-batch") ? Values() : was, given);
}

void require_same_run(const StateDict& state, const RunNotes& now, const Settings& settings) {
    refuse_another_run(compare(RunNotes::from(state), now).another_run, steps_of(state), settings);
}

Changes reconcile(StateDict& state, const RunNotes& now, const Settings& settings, std::int64_t dataset_size,
                  Accumulator& accumulator) {
    const RunNotes before = RunNotes::from(state);
    const Differences found = compare(before, now);
    refuse_another_run(found.another_run, steps_of(state), settings);
    if (!found.another_run.empty()) {
        begin_anew(state);
        state.set("data/seed", settings.seed);
        if (StateReader(state).section("data").count("size") != dataset_size) begin_data_anew(state, dataset_size);
    }
    if (!found.another_cut.empty()) {
        forget_caps(state);
    }
    const std::string misfit =
        misfit_of([&] { accumulator.optimizer().prepare(StateReader(state).section("optimizer")); });
    if (found.another_run.empty() && found.noted.empty()) require_fit(misfit, state);
    std::vector<std::string> lines;
    if (!misfit.empty() || value_of(before, "optimizer") != value_of(now, "optimizer")) {
        begin_optimizer_anew(state);
        lines.emplace_back("the optimizer starts with new state, and there is no snapshot to roll back to yet");
    }
    require_fit(misfit_of([&] { prepare_snapshot(accumulator, StateReader(state)); }), state);  // before it writes
    for (const std::string& line : found.another_run) lines.push_back(line + ": a different run from here on");
    for (const std::string& line : found.another_cut)
        lines.push_back(line + ": the batches stay the same, but bits may differ");
    for (const std::string& line : found.noted) lines.push_back(line);
    return {std::move(lines), !found.another_run.empty() || !found.noted.empty()};
}

}  // namespace microbatch::cli
