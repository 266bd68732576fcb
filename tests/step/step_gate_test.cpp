// The decision between gather and apply, and what the gate learns from it.
#include "microbatch/step/step_gate.h"

#include <ATen/ATen.h>
#include <c10/util/Exception.h>
#include <gtest/gtest.h>

#include <limits>
#include <span>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "microbatch/io/state_json.h"
#include "microbatch/memory/budget_allocator.h"
#include "support/device_memory.h"
#include "support/errors.h"
#include "support/gradients.h"
#include "support/jobs.h"
#include "support/one_thread.h"
#include "support/states.h"

namespace microbatch {
namespace {

using namespace test;

constexpr double nan_value = std::numeric_limits<double>::quiet_NaN();
constexpr double infinity = std::numeric_limits<double>::infinity();

Gathered gathered(double loss, double norm, double weight = 1.0) {
    return {.loss_sum = loss * weight, .weight = weight, .gradient_norm = norm};
}

TEST(FiniteGate, RefusesWhatCannotBeApplied) {
    const FiniteGate gate;
    EXPECT_EQ(gate.evaluate(gathered(1, 1)).verdict, Verdict::apply);
    EXPECT_EQ(gate.evaluate(gathered(1, 1)).reason, "");
    EXPECT_EQ(gate.evaluate(gathered(0, 0, 0)).reason, "zero weight");
    EXPECT_EQ(gate.evaluate(gathered(-1e300, 1e300)).verdict, Verdict::apply);
    for (const double bad : {nan_value, infinity, -infinity}) {
        EXPECT_EQ(gate.evaluate(gathered(bad, 1)).reason, "loss is not finite");
        EXPECT_EQ(gate.evaluate(gathered(1, bad)).reason, "gradient norm is not finite");
        EXPECT_EQ(gate.evaluate(gathered(1, bad)).verdict, Verdict::refuse);
    }
}

TEST(FunctionGate, AsksOnlyOfBatchesThatHaveWeight) {
    int asked = 0;
    const FunctionGate gate([&](const Gathered& batch) {
        ++asked;
        return batch.loss() > 3.0 ? std::string("too high") : std::string();
    });
    EXPECT_EQ(gate.evaluate(gathered(3, 1)).verdict, Verdict::apply);
    EXPECT_EQ(gate.evaluate(gathered(4, 1)).verdict, Verdict::refuse);
    EXPECT_EQ(gate.evaluate(gathered(4, 1)).reason, "too high");
    EXPECT_EQ(asked, 3);
    EXPECT_EQ(gate.evaluate(gathered(4, 1, 0)).verdict, Verdict::apply);
    EXPECT_EQ(asked, 3);
}

const SpikeGuardOptions quick{.window = 6, .least = 4, .most_refused = 2};

/// Evaluates a step and records what was decided, as a step does.
Judgement decide(StepGate& gate, const Gathered& batch) {
    Judgement judgement = gate.evaluate(batch);
    gate.record(batch, judgement);
    return judgement;
}

SpikeGate calm_gate() {
    SpikeGate gate(quick);
    for (const double loss : {2.0, 1.9, 1.8, 1.7, 1.6}) {
        EXPECT_EQ(decide(gate, gathered(loss, 1.0)).verdict, Verdict::apply);
    }
    return gate;
}

TEST(SpikeGate, RefusesASpikeAndTellsADivergence) {
    SpikeGate gate = calm_gate();
    EXPECT_EQ(decide(gate, gathered(100, 1)).verdict, Verdict::refuse);
    EXPECT_EQ(decide(gate, gathered(1, nan_value)).verdict, Verdict::refuse);
    const Judgement last = decide(gate, gathered(100, 1));
    EXPECT_EQ(last.verdict, Verdict::diverged);
    EXPECT_FALSE(last.reason.empty());
    EXPECT_EQ(gate.guard().refused_in_a_row(), 3);
    EXPECT_EQ(decide(gate, gathered(1.6, 1)).verdict, Verdict::apply);
    EXPECT_EQ(gate.guard().refused_in_a_row(), 0);
}

TEST(SpikeGate, LearnsNothingFromAnEvaluationAlone) {
    SpikeGate gate = calm_gate();
    const StateDict before = state_of(gate);
    for (int i = 0; i < 20; ++i) {
        EXPECT_EQ(gate.evaluate(gathered(100, 1)).verdict, Verdict::refuse);
        EXPECT_EQ(gate.evaluate(gathered(1.5, 1)).verdict, Verdict::apply);
    }
    expect_same(state_of(gate), before);
}

TEST(SpikeGate, IsToldOfNothingByABatchWithoutWeight) {
    SpikeGate gate = calm_gate();
    const StateDict before = state_of(gate);
    EXPECT_EQ(decide(gate, gathered(0, 0, 0)).verdict, Verdict::apply);
    gate.record(gathered(0, 0, 0), {Verdict::refuse, "zero weight"});
    expect_same(state_of(gate), before);
}

TEST(SpikeGate, ForgetsWhatWasUsualWhenItIsReset) {
    SpikeGate gate = calm_gate();
    gate.reset();
    expect_same(state_of(gate), state_of(SpikeGate(quick)));
    EXPECT_EQ(gate.evaluate(gathered(100, 1)).verdict, Verdict::apply);
}

TEST(SpikeGate, ContinuesFromItsStateAlsoThroughJson) {
    SpikeGate gate = calm_gate();
    decide(gate, gathered(100, 1));
    SpikeGate other(quick);
    StateDict read;
    read_scalars(scalars_to_json(state_of(gate)), "state.json", read);
    load(other, StateReader(read));
    expect_same(state_of(other), state_of(gate));
    for (const double loss : {1.6, 100.0, 1.5, 100.0, 100.0, 100.0}) {
        const Judgement one = decide(gate, gathered(loss, 1)), two = decide(other, gathered(loss, 1));
        EXPECT_EQ(one.verdict, two.verdict);
        EXPECT_EQ(one.reason, two.reason);
    }
}

TEST(SpikeGate, RefusesAStateThatNoGateHasAndStaysAsItIs) {
    SpikeGate gate = calm_gate();
    const StateDict good = state_of(gate);
    for (const double bad : {nan_value, infinity}) {
        for (const char* name : {"bound_diverged", "bound_calm", "scale"}) {
            const StateDict state = with(good, name, StateScalar(bad));
            expect_error(ErrorKind::bad_data, {}, [&] { gate.prepare(StateReader(state)); });
        }
        const StateDict state = with(good, "losses", StateScalar(std::vector<double>{1, 2, 3, 4, bad}));
        expect_error(ErrorKind::bad_data, {}, [&] { gate.prepare(StateReader(state)); });
    }
    const StateDict shorter = with(good, "losses", StateScalar(std::vector<double>{1, 2}));
    expect_error(ErrorKind::bad_data, {"losses"}, [&] { gate.prepare(StateReader(shorter)); });
    const StateDict negative = with(good, "refused_in_a_row", StateScalar(std::int64_t{-1}));
    expect_error(ErrorKind::bad_data, {"refused_in_a_row", "-1"}, [&] { gate.prepare(StateReader(negative)); });
    for (const char* name : {"losses", "gradient_norms", "refused_in_a_row", "scale"}) {
        const StateDict state = without(good, name);
        expect_error(ErrorKind::bad_data, {name, "missing"}, [&] { gate.prepare(StateReader(state)); });
    }
    expect_same(state_of(gate), good);
}

/// Writes down what it is asked and told.
struct Witness final : StepGate {
    std::string name;
    std::vector<std::string>* calls;
    Judgement answer = {};

    Witness(std::string called, std::vector<std::string>& into, Judgement says = {})
        : name(std::move(called)), calls(&into), answer(std::move(says)) {}

    Judgement evaluate(const Gathered&) const override {
        calls->push_back(name + " evaluates");
        return answer;
    }
    void record(const Gathered& batch, const Judgement& judgement) override {
        EXPECT_TRUE(batch.sums.empty());  // the gradients are freed by then
        calls->push_back(name + " records " + (judgement.verdict == Verdict::apply ? "apply" : judgement.reason));
    }
};

TEST(GateChain, TheFirstThatRefusesDecidesAndAllRecordIt) {
    std::vector<std::string> calls;
    Witness first("first", calls), second("second", calls, {Verdict::refuse, "no"}), third("third", calls);
    GateChain chain({&first, &second, &third});
    EXPECT_EQ(decide(chain, gathered(1, 1)).reason, "no");
    EXPECT_EQ(calls, (std::vector<std::string>{"first evaluates", "second evaluates", "first records no",
                                               "second records no", "third records no"}));
    calls.clear();
    GateChain none(std::vector<StepGate*>{});
    EXPECT_EQ(decide(none, gathered(1, 1)).verdict, Verdict::apply);
    EXPECT_TRUE(calls.empty());
}

TEST(GateChain, IsSavedAndLoadedWithEveryGateInIt) {
    SpikeGate first = calm_gate(), second(quick), other_first(quick), other_second(quick);
    decide(second, gathered(3, 1));
    FiniteGate finite;
    GateChain chain({&first, &finite, &second}), other({&other_first, &finite, &other_second});
    const StateDict state = state_of(chain);
    load(other, StateReader(state));
    expect_same(state_of(other_first), state_of(first));
    expect_same(state_of(other_second), state_of(second));
    // If one of them is refused, none changes.
    SpikeGate fresh(quick), last(quick);
    GateChain third({&fresh, &finite, &last});
    const StateDict broken = without(state, "2/scale");
    expect_error(ErrorKind::bad_data, {"2/scale", "missing"}, [&] { third.prepare(StateReader(broken)); });
    expect_same(state_of(fresh), state_of(SpikeGate(quick)));
}

Job small_job() {
    return mlp_job({.inputs = 4, .layers = 1, .width = 5, .classes = 3}, {.micro_batch = 3});
}

TEST(GatedStep, AsksTheGateOnceAndTellsItOnceWhatWasDone) {
    Job job = small_job();
    const Batch batch = job.make_batch(7);
    std::vector<std::string> calls;
    Witness applies("gate", calls);
    EXPECT_TRUE(job.accumulator->step(batch, job.loss, {.gate = &applies}).applied);
    EXPECT_EQ(calls, (std::vector<std::string>{"gate evaluates", "gate records apply"}));
    calls.clear();
    Witness refuses("gate", calls, {Verdict::refuse, "too bold"}), diverges("gate", calls, {Verdict::diverged, "lost"});
    const Named before = job.state();
    StepReport report = job.accumulator->step(batch, job.loss, {.gate = &refuses});
    EXPECT_FALSE(report.applied);
    EXPECT_FALSE(report.diverged);
    EXPECT_EQ(report.reason, "too bold");
    report = job.accumulator->step(batch, job.loss, {.gate = &diverges});
    EXPECT_FALSE(report.applied);
    EXPECT_TRUE(report.diverged);
    EXPECT_EQ(report.reason, "lost");
    EXPECT_EQ(calls, (std::vector<std::string>{"gate evaluates", "gate records too bold", "gate evaluates",
                                               "gate records lost"}));
    expect_same_bits(job.state(), before);
    expect_no_gradients(job.parameters);
}

TEST(GatedStep, TellsTheGateWhatAnotherOneRefused) {
    Job job = small_job();
    Batch poisoned = job.make_batch(7);
    poisoned.fields[0].fill_(nan_value);
    std::vector<std::string> calls;
    Witness gate("gate", calls);
    EXPECT_EQ(job.accumulator->step(poisoned, job.loss, {.gate = &gate}).reason, "loss is not finite");
    EXPECT_EQ(calls, (std::vector<std::string>{"gate evaluates", "gate records loss is not finite"}));
}

/// Throws when it evaluates, or when it records.
struct Throwing final : StepGate {
    bool when_asked;

    explicit Throwing(bool asked) : when_asked(asked) {}
    Judgement evaluate(const Gathered&) const override {
        if (when_asked) throw std::runtime_error("asked");
        return {};
    }
    void record(const Gathered&, const Judgement&) override { throw std::runtime_error("told"); }
};

TEST(GatedStep, AGateThatThrowsWhenItIsAskedLeavesEverythingUnchanged) {
    Job job = gpt_job({.layers = 1, .heads = 1, .width = 8, .length = 4, .vocabulary = 16, .dropout = 0.2},
                      {.micro_batch = 3});
    const Batch batch = job.make_batch(7);
    const Named before = job.state();
    Throwing gate(true);
    EXPECT_THROW(job.accumulator->step(batch, job.loss, {.gate = &gate}), std::runtime_error);
    expect_same_bits(job.state(), before);
    expect_no_gradients(job.parameters);
    EXPECT_TRUE(job.accumulator->step(batch, job.loss).applied);
}

TEST(GatedStep, AGateThatThrowsWhenItIsToldDoesSoAfterTheStep) {
    Job job = small_job(), other = small_job();
    const Batch batch = job.make_batch(7);
    Throwing gate(false);
    EXPECT_THROW(job.accumulator->step(batch, job.loss, {.gate = &gate}), std::runtime_error);
    other.accumulator->step(batch, other.loss);
    expect_same_bits(values_of(job.parameters), values_of(other.parameters));
    expect_no_gradients(job.parameters);
    EXPECT_TRUE(job.accumulator->step(batch, job.loss).applied);
}

/// Runs out of memory this many times when it evaluates, or when it records.
struct Hungry final : StepGate {
    bool when_asked;
    mutable int times;
    int told = 0;

    Hungry(bool asked, int failures) : when_asked(asked), times(failures) {}
    Judgement evaluate(const Gathered&) const override {
        if (when_asked) eat();
        return {};
    }
    void record(const Gathered&, const Judgement&) override {
        ++told;
        if (!when_asked) eat();
    }
    void eat() const {
        if (times-- > 0) test::fail_allocation(1);
        at::ones({100});
    }
};

class GatedStepInMemory : public ::testing::Test {
protected:
    static void SetUpTestSuite() { install_budget_allocator(); }
    ~GatedStepInMemory() override { test::fail_allocation(0); }
};

TEST_F(GatedStepInMemory, AGateThatRunsOutOfMemoryHasTheStepRepeated) {
    Job job = small_job(), other = small_job();
    const Batch batch = job.make_batch(7);
    Hungry gate(/*asked=*/true, 1);
    const StepReport report = job.accumulator->step(batch, job.loss, {.gate = &gate});
    EXPECT_TRUE(report.applied);
    EXPECT_EQ(report.out_of_memory, 1);
    EXPECT_EQ(gate.told, 1);
    other.accumulator->step(batch, other.loss);
    expect_same_bits(values_of(job.parameters), values_of(other.parameters));
}

TEST_F(GatedStepInMemory, AGateThatRunsOutOfMemoryWhenItIsToldDoesNotHaveTheUpdateMadeTwice) {
    Job job = small_job(), other = small_job();
    const Batch batch = job.make_batch(7);
    Hungry gate(/*asked=*/false, 1);
    EXPECT_THROW(job.accumulator->step(batch, job.loss, {.gate = &gate}), c10::OutOfMemoryError);
    other.accumulator->step(batch, other.loss);
    expect_same_bits(values_of(job.parameters), values_of(other.parameters));
}

/// Applies the first batch and refuses the ones after it.
struct Fickle final : StepGate {
    mutable int asked = 0;
    std::vector<std::string> told = {};

    Judgement evaluate(const Gathered&) const override {
        return asked++ == 0 ? Judgement{} : Judgement{Verdict::refuse, "on second thoughts"};
    }
    void record(const Gathered&, const Judgement& judgement) override { told.push_back(judgement.reason); }
};

/// An optimizer whose first step runs out of memory.
struct Starved final : Optimizer {
    Optimizer& inner;
    int failures;

    Starved(Optimizer& optimizer, int times) : inner(optimizer), failures(times) {}
    void step(std::span<const GradientView> gradients, double divisor) override {
        if (failures-- > 0) {
            test::fail_allocation(1);
            at::ones({100});
        }
        inner.step(gradients, divisor);
    }
    void dry_run(std::span<const GradientView> gradients, double divisor) override {
        inner.dry_run(gradients, divisor);
    }
    void end_dry_run() override { inner.end_dry_run(); }
    bool has_state() const override { return inner.has_state(); }
    void save(const StateWriter& writer) const override { inner.save(writer); }
    Commit prepare(const StateReader& reader) override { return inner.prepare(reader); }
    double learning_rate() const override { return inner.learning_rate(); }
    void set_learning_rate(double rate) override { inner.set_learning_rate(rate); }
    std::vector<at::Tensor> parameters() const override { return inner.parameters(); }
};

TEST_F(GatedStepInMemory, WhatRanOutIsReportedAlsoWhereTheSecondAttemptIsRefused) {
    Job job = small_job();
    const Batch batch = job.make_batch(7);
    Starved optimizer(*job.optimizer, 1);
    Accumulator accumulator(job.model, optimizer, {.plan = {.micro_batch = 3}});
    const Named before = values_of(job.parameters);
    Fickle gate;
    test::fail_allocation(15);  // in the gather of the first attempt, too
    const StepReport report = accumulator.step(batch, job.loss, {.gate = &gate});
    EXPECT_FALSE(report.applied);
    EXPECT_EQ(report.reason, "on second thoughts");
    EXPECT_EQ(report.out_of_memory, 2);
    EXPECT_EQ(report.plan.micro_batch, 1);
    EXPECT_EQ(gate.told, (std::vector<std::string>{"on second thoughts"}));  // of what was done, once
    expect_same_bits(values_of(job.parameters), before);
    expect_no_gradients(job.parameters);
}

TEST_F(GatedStepInMemory, AStepThatIsStoppedInItsSecondAttemptTellsTheGateNothing) {
    Job job = small_job();
    const Batch batch = job.make_batch(7);
    Starved optimizer(*job.optimizer, 1);
    Accumulator accumulator(job.model, optimizer, {.plan = {.micro_batch = 3}});
    Fickle gate;
    bool leave = true;
    const auto stop = [&] { return optimizer.failures == 0 && std::exchange(leave, false); };
    StepReport report = accumulator.step(batch, job.loss, {.gate = &gate, .stop = stop});
    ASSERT_TRUE(report.partial);
    EXPECT_EQ(report.out_of_memory, 1);
    EXPECT_TRUE(gate.told.empty());
    report = accumulator.step(batch, job.loss, {.gate = &gate, .partial = std::move(report.partial)});
    EXPECT_EQ(report.reason, "on second thoughts");
    EXPECT_EQ(report.out_of_memory, 1);
    EXPECT_EQ(gate.told.size(), 1u);
}

}  // namespace
}  // namespace microbatch
