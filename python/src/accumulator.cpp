#include "python/src/accumulator.h"

#include <algorithm>
#include <string>
#include <utility>

#include "microbatch/distributed/group_reducer.h"
#include "microbatch/step/batch_norm_plan.h"
#include "python/src/batch.h"
#include "python/src/optimizer.h"
#include "python/src/state.h"

namespace microbatch::python {
namespace {

/// An optimizer that updates nothing: the caller has one of his own, and takes the gradients from .grad.
class NoOptimizer final : public Optimizer {
public:
    void step(std::span<const GradientView>, double) override { refuse(); }
    void dry_run(std::span<const GradientView>, double) override {}
    void end_dry_run() override {}
    bool has_state() const override { return true; }
    double learning_rate() const override { return 0.0; }
    void set_learning_rate(double) override { refuse(); }
    std::vector<at::Tensor> parameters() const override { return {}; }
    void save(const StateWriter&) const override {}
    Commit prepare(const StateReader&) override {
        return [] {};
    }

private:
    [[noreturn]] static void refuse() {
        throw Error(ErrorKind::usage, "this Accumulator has no optimizer: gather() leaves the gradients in .grad");
    }
};

std::unique_ptr<Optimizer> optimizer_of(py::object driver) {
    if (driver.is_none()) return std::make_unique<NoOptimizer>();
    return std::make_unique<PythonOptimizer>(std::move(driver));
}

StepOptions options_of(bool measure_noise, StepGate* gate) {
    return {.gate = gate, .measure_noise = measure_noise, .before_noise = {collect_garbage()}};
}

}  // namespace

Reclaimer collect_garbage() {
    return {[] {
                const py::gil_scoped_acquire gil;
                py::module_::import("gc").attr("collect")();
                return false;
            },
            /*counts=*/false};
}

PythonAccumulator::PythonAccumulator(py::object model, py::object driver, double clip_norm, bool sum_in_product,
                                     const std::shared_ptr<Group>& group, bool whole_batches, bool shard_optimizer,
                                     std::int64_t grain)
    : model_(std::make_shared<PythonModel>(std::move(model))), optimizer_(optimizer_of(std::move(driver))) {
    const py::gil_scoped_release released;
    accumulator_.emplace(AnyModel(model_), *optimizer_,
                         AccumulatorOptions{.clip_norm = clip_norm,
                                            .sum_in_product = sum_in_product,
                                            .reducer = reducer_of(group, whole_batches),
                                            .shard_optimizer = shard_optimizer,
                                            .grain = grain});
    if (group) share_from_first(*group, accumulator_->parameters(), model_->buffers());
}

StepReport PythonAccumulator::step(const py::object& source, const py::object& loss, bool measure_noise,
                                   SpikeGate* gate) {
    const PythonBatch batch(source);
    const LossFunction function = loss_of(batch, loss);
    const py::gil_scoped_release released;
    return accumulator_->step(batch, function, options_of(measure_noise, gate));
}

void PythonAccumulator::gather(const py::object& source, const py::object& loss, bool measure_noise) {
    const PythonBatch batch(source);
    const LossFunction function = loss_of(batch, loss);
    const py::gil_scoped_release released;
    accumulator_->gather(batch, function, options_of(measure_noise, nullptr));
}

PlanReport PythonAccumulator::plan(const py::object& source, const py::object& loss, PlannerOptions how,
                                   std::optional<BatchNorm> batch_norm, const py::object& on_trial) {
    const PythonBatch batch(source);
    const LossFunction function = loss_of(batch, loss);
    how.on_trial = [&on_trial](const Plan& plan) {
        const py::gil_scoped_acquire gil;
        if (PyErr_CheckSignals() != 0) throw py::error_already_set();
        if (!on_trial.is_none()) on_trial(plan);
    };
    const py::gil_scoped_release released;
    const SliceOf share(batch, {0, accumulator_->reducer().largest_share(
                                       batch.size(), std::max<std::int64_t>(accumulator_->grain(), 1))});
    if (how.micro_batch) how.micro_batch = std::min(*how.micro_batch, share.size());
    if (const std::int64_t grain = accumulator_->grain(); grain > 0) how.micro_batch = std::min(grain, share.size());
    return plan_batch_norm(*accumulator_, share, function, how, batch_norm);
}

void PythonAccumulator::add(const py::object& sum, const py::object& weight) {
    const WeightedLoss loss = weighted_loss(py::make_tuple(sum, weight));
    const py::gil_scoped_release released;
    accumulator_->add(loss);
}

void bind_accumulator(py::module_& module) {
    const auto released = py::call_guard<py::gil_scoped_release>();
    py::class_<NoiseMeasure>(module, "NoiseMeasure")
        .def_readonly("variance", &NoiseMeasure::variance)
        .def_readonly("squared_gradient", &NoiseMeasure::squared_gradient);
    py::class_<StepReport>(module, "StepReport")
        .def_readonly("loss", &StepReport::loss)
        .def_readonly("weight", &StepReport::weight)
        .def_readonly("gradient_norm", &StepReport::gradient_norm)
        .def_readonly("learning_rate", &StepReport::learning_rate)
        .def_readonly("update_seconds", &StepReport::update_seconds)
        .def_readonly("micro_batches", &StepReport::micro_batches)
        .def_readonly("plan", &StepReport::plan)
        .def_readonly("noise", &StepReport::noise)
        .def_readonly("out_of_memory", &StepReport::out_of_memory)
        .def_readonly("applied", &StepReport::applied)
        .def_readonly("diverged", &StepReport::diverged)
        .def_readonly("reason", &StepReport::reason);
    py::class_<SpikeGate>(module, "SpikeGate")
        .def(py::init([](std::int64_t window, std::int64_t least, double sigmas, std::int64_t most_refused) {
                 return std::make_unique<SpikeGate>(SpikeGuardOptions{
                     .window = window, .least = least, .sigmas = sigmas, .most_refused = most_refused});
             }),
             py::arg("window"), py::arg("least"), py::arg("sigmas"), py::arg("most_refused"))
        .def("state", [](const SpikeGate& self) { return to_dict(state_of(self)); })
        .def("load_state", [](SpikeGate& self, const py::dict& values) {
            const StateDict state = from_dict(values);
            load(self, StateReader(state));
        });
    py::class_<PythonAccumulator>(module, "Accumulator")
        .def(py::init<py::object, py::object, double, bool, std::shared_ptr<Group>, bool, bool, std::int64_t>(),
             py::arg("model"), py::arg("optimizer"), py::arg("clip_norm"), py::arg("sum_in_product"), py::arg("group"),
             py::arg("whole_batches"), py::arg("shard_optimizer"), py::arg("grain"))
        .def("step", &PythonAccumulator::step, py::arg("batch"), py::arg("loss"), py::arg("measure_noise"),
             py::arg("gate"))
        .def("gather", &PythonAccumulator::gather, py::arg("batch"), py::arg("loss"), py::arg("measure_noise"))
        .def("plan_batch", &PythonAccumulator::plan, py::arg("batch"), py::arg("loss"), py::arg("options"),
             py::arg("batch_norm"), py::arg("on_trial"))
        .def(
            "abandon", [](PythonAccumulator& self, const std::string& why) { self.get().reducer().abandon(why); },
            py::arg("why"), released)
        .def("require_whole_update", [](PythonAccumulator& self) { self.get().require_whole_update(); })
        .def("add", &PythonAccumulator::add, py::arg("sum"), py::arg("weight"))
        .def(
            "begin", [](PythonAccumulator& self, bool measure_noise) { self.get().begin(measure_noise); },
            py::arg("measure_noise"), released)
        .def(
            "finish", [](PythonAccumulator& self) { self.get().finish(); }, released)
        .def(
            "apply", [](PythonAccumulator& self) { return self.get().apply(); }, released)
        .def(
            "hand_over", [](PythonAccumulator& self) { return self.get().hand_over(); }, released)
        .def(
            "discard", [](PythonAccumulator& self, const std::string& reason) { return self.get().discard(reason); },
            py::arg("reason"), released)
        .def_property(
            "plan", [](PythonAccumulator& self) { return self.get().plan(); },
            [](PythonAccumulator& self, const Plan& plan) {
                const py::gil_scoped_release no_gil;
                self.get().set_plan(plan);
            })
        .def("ranges",
             [](PythonAccumulator& self) {
                 StateDict state;
                 self.get().save_ranges(StateWriter(state));
                 return to_dict(state);
             })
        .def("load_ranges",
             [](PythonAccumulator& self, const py::dict& values) {
                 const StateDict state = from_dict(values);
                 self.get().prepare_ranges(StateReader(state))();
             })
        .def("caps", [](PythonAccumulator& self) { return to_dict(state_of(self.get().caps())); })
        .def("load_caps", [](PythonAccumulator& self, const py::dict& values) {
            const StateDict state = from_dict(values);
            load(self.get().caps(), StateReader(state));
        });
}

}  // namespace microbatch::python
