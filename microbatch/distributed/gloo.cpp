#include "microbatch/distributed/gloo.h"

#ifndef USE_C10D_GLOO
#define USE_C10D_GLOO
#endif
#include <torch/csrc/distributed/c10d/ProcessGroupGloo.hpp>

#include <cstdlib>

namespace microbatch {

Backend make_gloo(const c10::intrusive_ptr<c10d::Store>& store, int rank, int size, const std::string& address,
                  std::chrono::milliseconds timeout) {
    using Gloo = c10d::ProcessGroupGloo;
    const auto options = Gloo::Options::create(timeout);
    const char* interface = std::getenv("GLOO_SOCKET_IFNAME");  // torch's own variable
    options->devices.push_back(interface != nullptr ? Gloo::createDeviceForInterface(interface)
                               : address.empty()    ? Gloo::createDefaultDevice()
                                                    : Gloo::createDeviceForHostname(address));
    return {.calls = c10::make_intrusive<Gloo>(store, rank, size, options), .store = store};
}

}  // namespace microbatch
