#pragma once

#include <cstdint>
#include <functional>

namespace microbatch {

/// Calls work(begin, end) for ranges that make up [0, count), one for each of torch's threads; once, for all of it,
/// where count is below `grain` or this is one of those threads already.
///
/// Unlike at::parallel_for, which is compiled into its caller and needs OpenMP there, this runs in LibTorch's own
/// threads, whatever they are.
/// Errors: one of what the calls throw.
/// Cost:   no tensor memory; one parallel region.
void in_parallel(std::int64_t count, std::int64_t grain, const std::function<void(std::int64_t, std::int64_t)>& work);

/// So many places for memory by at::get_thread_num() have room for every thread that in_parallel, called here, can use:
/// in one of somebody else's threads it uses that one, whatever its number.
std::int64_t thread_places();

/// As long as it lives, oneDNN's operators called from this thread run in it alone: what in_parallel calls must say so
/// before it calls one. oneDNN itself counts on all threads there, and its weight gradients then wait for ever for
/// those that do not come.
class OneThread {
public:
    OneThread();
    OneThread(const OneThread&) = delete;
    OneThread& operator=(const OneThread&) = delete;
    ~OneThread();

    /// Whether this torch has threads for which that can be said (OpenMP's).
    static bool possible();

private:
    int before_;
};

}  // namespace microbatch
