#pragma once

#include <ATen/core/Tensor.h>

#include "fake_device/default_device.h"

namespace fake {

/// The tensor in the device's memory as a tensor of the CPU. For kernels only.
at::Tensor as_cpu(const at::Tensor& of);

/// What a kernel does first: copies to the device that were put off happen.
void begin_kernel();

/// What the host does to wait: copies to the host that were put off arrive.
void wait();

/// Between the device and the host, or on the device.
void copy(const at::Tensor& from, const at::Tensor& to, bool non_blocking);

/// A number read by the host.
void count_scalar();

/// While it lives, this thread is the device: what it copies is not counted.
class OnDevice {
public:
    OnDevice();
    ~OnDevice();
    OnDevice(const OnDevice&) = delete;
    OnDevice& operator=(const OnDevice&) = delete;
    static bool now();

private:
    MakeOnCpu make_on_cpu_;
};

}  // namespace fake
