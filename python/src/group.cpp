#include "python/src/group.h"

#include <torch/csrc/distributed/c10d/GroupRegistry.hpp>
#include <torch/csrc/distributed/c10d/ProcessGroup.hpp>

#include <string>

#include "microbatch/core/error.h"
#include "microbatch/distributed/backend.h"
#include "microbatch/distributed/group_reducer.h"

namespace microbatch::python {
namespace {

// None if the group has none for tensors on the CPU.
c10::intrusive_ptr<c10d::Backend> cpu_backend_of(c10d::ProcessGroup& group) {
    try {
        return group.getBackend(c10::kCPU);
    } catch (const c10::Error&) {
        return {};
    }
}

std::shared_ptr<Group> group_named(const std::string& name) {
    const py::gil_scoped_release released;
    const auto group = c10d::resolve_process_group(name);
    Backend backend{.calls = cpu_backend_of(*group), .store = group->getStore()};
    require_that(backend.calls.defined(),
                 "the process group has no backend for tensors on the CPU: init_process_group(\"gloo\")");
    return std::make_shared<Group>(std::move(backend), Group::Options{});
}

}  // namespace

std::shared_ptr<Reducer> reducer_of(const std::shared_ptr<Group>& group, bool whole) {
    if (!group) return std::make_shared<LocalReducer>();
    return std::make_shared<GroupReducer>(group, whole ? Batches::whole : Batches::own);
}

void bind_group(py::module_& module) {
    py::class_<Group, std::shared_ptr<Group>>(module, "Group").def(py::init(&group_named), py::arg("name"));
}

}  // namespace microbatch::python
