#pragma once

#include <c10/core/Device.h>

#include <vector>

namespace microbatch {

/// Every device of this process, the CPU first.
std::vector<at::Device> devices_here();

/// Throws ErrorKind::usage, saying which devices there are, unless the device exists in this process.
void require_device(at::Device device);

/// Waits until the device has finished all work queued on its current stream. Returns at once for the CPU.
void wait_for(at::Device device);

}  // namespace microbatch
