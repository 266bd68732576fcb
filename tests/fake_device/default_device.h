#pragma once

#include <c10/core/Device.h>

namespace fake {

/// From now on, tensors that are made without naming a device are made on this one, on every thread: what was written for
/// the CPU runs on it. Data given to at::tensor() stay on the CPU.
void make_tensors_on(c10::Device device);

/// While it lives, this thread makes them on the CPU again.
class MakeOnCpu {
public:
    MakeOnCpu();
    ~MakeOnCpu();
    MakeOnCpu(const MakeOnCpu&) = delete;
    MakeOnCpu& operator=(const MakeOnCpu&) = delete;
};

}  // namespace fake
