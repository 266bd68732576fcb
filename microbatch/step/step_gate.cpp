#include "microbatch/step/step_gate.h"

#include <cmath>
#include <utility>

#include "microbatch/core/error.h"

namespace microbatch {

Judgement FiniteGate::evaluate(const Gathered& gathered) const {
    if (gathered.weight == 0.0) return {Verdict::refuse, "zero weight"};
    if (!std::isfinite(gathered.loss_sum)) return {Verdict::refuse, "loss is not finite"};
    if (!std::isfinite(gathered.gradient_norm)) return {Verdict::refuse, "gradient norm is not finite"};
    return {};
}

Judgement SpikeGate::evaluate(const Gathered& gathered) const {
    if (gathered.weight == 0.0) return {};
    return guard_.evaluate(gathered.loss(), gathered.gradient_norm);
}

void SpikeGate::record(const Gathered& gathered, const Judgement& judgement) {
    if (gathered.weight > 0.0) {
        guard_.record(gathered.loss(), gathered.gradient_norm, judgement.verdict == Verdict::apply);
    }
}

void SpikeGate::save(const StateWriter& writer) const {
    const SpikeGuardState& state = guard_.state();
    std::vector<double> losses, norms;
    for (const auto& [loss, norm] : state.accepted) {
        losses.push_back(loss);
        norms.push_back(norm);
    }
    writer.put("losses", std::move(losses));
    writer.put("gradient_norms", std::move(norms));
    writer.put("refused_in_a_row", state.refused_in_a_row);
    writer.put("scale", state.scale);
    if (!state.bounds) return;
    writer.put("bound_diverged", state.bounds->diverged);
    writer.put("bound_calm", state.bounds->calm);
}

Commit SpikeGate::prepare(const StateReader& reader) {
    const std::vector<double> losses = reader.numbers("losses"), norms = reader.numbers("gradient_norms");
    if (losses.size() != norms.size()) reader.refuse("losses", "the numbers of losses and gradient norms differ");
    SpikeGuardState state{.refused_in_a_row = reader.count("refused_in_a_row"), .scale = reader.number("scale")};
    if (reader.has("bound_diverged")) state.bounds = {reader.number("bound_diverged"), reader.number("bound_calm")};
    for (std::size_t i = 0; i < losses.size(); ++i) state.accepted.push_back({losses[i], norms[i]});
    SpikeGuard restored(options_);
    try {
        restored.restore(std::move(state));
    } catch (const Error& error) {
        throw Error(ErrorKind::bad_data, error.what());
    }
    return [this, restored] { guard_ = restored; };
}

Judgement FunctionGate::evaluate(const Gathered& gathered) const {
    std::string reason = gathered.weight > 0.0 ? reason_(gathered) : std::string();
    return {reason.empty() ? Verdict::apply : Verdict::refuse, std::move(reason)};
}

Judgement GateChain::evaluate(const Gathered& gathered) const {
    for (const StepGate* gate : gates_) {
        Judgement judgement = gate->evaluate(gathered);
        if (judgement.verdict != Verdict::apply) return judgement;
    }
    return {};
}

void GateChain::record(const Gathered& gathered, const Judgement& judgement) {
    for (StepGate* gate : gates_) gate->record(gathered, judgement);
}

void GateChain::save(const StateWriter& writer) const {
    for (std::size_t i = 0; i < gates_.size(); ++i) gates_[i]->save(writer.section(std::to_string(i)));
}

Commit GateChain::prepare(const StateReader& reader) {
    std::vector<Commit> commits;
    for (std::size_t i = 0; i < gates_.size(); ++i) {
        commits.push_back(gates_[i]->prepare(reader.section(std::to_string(i))));
    }
    return [commits = std::move(commits)] {
        for (const Commit& commit : commits) commit();
    };
}

}  // namespace microbatch
