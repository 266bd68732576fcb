#include "python/src/model.h"

#include <torch/csrc/Exceptions.h>

#include <string>
#include <utility>

namespace microbatch::python {

PythonModel::~PythonModel() {
    const py::gil_scoped_acquire gil;
    adapter_ = py::object();
}

NamedTensors PythonModel::tensors(const char* method) const {
    const py::gil_scoped_acquire gil;
    NamedTensors result;
    for (const py::handle item : adapter_.attr(method)()) {
        const auto [name, tensor] = item.cast<std::pair<std::string, at::Tensor>>();
        result.push_back({name, tensor});
    }
    return result;
}

std::vector<std::int64_t> PythonModel::training_flags() const {
    const py::gil_scoped_acquire gil;
    return adapter_.attr("training_flags")().cast<std::vector<std::int64_t>>();
}

void PythonModel::set_training_flags(const std::vector<std::int64_t>& flags) {
    const py::gil_scoped_acquire gil;
    adapter_.attr("set_training_flags")(flags);
}

void PythonModel::set_generator_states(const NamedTensors& states) {
    const py::gil_scoped_acquire gil;
    py::list named;
    for (const auto& [name, tensor] : states) named.append(py::make_tuple(name, tensor));
    adapter_.attr("set_generator_states")(named);
}

bool PythonModel::offers_checkpointing() const {
    const py::gil_scoped_acquire gil;
    return adapter_.attr("offers_checkpointing").cast<bool>();
}

void PythonModel::set_checkpointing(bool on) {
    if (on == checkpoints_) return;
    const py::gil_scoped_acquire gil;
    adapter_.attr("set_checkpointing")(on);
    checkpoints_ = on;
}

void PythonModel::backward(const std::vector<at::Tensor>& roots, const std::vector<at::Tensor>& gradients,
                           bool again) const {
    try {
        Model::backward(roots, gradients, again);
    } catch (python_error& error) {
        const py::gil_scoped_acquire gil;
        if (PyErr_Occurred() == nullptr) error.restore();
        throw py::error_already_set();
    }
}

}  // namespace microbatch::python
