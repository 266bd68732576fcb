#pragma once

#include <c10/core/Device.h>

#include <string>

namespace microbatch {

/// Throws ErrorKind::usage, saying which devices there are, unless the device exists in this process.
void require_device(at::Device device);

/// The device of a name such as "cpu", "cuda" or "cuda:1", with its index. Errors: ErrorKind::usage if the name is not one
/// of a device, or there is none of that name here.
at::Device device_named(const std::string& name);

/// Waits until the device has done all that was queued for it. Nothing for the CPU.
void wait_for(at::Device device);

}  // namespace microbatch
