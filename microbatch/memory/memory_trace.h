#pragma once

#include <ATen/record_function.h>
#include <c10/core/Device.h>
#include <c10/util/ThreadLocalDebugInfo.h>

#include <cstdint>
#include <memory>
#include <optional>
#include <vector>

namespace microbatch {

/// Live bytes of a device after every allocation and release, in their order, from now until stop().
///
/// Those of this thread, the backward pass included; what other threads allocate is in the figures, but no event of its
/// own: the workers of at::parallel_for come in an order of chance. The same program on another size of micro-batch
/// gives a trace of the same length.
///
/// State:   a trace made while another one lives hides that one's events until it stops; so does torch's profiler.
///          Traces end in the opposite order of their beginning, in the thread in which they began.
/// Threads: live_bytes() and clear() only while nothing allocates.
/// Cost:    8 bytes and some tens of nanoseconds an event.
class MemoryTrace {
public:
    explicit MemoryTrace(at::Device device);
    MemoryTrace(const MemoryTrace&) = delete;
    MemoryTrace& operator=(const MemoryTrace&) = delete;
    ~MemoryTrace();

    /// Nothing is recorded from now on; a second call does nothing.
    void stop();

    /// Ends before the first event that there was no memory to record: see complete().
    const std::vector<std::int64_t>& live_bytes() const;

    /// False where memory for the trace itself ran out.
    bool complete() const;

    void clear();

private:
    class Recorder;

    std::shared_ptr<Recorder> recorder_;
    std::optional<c10::DebugInfoGuard> guard_;
};

/// As long as it lives, no trace of this thread has an event: for this thread's share of work whose allocations come in
/// an order of chance. What all threads can hold together is told before, by expect_memory(). Torch's profiler sees
/// neither memory nor operators of it.
class UntracedMemory {
public:
    UntracedMemory();

private:
    at::RecordFunctionGuard no_operators_;  // the profiler would take what stands in its place for its own
    c10::DebugInfoGuard guard_;
};

}  // namespace microbatch
