#pragma once

#include <cstdint>
#include <functional>

namespace microbatch {

/// Calls work(begin, end) on ranges that partition [0, count), one per torch thread; once on the whole range if count
/// is below `grain` or the caller already is one of these threads.
///
/// Unlike at::parallel_for, which is compiled into its caller and needs OpenMP there, this always runs in LibTorch's
/// threads.
/// Errors: one of the exceptions that the calls throw.
/// Cost:   no tensor memory; one parallel region.
void in_parallel(std::int64_t count, std::int64_t grain, const std::function<void(std::int64_t, std::int64_t)>& work);

/// The number of per-thread slots, indexed by at::get_thread_num(), that in_parallel needs when called here: inside
/// another parallel region it uses the current thread, whatever its number.
std::int64_t thread_places();

/// During its lifetime, oneDNN's operators called from this thread run in this thread alone. Required for calls inside
/// in_parallel: otherwise, oneDNN expects all threads, and its weight gradients wait forever for the others.
class OneThread {
public:
    OneThread();
    OneThread(const OneThread&) = delete;
    OneThread& operator=(const OneThread&) = delete;
    ~OneThread();

    /// True if this torch's threads support it (OpenMP).
    static bool possible();

private:
    int before_;
};

}  // namespace microbatch
