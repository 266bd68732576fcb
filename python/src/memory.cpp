#include "microbatch/core/units.h"
#include "microbatch/memory/budget_allocator.h"
#include "microbatch/memory/machine.h"
#include "python/src/bindings.h"

namespace microbatch::python {

void bind_memory(py::module_& module) {
    module.attr("no_budget") = no_budget;
    module.def("install", &install_budget_allocator);
    module.def("memory_use", [] {
        const MemoryUse use = memory_use();
        return py::make_tuple(use.live_bytes, use.peak_bytes, use.cached_bytes);
    });
    module.def("reset_peak", &reset_peak_memory);
    module.def("budget", &memory_budget);
    module.def("set_budget", &set_memory_budget, py::arg("bytes"));
    module.def(
        "parse_bytes", [](const std::string& text) { return parse_bytes(text); }, py::arg("text"));
    module.def("format_bytes", &format_bytes, py::arg("bytes"));
    module.def("available_memory", &available_memory_bytes);
    module.def("fail_allocation", &fail_allocation, py::arg("countdown"));
    module.def("allocation_count", &allocation_count);
}

}  // namespace microbatch::python
