#include "python/src/batch.h"

#include <c10/util/Exception.h>

#include <string>
#include <utility>
#include <vector>

#include "python/src/state.h"

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

LastMicroBatch::~LastMicroBatch() {
    const py::gil_scoped_acquire gil;
    micro_ = py::object();
}

Batch LastMicroBatch::keep(const py::tuple& fetched) const {
    Batch batch{fetched[1].cast<std::vector<at::Tensor>>()};
    micro_ = fetched[0];
    return batch;
}

Batch PythonBatch::fetch(Slice slice) const {
    const py::gil_scoped_acquire gil;
    drop();
    return keep(source_.attr("fetch")(slice.begin, slice.end));
}

std::int64_t PythonBatch::as_many_as(std::int64_t begin, std::int64_t samples) const {
    const py::gil_scoped_acquire gil;
    return source_.attr("as_many_as")(begin, samples).cast<std::int64_t>();
}

Batch PythonBatch::fetch_twice() const {
    const py::gil_scoped_acquire gil;
    drop();
    return keep(source_.attr("fetch_twice")());
}

std::uint32_t PythonBatch::fingerprint() const {
    const py::gil_scoped_acquire gil;
    return source_.attr("fingerprint")().cast<std::uint32_t>();
}

PythonDataset::PythonDataset(py::object data)
    : data_(std::move(data)),
      size_(data_.attr("size").cast<std::int64_t>()),
      tokens_per_sample_(data_.attr("tokens_per_sample").cast<std::int64_t>()),
      longest_sample_(data_.attr("longest_sample").cast<std::int64_t>()),
      has_state_(py::hasattr(data_, "save")) {}

PythonDataset::~PythonDataset() {
    const py::gil_scoped_acquire gil;
    data_ = py::object();
}

std::int64_t PythonDataset::length(std::int64_t index) const {
    const py::gil_scoped_acquire gil;
    return data_.attr("length")(index).cast<std::int64_t>();
}

void PythonDataset::arrange(std::vector<std::int64_t>& batch) const {
    const py::gil_scoped_acquire gil;
    batch = data_.attr("arrange")(batch).cast<std::vector<std::int64_t>>();
}

Batch PythonDataset::get(std::span<const std::int64_t> indices) const {
    const py::gil_scoped_acquire gil;
    drop();
    return keep(data_.attr("get")(std::vector<std::int64_t>(indices.begin(), indices.end())));
}

void PythonDataset::save(const StateWriter& writer) const {
    const py::gil_scoped_acquire gil;
    writer.merge(from_dict(data_.attr("save")()));
}

Commit PythonDataset::prepare(const StateReader& reader) {
    const py::gil_scoped_acquire gil;
    return commit_of(data_.attr("prepare")(to_dict(reader.copy())));
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
    if (is_tensor(weight)) {
        const auto of = weight.cast<at::Tensor>();
        if (of.numel() != 1) {
            throw py::type_error("the loss function returned a tensor of shape " +
                                 std::string(py::str(py::list(weight.attr("shape")))) +
                                 " as the weight; return a number or a tensor of one element");
        }
        return {sum.cast<at::Tensor>(), Weight(of)};
    }
    try {
        return {sum.cast<at::Tensor>(), weight.attr("__float__")().cast<double>()};
    } catch (const py::error_already_set& error) {
        if (!error.matches(PyExc_AttributeError)) throw;
    }
    throw py::type_error("the loss function returned a " + type_of(weight) +
                         " as the weight; return a number or a tensor of one element");
}

LossFunction loss_of(const LastMicroBatch& last, py::handle loss) {
    return [&last, loss](const Batch&) {
        const py::gil_scoped_acquire gil;
        try {
            return weighted_loss(loss(last.take()));
        } catch (py::error_already_set& error) {
            rethrow_known(error);
        }
    };
}

}  // namespace microbatch::python
