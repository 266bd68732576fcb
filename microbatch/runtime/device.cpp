#include "microbatch/runtime/device.h"

#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <c10/core/impl/VirtualGuardImpl.h>

#include <string>

#include "microbatch/core/error.h"
#include "microbatch/core/str_cat.h"

namespace microbatch {
namespace {

c10::DeviceIndex count_of(c10::DeviceType type) {
    if (type == c10::kCPU) return 1;
    return c10::impl::hasDeviceGuardImpl(type) ? c10::impl::VirtualGuardImpl(type).deviceCount() : 0;
}

}  // namespace

std::vector<at::Device> devices_here() {
    std::vector<at::Device> all{at::kCPU};
    for (int type = 1; type < static_cast<int>(c10::COMPILE_TIME_MAX_DEVICE_TYPES); ++type) {
        const auto kind = static_cast<c10::DeviceType>(type);
        if (kind == c10::kMeta) continue;
        for (c10::DeviceIndex i = 0; i < count_of(kind); ++i) all.emplace_back(kind, i);
    }
    return all;
}

void require_device(at::Device device) {
    const c10::DeviceIndex index = device.has_index() ? device.index() : c10::DeviceIndex{0};
    if (index < count_of(device.type())) return;
    std::string all;
    for (const at::Device& one : devices_here()) all += str_cat(all.empty() ? "" : ", ", one.str());
    throw Error(ErrorKind::usage, str_cat("there is no device ", device.str(), " here: there is ", all));
}

void wait_for(at::Device device) {
    if (device.is_cpu()) return;
    const c10::impl::VirtualGuardImpl guard(device.type());
    guard.synchronizeStream(guard.getStream(device));
}

}  // namespace microbatch
