#pragma once

#include <torch/csrc/distributed/c10d/Backend.hpp>
#include <torch/csrc/distributed/c10d/Store.hpp>

namespace microbatch {

/// What a Group is made of. Not for users: its headers are heavy.
struct Backend {
    c10::intrusive_ptr<c10d::Backend> calls;  ///< for tensors on the CPU
    c10::intrusive_ptr<c10d::Store>
        store;  ///< for signs of life; without one, a rank that hangs is found by the timeout
};

}  // namespace microbatch
