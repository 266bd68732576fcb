#include <string>

#include "microbatch/analysis/curvature.h"
#include "microbatch/analysis/verify.h"
#include "microbatch/core/batch_advice.h"
#include "python/src/batch.h"
#include "python/src/bindings.h"
#include "python/src/model.h"

namespace microbatch::python {
namespace {

std::string name_of(Cause cause) {
    switch (cause) {
        case Cause::averaged_loss:
            return "averaged_loss";
        case Cause::batch_statistics:
            return "batch_statistics";
        case Cause::randomness:
            return "randomness";
        case Cause::coupled_samples:
            return "coupled_samples";
        case Cause::not_finite:
            return "not_finite";
        case Cause::unknown:
            break;
    }
    return "unknown";
}

Verification verify_python(py::object model, const py::object& source, const py::object& loss, std::int64_t micro_batch,
                           BatchNorm batch_norm) {
    const auto adapted = std::make_shared<PythonModel>(std::move(model));
    const PythonBatch batch(source);
    const LossFunction function = loss_of(batch, loss);
    const py::gil_scoped_release released;
    return verify(adapted, batch, function, micro_batch, batch_norm);
}

Curvature curvature_python(py::object model, const py::object& source, const py::object& loss, std::int64_t micro_batch,
                           std::int64_t most_products, double tolerance, std::uint64_t seed) {
    const PythonModel adapted(std::move(model));
    const PythonBatch batch(source);
    const LossFunction function = loss_of(batch, loss);
    const py::gil_scoped_release released;
    return largest_curvature(adapted.parameters(), batch, micro_batch, function,
                             {.most_products = most_products, .tolerance = tolerance, .seed = seed});
}

void bind_advice(py::module_& module) {
    py::class_<BatchCost>(module, "BatchCost")
        .def_readonly("batch", &BatchCost::batch)
        .def_readonly("micro_batch", &BatchCost::micro_batch)
        .def_readonly("step_seconds", &BatchCost::step_seconds)
        .def_readonly("steps", &BatchCost::steps)
        .def_readonly("samples", &BatchCost::samples)
        .def_readonly("time", &BatchCost::time);
    py::class_<BatchAdvice>(module, "BatchAdvice")
        .def_readonly("noise_batch", &BatchAdvice::noise_batch)
        .def_readonly("table", &BatchAdvice::table)
        .def_readonly("soonest", &BatchAdvice::soonest)
        .def_property_readonly("accumulation_pays", &BatchAdvice::accumulation_pays);
    module.def(
        "advise_batch",
        [](double noise_batch, const PlanReport& report, std::int64_t samples) {
            return advise_batch(noise_batch, timed_cuts(report), report.update_seconds,
                                largest_to_compare(noise_batch, report.batch), samples);
        },
        py::arg("noise_batch"), py::arg("report"), py::arg("samples"));
    module.def("as_many_tokens", &as_many_tokens, py::arg("samples"), py::arg("first"), py::arg("length"));
    module.def("batch_of_few_steps", &batch_of_few_steps, py::arg("noise_batch"));
    module.def("batch_of_few_samples", &batch_of_few_samples, py::arg("noise_batch"));
}

}  // namespace

void bind_analysis(py::module_& module) {
    py::class_<Difference>(module, "Difference")
        .def_readonly("parameter", &Difference::parameter)
        .def_readonly("relative", &Difference::relative);
    py::class_<Verification>(module, "Verification")
        .def_readonly("tolerance", &Verification::tolerance)
        .def_readonly("loss_difference", &Verification::loss_difference)
        .def_readonly("differences", &Verification::differences)
        .def_property_readonly("causes", [](const Verification& self) {
            py::list causes;  // name, what to do
            for (const Cause cause : self.causes) causes.append(py::make_tuple(name_of(cause), describe(cause)));
            return causes;
        });
    module.def("verify", &verify_python, py::arg("model"), py::arg("batch"), py::arg("loss"), py::arg("micro_batch"),
               py::arg("batch_norm"));
    py::class_<Curvature>(module, "Curvature")
        .def_readonly("largest_eigenvalue", &Curvature::largest_eigenvalue)
        .def_readonly("residual", &Curvature::residual)
        .def_readonly("products", &Curvature::products)
        .def_readonly("converged", &Curvature::converged);
    module.def("largest_curvature", &curvature_python, py::arg("model"), py::arg("batch"), py::arg("loss"),
               py::arg("micro_batch"), py::arg("most_products"), py::arg("tolerance"), py::arg("seed"));
    bind_advice(module);
}

}  // namespace microbatch::python
