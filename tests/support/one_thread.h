#pragma once

#include <ATen/Parallel.h>

namespace microbatch::test {

/// The tests that include this run on one thread: their bits must not depend on the machine, and tensors as small as
/// theirs gain nothing from a second thread but wait for it on a busy machine, seconds for milliseconds.
inline const bool one_thread = (at::set_num_threads(1), true);

}  // namespace microbatch::test
