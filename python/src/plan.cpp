#include <pybind11/operators.h>

#include <string>

#include "microbatch/core/planner.h"
#include "microbatch/run/run_memory.h"
#include "python/src/bindings.h"

namespace microbatch::python {

void bind_plan(py::module_& module) {
    py::enum_<BatchNorm>(module, "BatchNorm")
        .value("naive", BatchNorm::naive)
        .value("deferred", BatchNorm::deferred)
        .value("frozen", BatchNorm::frozen)
        .value("exact", BatchNorm::exact);
    py::class_<Plan>(module, "Plan")
        .def(py::init([](std::int64_t micro_batch, bool recompute, BatchNorm batch_norm) {
                 return Plan{.micro_batch = micro_batch, .recompute = recompute, .batch_norm = batch_norm};
             }),
             py::arg("micro_batch"), py::arg("recompute"), py::arg("batch_norm"))
        .def_readonly("micro_batch", &Plan::micro_batch)
        .def_readonly("recompute", &Plan::recompute)
        .def_readonly("batch_norm", &Plan::batch_norm)
        .def(py::self == py::self);
    py::enum_<Recompute>(module, "Recompute")
        .value("auto", Recompute::automatic)
        .value("never", Recompute::never)
        .value("always", Recompute::always);
    py::class_<PlannerOptions>(module, "PlannerOptions")
        .def(py::init<>())
        .def_readwrite("budget_bytes", &PlannerOptions::budget_bytes)
        .def_readwrite("recompute", &PlannerOptions::recompute)
        .def_readwrite("micro_batch", &PlannerOptions::micro_batch);
    py::class_<Candidate>(module, "Candidate")
        .def_readonly("plan", &Candidate::plan)
        .def_readonly("micro_batches", &Candidate::micro_batches)
        .def_readonly("step_seconds", &Candidate::step_seconds)
        .def_readonly("time_measured", &Candidate::time_measured)
        .def_readonly("fits", &Candidate::fits)
        .def_property_readonly("peak_bytes", &Candidate::peak_bytes);
    py::class_<PlanReport>(module, "PlanReport")
        .def_readonly("batch", &PlanReport::batch)
        .def_readonly("budget_bytes", &PlanReport::budget_bytes)
        .def_readonly("candidates", &PlanReport::candidates)
        .def_readonly("why", &PlanReport::why)
        .def_readonly("batch_norm", &PlanReport::batch_norm)
        .def_readonly("update_seconds", &PlanReport::update_seconds)
        .def_readonly("spent_seconds", &PlanReport::spent_seconds)
        .def_property_readonly("fits", [](const PlanReport& self) { return self.chosen.has_value(); })
        .def("choice", &PlanReport::choice, py::return_value_policy::reference_internal)
        .def("explain_misfit", [](const PlanReport& self) { return explain_misfit(self); });
    module.def("plan_with_noise", &plan_with_noise, py::arg("report"));
}

}  // namespace microbatch::python
