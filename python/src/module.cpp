#include "python/src/bindings.h"

PYBIND11_MODULE(_core, module) {
    using namespace microbatch::python;
    module.doc() = "The C++ library; use the package `microbatch`, which wraps it.";
    bind_errors(module);
    bind_memory(module);
    bind_optimizers(module);
    bind_plan(module);
    bind_group(module);
    bind_accumulator(module);
    bind_analysis(module);
    bind_schedule(module);
    bind_run(module);
    bind_ops(module);
}
