#include "python/src/group.h"

#include <torch/csrc/distributed/c10d/GroupRegistry.hpp>
#include <torch/csrc/distributed/c10d/ProcessGroup.hpp>

#include <string>

#include "microbatch/core/error.h"
#include "microbatch/distributed/backend.h"
#include "microbatch/distributed/group_reducer.h"

namespace microbatch::python {
namespace {

// The backend of a group of torch.distributed for a kind of device; none if the group has none for it.
c10::intrusive_ptr<c10d::Backend> backend_for(c10d::ProcessGroup& group, c10::DeviceType type) {
    try {
        return group.getBackend(type);
    } catch (const c10::Error&) {
        return {};
    }
}

std::shared_ptr<Group> group_named(const std::string& name, at::Device device) {
    const py::gil_scoped_release released;
    const auto group = c10d::resolve_process_group(name);
    Backend backend{.calls = backend_for(*group, c10::kCPU), .store = group->getStore()};
    if (!device.is_cpu()) backend.device_calls = backend_for(*group, device.type());
    const std::string kinds = device.is_cpu() ? "gloo" : "cpu:gloo,cuda:nccl";
    require_that(backend.calls && (device.is_cpu() || backend.device_calls),
                 "the process group has no backend for the tensors of ", device.is_cpu() ? "the CPU" : "the CPU and ",
                 device.is_cpu() ? "" : device.str(), ": init_process_group(\"", kinds, "\")");
    return std::make_shared<Group>(std::move(backend), Group::Options{});
}

}  // namespace

std::shared_ptr<Reducer> reducer_of(const std::shared_ptr<Group>& group, bool whole) {
    if (!group) return std::make_shared<LocalReducer>();
    return std::make_shared<GroupReducer>(group, whole ? Batches::whole : Batches::own);
}

void bind_group(py::module_& module) {
    py::class_<Group, std::shared_ptr<Group>>(module, "Group")
        .def(py::init(&group_named), py::arg("name"), py::arg("device"))
        .def_property_readonly("rank", &Group::rank)
        .def_property_readonly("size", &Group::size);
}

}  // namespace microbatch::python
