#include "python/src/state.h"

#include <string>

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

}  // namespace microbatch::python
