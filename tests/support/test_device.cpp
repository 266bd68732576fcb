// Runs a test on another device: MICROBATCH_TEST_DEVICE=fake:0, or cuda:0 where there is one. What the test makes without
// naming a device is made there.
#include <cstdlib>

#include "fake_device/default_device.h"

namespace {

[[maybe_unused]] const bool chosen = [] {
    const char* const device = std::getenv("MICROBATCH_TEST_DEVICE");
    if (device != nullptr) fake::make_tensors_on(c10::Device(device));
    return true;
}();

}  // namespace
