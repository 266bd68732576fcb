#pragma once

#include "microbatch/state/state_dict.h"
#include "python/src/bindings.h"

namespace microbatch::python {

/// Scalars and tensors by name, as a Python dict.
py::dict to_dict(const StateDict& state);

/// Errors: as a cast that does not fit.
StateDict from_dict(const py::dict& values);

}  // namespace microbatch::python
