#include "python/src/batch.h"

#include <c10/util/Exception.h>

#include <string>
#include <utility>
#include <vector>

namespace microbatch::python {
namespace {

bool is_tensor(const py::handle& value) {
    return THPVariable_Check(value.ptr());
}

std::string type_of(const py::handle& value) {
    return py::str(py::type::handle_of(value).attr("__name__"));
}

// torch's Python code says it by a ValueError; the library knows the C++ one.
[[noreturn]] void rethrow_known(py::error_already_set& error) {
    if (error.matches(PyExc_ValueError)) {
        const std::string text = py::str(error.value());
        if (text.find("Expected more than 1 value per channel") != std::string::npos) TORCH_CHECK_VALUE(false, text);
    }
    throw;
}

}  // namespace

PythonBatch::PythonBatch(py::handle source) : source_(source), size_(source.attr("size").cast<std::int64_t>()) {}

PythonBatch::~PythonBatch() {
    const py::gil_scoped_acquire gil;
    micro_ = py::object();
}

Batch PythonBatch::fetch(Slice slice) const {
    const py::gil_scoped_acquire gil;
    micro_ = py::object();
    const py::tuple fetched = source_.attr("fetch")(slice.begin, slice.end);
    Batch batch{fetched[1].cast<std::vector<at::Tensor>>()};
    micro_ = fetched[0];
    return batch;
}

std::uint32_t PythonBatch::fingerprint() const {
    const py::gil_scoped_acquire gil;
    return source_.attr("fingerprint")().cast<std::uint32_t>();
}

WeightedLoss weighted_loss(const py::object& result) {
    const bool is_pair = py::isinstance<py::tuple>(result) || py::isinstance<py::list>(result);
    if (!is_pair || py::len(result) != 2) {
        throw py::type_error("the loss function returned " +
                             (is_pair ? std::to_string(py::len(result)) + " values" : "one " + type_of(result)) +
                             "; return a pair: the sum of the loss over the micro-batch, and what it is averaged over "
                             "(samples or target tokens)");
    }
    const py::sequence pair = result;
    const py::object sum = pair[0], weight = pair[1];
    if (!is_tensor(sum)) {
        throw py::type_error("the loss function returned a " + type_of(sum) +
                             " as the sum; return a tensor of one element that backward() can start from");
    }
    try {
        return {sum.cast<at::Tensor>(), weight.attr("__float__")().cast<double>()};
    } catch (const py::error_already_set& error) {
        if (!error.matches(PyExc_AttributeError)) throw;
    }
    throw py::type_error("the loss function returned a " + type_of(weight) +
                         " as the weight; return a number or a tensor of one element");
}

LossFunction loss_of(const PythonBatch& batch, py::handle loss) {
    return [&batch, loss](const Batch&) {
        const py::gil_scoped_acquire gil;
        try {
            return weighted_loss(loss(batch.take()));
        } catch (py::error_already_set& error) {
            rethrow_known(error);
        }
    };
}

}  // namespace microbatch::python
