#include "microbatch/run/run.h"

#include <exception>
#include <optional>
#include <string>
#include <utility>

#include "microbatch/io/checkpoint.h"
#include "microbatch/run/run_memory.h"
#include "microbatch/run/run_report.h"
#include "python/src/accumulator.h"
#include "python/src/batch.h"
#include "python/src/bindings.h"
#include "python/src/state.h"

namespace microbatch::python {
namespace {

template <class Value>
Value setting(const py::dict& settings, const char* name) {
    return settings[name].cast<Value>();
}

RunOptions options_of(const py::dict& settings) {
    RunOptions options;
    TrainerOptions& trainer = options.trainer;
    trainer.batch = setting<std::int64_t>(settings, "batch");
    trainer.length = parse_interval(setting<std::string>(settings, "length"));
    trainer.schedule = setting<std::optional<Schedule>>(settings, "schedule");
    trainer.seed = setting<std::uint64_t>(settings, "seed");
    trainer.noise_every = setting<std::int64_t>(settings, "noise_every");
    trainer.reclaimers = {collect_garbage()};
    if (setting<bool>(settings, "guard")) {
        trainer.guard = SpikeGuardOptions{.most_refused = most_refused_in_a_row - 1};
        const auto restores = setting<std::int64_t>(settings, "restores");
        if (restores > 0) {
            trainer.recovery = RecoveryOptions{.most = restores, .folder = setting<std::string>(settings, "folder")};
        }
    }
    options.checkpoints.every = parse_interval(setting<std::string>(settings, "checkpoint_every"));
    options.checkpoints.store.keep = setting<std::int64_t>(settings, "keep");
    options.config = setting<std::string>(settings, "config");
    options.notes = from_dict(settings["notes"]);
    return options;
}

/// The library's RunFolder, which is unlocked by close(): Python may keep an object for long, such as in a traceback.
class PythonFolder {
public:
    PythonFolder(const std::string& path, bool resume) : folder_(std::in_place, path, resume) {}

    RunFolder& get() { return folder_.value(); }
    const StateDict& state() { return get().state().value(); }
    void close() { folder_.reset(); }

private:
    std::optional<RunFolder> folder_;
};

/// The library's Run on a Python model and dataset.
class PythonRun final : public RunObserver {
public:
    PythonRun(PythonFolder& folder, PythonAccumulator& accumulator, py::object data, py::object loss,
              const PlanReport& report, const py::dict& settings, py::object observer)
        : dataset_(std::move(data)), loss_(std::move(loss)), observer_(std::move(observer)) {
        RunOptions options = options_of(settings);
        fit_to_plan(options, report, device_of(accumulator.get().parameters()));
        options.trainer.stop = [this] { return stops(); };
        options.observer = this;
        if (dataset_.has_state()) options.trainer.data_state = &dataset_;
        const LossFunction function = loss_of(dataset_, loss_);
        const py::gil_scoped_release released;
        run_ = std::make_unique<Run>(folder.get(), accumulator.get(), dataset_, function, std::move(options));
    }

    ~PythonRun() override { close(); }

    /// Waits for a checkpoint that is being written. Nothing else may be called afterwards.
    void close() {
        const py::gil_scoped_release released;
        run_.reset();
    }

    void train() {
        {
            const py::gil_scoped_release released;
            run_->train();
        }
        if (failure_) std::rethrow_exception(std::exchange(failure_, nullptr));
    }

    void on_step(const Outcome& outcome) override {
        call([&] { observer_.attr("on_step")(py::cast(outcome, py::return_value_policy::copy)); });
    }

    void on_note(const std::string& text) override {
        call([&] { observer_.attr("on_note")(text); });
    }

    Run& get() { return *run_; }

private:
    // An exception of the observer ends the run as an interrupt does, with a checkpoint, and goes on from train().
    template <class Call>
    void call(Call call) {
        const py::gil_scoped_acquire gil;
        try {
            call();
        } catch (const py::error_already_set&) {
            failure_ = std::current_exception();
        }
    }

    bool stops() {
        const py::gil_scoped_acquire gil;
        if (PyErr_CheckSignals() != 0) throw py::error_already_set();
        return failure_ != nullptr || observer_.attr("stops")().cast<bool>();
    }

    PythonDataset dataset_;
    py::object loss_, observer_;
    std::exception_ptr failure_;
    std::unique_ptr<Run> run_;
};

double mean_loss_of(py::object data, const py::object& loss, std::int64_t micro_batch) {
    const PythonDataset dataset(std::move(data));
    const LossFunction function = loss_of(dataset, loss);
    const py::gil_scoped_release released;
    return mean_loss(dataset, micro_batch, function);
}

void bind_folder(py::module_& module) {
    py::class_<PythonFolder>(module, "RunFolder")
        .def(py::init<const std::string&, bool>(), py::arg("path"), py::arg("resume"))
        .def("lock", [](PythonFolder& self) { self.get().lock(); })
        .def("close", &PythonFolder::close)
        .def_property_readonly("has_state", [](PythonFolder& self) { return self.get().state().has_value(); })
        .def_property_readonly("warnings", [](PythonFolder& self) { return self.get().warnings(); })
        .def("use_healthy", [](PythonFolder& self) { return self.get().use_healthy(); })
        .def("note", [](PythonFolder& self,
                        const std::string& name) { return StateReader(self.state()).section("notes").word(name); })
        .def("steps", [](PythonFolder& self) { return manifest_of(self.state()).progress.steps; })
        .def("is_healthy", [](PythonFolder& self) { return manifest_of(self.state()).healthy; })
        .def("forget_caps", [](PythonFolder& self) { forget_caps(self.get().state().value()); });
}

void bind_outcome(py::module_& module) {
    py::class_<Outcome>(module, "Outcome")
        .def_property_readonly("last", [](const Outcome& self) { return self.last.step; })
        .def_property_readonly("progress", [](const Outcome& self) { return self.last.progress; })
        .def_property_readonly("step_seconds", [](const Outcome& self) { return self.last.seconds; })
        .def_property_readonly("rolled_back_to", [](const Outcome& self) { return self.last.rolled_back_to; })
        .def_property_readonly("noise_batch", [](const Outcome& self) { return self.last.noise_batch; })
        .def_property_readonly("warning", [](const Outcome& self) { return self.last.warning; })
        .def_property_readonly("diverged", &Outcome::diverged)
        .def_property_readonly(
            "median_step_seconds",
            [](const Outcome& self) { return self.step_seconds.empty() ? 0.0 : self.median_step_seconds(); })
        .def_readonly("first_loss", &Outcome::first_loss)
        .def_readwrite("held_out", &Outcome::held_out)
        .def_readonly("seconds", &Outcome::seconds)
        .def_readonly("plan", &Outcome::plan)
        .def_readonly("peak_bytes", &Outcome::peak_bytes)
        .def_readonly("predicted_peak_bytes", &Outcome::predicted_peak_bytes)
        .def_readonly("out_of_memory", &Outcome::out_of_memory)
        .def_readonly("refused", &Outcome::refused)
        .def_readonly("restores", &Outcome::restores)
        .def_readonly("resumed_from", &Outcome::resumed_from)
        .def_readonly("checkpoints", &Outcome::checkpoints)
        .def_readonly("checkpoint_seconds", &Outcome::checkpoint_seconds)
        .def_readonly("checkpointed", &Outcome::checkpointed)
        .def_readonly("healthy_checkpoint", &Outcome::healthy_checkpoint)
        .def_readonly("weights_written", &Outcome::weights_written)
        .def_readonly("interrupted", &Outcome::interrupted)
        .def_readonly("overfits", &Outcome::overfits)
        .def_readonly("ended_worse", &Outcome::ended_worse);
}

}  // namespace

void bind_run(py::module_& module) {
    bind_folder(module);
    bind_outcome(module);
    py::class_<PythonRun>(module, "Run")
        .def(py::init<PythonFolder&, PythonAccumulator&, py::object, py::object, const PlanReport&, const py::dict&,
                      py::object>(),
             py::arg("folder"), py::arg("accumulator"), py::arg("data"), py::arg("loss"), py::arg("report"),
             py::arg("settings"), py::arg("observer"), py::keep_alive<1, 2>(), py::keep_alive<1, 3>(),
             py::keep_alive<1, 5>())
        .def("train", &PythonRun::train)
        .def("close", &PythonRun::close)
        .def_property_readonly(
            "outcome", [](PythonRun& self) -> Outcome& { return self.get().outcome(); },
            py::return_value_policy::reference_internal)
        .def_property_readonly("done", [](PythonRun& self) { return self.get().trainer().done(); })
        .def_property_readonly("next_learning_rate",
                               [](PythonRun& self) { return self.get().trainer().next_learning_rate(); })
        .def_property_readonly("missing_lines", [](PythonRun& self) { return self.get().missing_lines(); })
        .def("flush", [](PythonRun& self) { return self.get().flush(); })
        .def("remove_unused", [](PythonRun& self) { self.get().remove_unused(); });
    module.def("mean_loss", &mean_loss_of, py::arg("data"), py::arg("loss"), py::arg("micro_batch"));
    module.def(
        "judge_end", [](Outcome& outcome, const std::string& folder) { judge_end(outcome, folder); },
        py::arg("outcome"), py::arg("folder"));
    module.def(
        "write_run_report",
        [](const std::string& folder, const RunSettings& settings, const std::string& banner,
           std::optional<double> held_out) {
            return write_run_report(folder, settings, {.banner = banner, .held_out_loss = held_out});
        },
        py::arg("folder"), py::arg("settings"), py::arg("banner"), py::arg("held_out"));
}

}  // namespace microbatch::python
