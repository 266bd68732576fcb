#include "python/src/state.h"

#include <memory>
#include <string>
#include <utility>

namespace microbatch::python {

py::dict to_dict(const StateDict& state) {
    py::dict result;
    for (const auto& [name, tensor] : state.tensors()) result[py::str(name)] = tensor.get();
    for (const auto& [name, scalar] : state.scalars()) result[py::str(name)] = scalar;
    return result;
}

StateDict from_dict(const py::dict& values) {
    StateDict state;
    for (const auto& [name, value] : values) {
        if (THPVariable_Check(value.ptr())) {
            state.put(name.cast<std::string>(), StoredTensor(value.cast<at::Tensor>()));
        } else {
            state.put(name.cast<std::string>(), value.cast<StateScalar>());
        }
    }
    return state;
}

Commit commit_of(py::object function) {
    const std::shared_ptr<py::object> held(new py::object(std::move(function)), [](py::object* dropped) {
        const py::gil_scoped_acquire gil;
        delete dropped;
    });
    return [held] {
        const py::gil_scoped_acquire gil;
        (*held)();
    };
}

}  // namespace microbatch::python
