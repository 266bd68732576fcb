#pragma once

#include <functional>
#include <string>
#include <vector>

#include "microbatch/core/spike_guard.h"
#include "microbatch/state/stateful.h"
#include "microbatch/step/gathered.h"

namespace microbatch {

/// Decides between gather and apply whether a batch is applied.
class StepGate : public Stateful {
public:
    /// Decides about the batch. Changes nothing, so a step can be undone without side effects.
    virtual Judgement evaluate(const Gathered& gathered) const = 0;

    /// Called once for every batch, after the decision has been carried out. `judgement` may come from another gate.
    virtual void record(const Gathered&, const Judgement&) {}

    void save(const StateWriter&) const override {}
    Commit prepare(const StateReader&) override {
        return [] {};
    }
};

/// Refuses what cannot be applied: "zero weight", "loss is not finite", "gradient norm is not finite".
class FiniteGate final : public StepGate {
public:
    Judgement evaluate(const Gathered& gathered) const override;
};

/// Refuses spikes and detects when the run has diverged: see SpikeGuard. Batches of weight 0 are not evaluated.
class SpikeGate final : public StepGate {
public:
    explicit SpikeGate(const SpikeGuardOptions& options) : options_(options), guard_(options) {}

    Judgement evaluate(const Gathered& gathered) const override;
    void record(const Gathered& gathered, const Judgement& judgement) override;
    void save(const StateWriter& writer) const override;
    Commit prepare(const StateReader& reader) override;

    /// Forgets the statistics, for example when batches become smaller and noisier.
    void reset() { guard_ = SpikeGuard(options_); }

    const SpikeGuard& guard() const { return guard_; }

private:
    SpikeGuardOptions options_;
    SpikeGuard guard_;
};

/// A user-defined gate: returns why the batch is not to be applied, or an empty text. Called for batches that have
/// weight.
class FunctionGate final : public StepGate {
public:
    explicit FunctionGate(std::function<std::string(const Gathered&)> reason) : reason_(std::move(reason)) {}

    Judgement evaluate(const Gathered& gathered) const override;

private:
    std::function<std::string(const Gathered&)> reason_;
};

/// Several gates, in order: the first that refuses decides, and all record the result.
///
/// State:     that of each gate, in `0/`, `1/` and so on.
class GateChain final : public StepGate {
public:
    /// Ownership: borrows the gates.
    explicit GateChain(std::vector<StepGate*> gates) : gates_(std::move(gates)) {}

    Judgement evaluate(const Gathered& gathered) const override;
    void record(const Gathered& gathered, const Judgement& judgement) override;
    void save(const StateWriter& writer) const override;
    Commit prepare(const StateReader& reader) override;

private:
    std::vector<StepGate*> gates_;
};

}  // namespace microbatch
