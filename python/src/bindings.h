#pragma once

#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/pybind.h>

namespace microbatch::python {

namespace py = pybind11;

// One for each file of this folder.
void bind_errors(py::module_& module);
void bind_memory(py::module_& module);
void bind_optimizers(py::module_& module);
void bind_accumulator(py::module_& module);
void bind_group(py::module_& module);
void bind_plan(py::module_& module);
void bind_analysis(py::module_& module);
void bind_schedule(py::module_& module);
void bind_run(py::module_& module);
void bind_ops(py::module_& module);

}  // namespace microbatch::python
