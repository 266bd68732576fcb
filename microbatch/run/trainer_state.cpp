// A trainer's state, saved and loaded.

#include <set>
#include <unordered_map>
#include <utility>

#include "microbatch/core/error.h"
#include "microbatch/model/forward_state.h"
#include "microbatch/run/trainer.h"

namespace microbatch {
namespace {

void save_partial(const PartialBatch& partial, const Parameters& parameters, double seconds,
                  const StateWriter& writer) {
    const Gathered& so_far = partial.so_far;
    writer.put("samples", partial.samples);
    writer.put("fingerprint", std::int64_t{partial.fingerprint});
    writer.put("loss_sum", so_far.loss_sum);
    writer.put("weight", so_far.weight);
    writer.put("micro_batches", so_far.micro_batches);
    writer.put("noise_count", so_far.parts.count);
    writer.put("noise_weight", so_far.parts.weight);
    writer.put("noise_squares", so_far.parts.squares);
    writer.put("measure_noise", partial.measure_noise);
    writer.put("micro_batch", partial.plan.micro_batch);
    writer.put("recompute", partial.plan.recompute);
    writer.put("out_of_memory", partial.out_of_memory);
    writer.put("seconds", seconds);
    std::unordered_map<const void*, std::string> names;
    for (const Parameter& one : parameters) names.emplace(one.tensor.unsafeGetTensorImpl(), one.name);
    for (const GradientView& view : so_far.sums) {
        writer.section("gradient").put(names.at(view.parameter.unsafeGetTensorImpl()), view.sum);
    }
    writer.section("before").merge(partial.before);
    writer.section("batch_norm").merge(partial.batch_norm);
}

// Without its tensors.
PartialBatch partial_from(const StateReader& reader) {
    PartialBatch partial;
    Gathered& so_far = partial.so_far;
    partial.samples = reader.count("samples", 1);
    partial.fingerprint = static_cast<std::uint32_t>(reader.count("fingerprint", 0, UINT32_MAX));
    so_far.loss_sum = reader.number("loss_sum");
    so_far.weight = reader.positive("weight");
    so_far.micro_batches = reader.count("micro_batches", 1, partial.samples);
    so_far.parts.count = reader.count("noise_count", 0, so_far.micro_batches);
    so_far.parts.weight = reader.number("noise_weight");
    so_far.parts.squares = reader.number("noise_squares");
    partial.measure_noise = reader.flag("measure_noise");
    partial.plan = {.micro_batch = reader.count("micro_batch", 1), .recompute = reader.flag("recompute")};
    so_far.plan = partial.plan;
    partial.out_of_memory = reader.count("out_of_memory", 0, INT32_MAX);
    return partial;
}

void load_partial(const StateReader& reader, const Parameters& parameters, PartialBatch& partial) {
    for (const Parameter& parameter : parameters) {
        if (!reader.section("gradient").has(parameter.name)) continue;
        const at::Tensor sum = reader.section("gradient").tensor(parameter.name).get_own();
        partial.so_far.sums.push_back({parameter.tensor, sum.to(parameter.tensor.device())});
    }
    partial.before = reader.section("before").copy();
    partial.before.own();
    partial.batch_norm = reader.section("batch_norm").copy();
    partial.batch_norm.own();
}

// The names of the generators of devices other than the CPU.
std::set<std::string> accelerators_in(const StateDict& state) {
    std::set<std::string> names;
    for (const auto& [name, tensor] : state.tensors()) {
        if (name.starts_with("rng/") && name != "rng/cpu" && !name.starts_with("rng/foreign/")) names.insert(name);
    }
    return names;
}

// Reports an invalid value with the message of the check that found it.
void as_bad_data(const std::function<void()>& call) {
    try {
        call();
    } catch (const Error& error) {
        throw Error(ErrorKind::bad_data, error.what());
    }
}

}  // namespace

void drop_partial_batch(StateDict& run) {
    run.move("batch/before/model/", "model/");
    run.move("batch/before/rng/", "rng/");
    run.erase("batch/");
}

void move_to_devices_of(const Model& model, StateDict& run) {
    StateDict here;
    save_generators(model, StateWriter(here, "rng/"));
    const std::set<std::string> saved = accelerators_in(run), needed = accelerators_in(here);
    if (saved == needed) return;
    drop_partial_batch(run);
    for (const std::string& name : saved) run.erase(name);
    for (const std::string& name : needed) run.put(name, here.tensors().at(name));
}

bool Trainer::is_healthy() const {
    return (!gate_ || gate_->guard().refused_in_a_row() == 0) &&
           (!recovery_ || !recovery_->is_recovering(at_.progress.steps));
}

void Trainer::require_first_buffers(const StateReader& buffers) const {
    try {
        prepare_tensors(buffers, first_buffers_, "buffer");
    } catch (const Error& error) {
        throw Error(ErrorKind::usage, "the saved state could not be loaded again: ", error.what(),
                    "; a buffer must keep the shape that it had when the trainer was created");
    }
}

void Trainer::save(const StateWriter& writer) const {
    accumulator_.require_whole_update();
    StateDict buffers;
    StateWriter(buffers).put(accumulator_.model().buffers());
    require_first_buffers(StateReader(buffers));
    if (partial_) require_first_buffers(StateReader(partial_->before).section("model"));
    const StateWriter data = writer.section("data"), run = writer.section("run"), noise = writer.section("noise");
    data.put("steps", at_.progress.steps);
    data.put("samples", at_.progress.samples);
    data.put("tokens", at_.progress.tokens);
    data.put("size", dataset_.size());
    data.put("seed", at_.sampler.state().seed);
    data.put("epoch", at_.sampler.state().epoch);
    data.put("position", at_.sampler.state().position);
    data.put("healthy", is_healthy());
    if (options_.data_state != nullptr) options_.data_state->save(data.section("own"));
    run.put("learning_rate", accumulator_.optimizer().learning_rate());
    run.put("own_rate", at_.own_rate);
    run.put("last_batch", at_.last_batch);
    run.put("shrunk_at", at_.shrunk_at);
    noise.put("weight", at_.noise.state().weight);
    noise.put("variance", at_.noise.state().sum.variance);
    noise.put("squared_gradient", at_.noise.state().sum.squared_gradient);
    writer.merge(training_snapshot(accumulator_));
    save_generators(accumulator_.model(), writer.section("rng"));
    accumulator_.caps().save(writer.section("caps"));
    accumulator_.save_ranges(writer.section("ranges"));
    if (gate_) gate_->save(writer.section("gate"));
    if (recovery_) recovery_->save(writer.section("recovery"));
    if (partial_) save_partial(*partial_, accumulator_.parameters(), at_.partial_seconds, writer.section("batch"));
}

Commit Trainer::prepare(const StateReader& reader) {
    accumulator_.require_idle();
    const StateReader data = reader.section("data"), run = reader.section("run"), noise = reader.section("noise");
    const StateReader batch = reader.section("batch"), recovery = reader.section("recovery");
    Position next = at_;
    next.partial_seconds = 0.0;
    next.progress = {data.count("steps"), data.count("samples"), data.count("tokens")};
    if (data.count("size") != dataset_.size()) {
        throw Error(ErrorKind::bad_data, "it is from a run over ", data.count("size"), " samples, but the data has ",
                    dataset_.size());
    }
    as_bad_data([&] {
        next.sampler.restore({data.seed("seed"), data.count("epoch"), data.count("position")});
        next.noise.restore({noise.number("weight"), {noise.number("variance"), noise.number("squared_gradient")}});
    });
    next.own_rate = run.positive("own_rate");
    next.last_batch = run.count("last_batch");
    next.shrunk_at = run.count("shrunk_at");
    const double rate = run.positive("learning_rate");
    std::vector<Commit> commits{
        prepare_snapshot(accumulator_, reader), prepare_generators(accumulator_.model(), reader.section("rng")),
        accumulator_.caps().prepare(reader.section("caps")), accumulator_.prepare_ranges(reader.section("ranges"))};
    if (options_.data_state != nullptr) commits.push_back(options_.data_state->prepare(data.section("own")));
    const std::int64_t steps = next.progress.steps;
    if (gate_ && reader.section("gate").exists()) {
        reader.section("gate").count("refused_in_a_row", 0, steps);
        commits.push_back(gate_->prepare(reader.section("gate")));
    }
    if (recovery_ && recovery.exists()) {
        recovery.count("times", 0, steps);
        recovery.count("rolled_back_at", 0, steps);
        const std::int64_t points = recovery.count("points");
        for (std::int64_t i = 0; i < points; ++i) {
            const StateReader point = recovery.section(std::to_string(i));
            point.count("steps", 0, steps);
            if (point.section("gate").exists()) point.section("gate").count("refused_in_a_row", 0, steps);
        }
        commits.push_back(recovery_->prepare(recovery));
    }
    std::optional<PartialBatch> partial;
    if (batch.exists()) {
        partial = partial_from(batch);
        next.partial_seconds = batch.positive("seconds");
        prepare_tensors(batch.section("gradient"), accumulator_.parameters(), "gradient of", Fit::partial);
        prepare_forward_state(accumulator_.model(), batch.section("before"));
    }
    return [this, next, rate, batch, partial = std::move(partial), commits = std::move(commits)]() mutable {
        for (const Commit& commit : commits) commit();
        if (partial) load_partial(batch, accumulator_.parameters(), *partial);
        accumulator_.optimizer().set_learning_rate(rate);
        partial_ = std::move(partial);
        at_ = next;
        partial_warning_.clear();
    };
}

}  // namespace microbatch
