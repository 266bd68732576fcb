#pragma once

#include <chrono>
#include <string>

#include "microbatch/distributed/backend.h"

namespace microbatch {

/// torch's Gloo backend for tensors on the CPU, which works in C++ alone. Waits until every rank has called it.
///
/// `address`: the local address or host name to listen on; empty: that of this machine's name.
/// Errors: what torch throws if the others do not come within the timeout, or cannot be reached.
Backend make_gloo(const c10::intrusive_ptr<c10d::Store>& store, int rank, int size, const std::string& address,
                  std::chrono::milliseconds timeout);

}  // namespace microbatch
