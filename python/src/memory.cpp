#include "microbatch/core/units.h"
#include "microbatch/memory/budget_allocator.h"
#include "microbatch/memory/machine.h"
#include "microbatch/memory/meter.h"
#include "microbatch/runtime/uploader.h"
#include "python/src/bindings.h"

namespace microbatch::python {

void bind_memory(py::module_& module) {
    module.attr("no_budget") = no_budget;
    module.def("install", &install_budget_allocator);
    // Without counting CPU tensors from now on, as their meter does.
    module.def(
        "memory_use",
        [](at::Device device) {
            const MemoryUse use = device.is_cpu() ? memory_use() : meter_of(device).use();
            return py::make_tuple(use.live_bytes, use.peak_bytes, use.cached_bytes, use.peak_reserved_bytes);
        },
        py::arg("device"));
    module.def(
        "reset_peak", [](at::Device device) { device.is_cpu() ? reset_peak_memory() : meter_of(device).reset_peak(); },
        py::arg("device"));
    module.def(
        "budget",
        [](at::Device device) {
            if (device.is_cpu()) return memory_budget();
            const Meter& meter = meter_of(device);
            return meter.has_budget() ? meter.budget() : no_budget;
        },
        py::arg("device"));
    module.def(
        "set_budget",
        [](std::int64_t bytes, at::Device device, bool is_new) {
            Meter& meter = meter_of(device);
            const std::int64_t before = meter.has_budget() ? meter.budget() : no_budget;
            if (is_new) require_budget_fits(meter, bytes);
            meter.set_budget(bytes);
            return before;
        },
        py::arg("bytes"), py::arg("device"), py::arg("is_new"));
    module.def(
        "set_device_limiter",
        [](const py::function& limiter) {
            // Never destroyed: it may outlive the interpreter.
            set_device_limiter([limiter = new py::function(limiter)](at::Device device, std::int64_t bytes) {
                const py::gil_scoped_acquire gil;
                return (*limiter)(device, bytes).cast<bool>();
            });
        },
        py::arg("limiter"));
    module.def(
        "parse_bytes", [](const std::string& text) { return parse_bytes(text); }, py::arg("text"));
    module.def("format_bytes", &format_bytes, py::arg("bytes"));
    module.def(
        "available_memory",
        [](at::Device device) { return device.is_cpu() ? available_memory_bytes() : meter_of(device).available(); },
        py::arg("device"));
    py::class_<Uploader>(module, "Uploader")
        .def(py::init<at::Device>(), py::arg("device"))
        .def("upload", &Uploader::upload, py::arg("tensors"), py::call_guard<py::gil_scoped_release>());
    module.def("fail_allocation", &fail_allocation, py::arg("countdown"));
    module.def("allocation_count", &allocation_count);
}

}  // namespace microbatch::python
