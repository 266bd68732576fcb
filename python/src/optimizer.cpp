#include "python/src/optimizer.h"

#include <memory>
#include <string>
#include <utility>

#include "microbatch/optim/adamw.h"
#include "microbatch/optim/sgd.h"
#include "python/src/state.h"

namespace microbatch::python {
namespace {

using Named = std::vector<std::pair<std::string, at::Tensor>>;
using NamedGroups = std::vector<Named>;

std::vector<ParameterGroup> groups_of(const NamedGroups& groups) {
    std::vector<ParameterGroup> result;
    for (const Named& named : groups) {
        ParameterGroup group;
        for (const auto& [name, tensor] : named) group.parameters.push_back({name, tensor});
        result.push_back(std::move(group));
    }
    return result;
}

GradientViews views_of(const std::vector<at::Tensor>& parameters, const std::vector<at::Tensor>& sums) {
    GradientViews views;
    for (std::size_t i = 0; i < parameters.size(); ++i) views.push_back({parameters[i], sums[i]});
    return views;
}

// Tensors of the state, by "PARAMETER/INDEX".
Named tensors_of(const Optimizer& optimizer) {
    const StateDict state = state_of(optimizer);
    Named result;
    for (const auto& [name, tensor] : state.tensors()) result.emplace_back(name, tensor.get());
    return result;
}

void load_tensors(Optimizer& optimizer, const Named& tensors) {
    StateDict dict;
    for (const auto& [name, tensor] : tensors) dict.put(name, StoredTensor(tensor));
    load(optimizer, StateReader(dict));
}

}  // namespace

PythonOptimizer::~PythonOptimizer() {
    const py::gil_scoped_acquire gil;
    driver_ = py::object();
}

void PythonOptimizer::call(const char* method, std::span<const GradientView> gradients, double divisor) {
    const py::gil_scoped_acquire gil;
    py::list parameters, sums;
    for (const GradientView& view : updated(gradients)) {
        parameters.append(view.parameter);
        sums.append(view.sum);
    }
    driver_.attr(method)(parameters, sums, divisor);
}

void PythonOptimizer::step(std::span<const GradientView> gradients, double divisor) {
    call("step", gradients, divisor);
}

void PythonOptimizer::dry_run(std::span<const GradientView> gradients, double divisor) {
    call("dry_run", gradients, divisor);
}

void PythonOptimizer::end_dry_run() {
    const py::gil_scoped_acquire gil;
    driver_.attr("end_dry_run")();
}

bool PythonOptimizer::has_state() const {
    const py::gil_scoped_acquire gil;
    return driver_.attr("has_state")().cast<bool>();
}

double PythonOptimizer::learning_rate() const {
    const py::gil_scoped_acquire gil;
    return driver_.attr("learning_rate")().cast<double>();
}

void PythonOptimizer::set_learning_rate(double rate) {
    validate_setting("optimizer", "learning rate", rate);
    const py::gil_scoped_acquire gil;
    driver_.attr("set_learning_rate")(rate);
}

std::vector<at::Tensor> PythonOptimizer::parameters() const {
    const py::gil_scoped_acquire gil;
    return driver_.attr("parameters")().cast<std::vector<at::Tensor>>();
}

void PythonOptimizer::update_only(const std::vector<at::Tensor>& parameters) {
    restrict_to(parameters);
    const py::gil_scoped_acquire gil;
    driver_.attr("update_only")(parameters);
}

bool PythonOptimizer::is_partial() const {
    const py::gil_scoped_acquire gil;
    return driver_.attr("is_partial")().cast<bool>();
}

void PythonOptimizer::lift_restriction() {
    Optimizer::lift_restriction();
    const py::gil_scoped_acquire gil;
    driver_.attr("update_all")();
}

bool PythonOptimizer::keeps(std::string_view name) const {
    const py::gil_scoped_acquire gil;
    return driver_.attr("keeps")(py::str(name.data(), name.size())).cast<bool>();
}

void PythonOptimizer::save(const StateWriter& writer) const {
    const py::gil_scoped_acquire gil;
    for (const py::handle item : driver_.attr("state")()) {
        const auto [name, tensor] = item.cast<std::pair<std::string, at::Tensor>>();
        writer.put(name, tensor);
    }
}

Commit PythonOptimizer::prepare(const StateReader& reader) {
    const py::gil_scoped_acquire gil;
    py::dict values;
    for (const auto& [name, tensor] : reader.tensors()) values[py::str(name)] = tensor->get_own();
    return commit_of(driver_.attr("prepare")(values));
}

void bind_optimizers(py::module_& module) {
    const auto released = py::call_guard<py::gil_scoped_release>();
    py::class_<FusedOptimizer>(module, "FusedOptimizer")
        .def("set_group", &FusedOptimizer::set_group, py::arg("group"), py::arg("learning_rate_scale"),
             py::arg("weight_decay"))
        .def(
            "add_group", [](FusedOptimizer& self, const Named& named) { self.add_group(groups_of({named}).front()); },
            py::arg("parameters"))
        .def(
            "step",
            [](FusedOptimizer& self, const std::vector<at::Tensor>& parameters, const std::vector<at::Tensor>& sums,
               double divisor) { self.step(views_of(parameters, sums), divisor); },
            py::arg("parameters"), py::arg("sums"), py::arg("divisor"), released)
        .def(
            "dry_run",
            [](FusedOptimizer& self, const std::vector<at::Tensor>& parameters, const std::vector<at::Tensor>& sums,
               double divisor) { self.dry_run(views_of(parameters, sums), divisor); },
            py::arg("parameters"), py::arg("sums"), py::arg("divisor"), released)
        .def("end_dry_run", &FusedOptimizer::end_dry_run)
        .def("has_state", &FusedOptimizer::has_state)
        .def("update_only", &FusedOptimizer::update_only, py::arg("parameters"))
        .def("update_all", &FusedOptimizer::update_all)
        .def("is_partial", &FusedOptimizer::is_partial)
        .def("keeps", &FusedOptimizer::keeps, py::arg("name"))
        .def("state", [](const FusedOptimizer& self) { return tensors_of(self); })
        .def("load_state", [](FusedOptimizer& self, const Named& tensors) { load_tensors(self, tensors); });
    py::class_<AdamW, FusedOptimizer>(module, "AdamW")
        .def(py::init([](const NamedGroups& groups, double beta1, double beta2, double epsilon) {
                 return std::make_unique<AdamW>(
                     groups_of(groups),
                     AdamWOptions{.learning_rate = 1.0, .beta1 = beta1, .beta2 = beta2, .epsilon = epsilon});
             }),
             py::arg("groups"), py::arg("beta1"), py::arg("beta2"), py::arg("epsilon"))
        .def("set_betas", &AdamW::set_betas, py::arg("beta1"), py::arg("beta2"));
    py::class_<Sgd, FusedOptimizer>(module, "SGD")
        .def(py::init([](const NamedGroups& groups, double momentum, bool nesterov, bool decoupled) {
                 return std::make_unique<Sgd>(groups_of(groups), SgdOptions{.learning_rate = 1.0,
                                                                            .momentum = momentum,
                                                                            .nesterov = nesterov,
                                                                            .decoupled_weight_decay = decoupled});
             }),
             py::arg("groups"), py::arg("momentum"), py::arg("nesterov"), py::arg("decoupled_weight_decay"))
        .def("set_momentum", &Sgd::set_momentum, py::arg("momentum"));
}

}  // namespace microbatch::python
