#pragma once

#include "microbatch/state/stateful.h"
#include "python/src/bindings.h"

namespace microbatch::python {

/// Scalars and tensors by name, as a Python dict.
py::dict to_dict(const StateDict& state);

/// Errors: as a cast that does not fit.
StateDict from_dict(const py::dict& values);

/// The commit that calls a Python function. It may be dropped without the GIL.
Commit commit_of(py::object function);

}  // namespace microbatch::python
