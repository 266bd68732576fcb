#include "microbatch/memory/memory_trace.h"

#include <c10/core/Allocator.h>

#include <mutex>
#include <new>

#include "microbatch/memory/budget_allocator.h"

namespace microbatch {

class MemoryTrace::Recorder final : public c10::MemoryReportingInfoBase {
public:
    explicit Recorder(at::Device device) : device_(device) {}

    void reportMemoryUsage(void* /*data*/, std::int64_t /*bytes*/, std::size_t total_allocated,
                           std::size_t /*total_reserved*/, at::Device device) override {
        // Devices without an index are of a type with a single device.
        if (device.type() != device_.type() || (device_.has_index() && device.index() != device_.index())) return;
        const std::lock_guard lock(mutex_);
        if (!complete_) return;
        // Called inside releases, which must not throw.
        try {
            live_bytes_.push_back(static_cast<std::int64_t>(total_allocated));
        } catch (const std::bad_alloc&) {
            complete_ = false;
        }
    }

    bool memoryProfilingEnabled() const override { return true; }

    void clear() {
        const std::lock_guard lock(mutex_);
        live_bytes_.clear();
        complete_ = true;
    }

    const std::vector<std::int64_t>& live_bytes() const { return live_bytes_; }
    bool complete() const { return complete_; }

private:
    at::Device device_;
    std::mutex mutex_;
    std::vector<std::int64_t> live_bytes_;
    bool complete_ = true;
};

namespace {

class Nobody final : public c10::MemoryReportingInfoBase {
public:
    void reportMemoryUsage(void* /*data*/, std::int64_t /*bytes*/, std::size_t /*total_allocated*/,
                           std::size_t /*total_reserved*/, at::Device /*device*/) override {}
    bool memoryProfilingEnabled() const override { return false; }
};

}  // namespace

class MemoryTrace::Guard {
public:
    explicit Guard(std::shared_ptr<Recorder> recorder)
        : guard_(c10::DebugInfoKind::PROFILER_STATE, std::move(recorder)) {}

private:
    c10::DebugInfoGuard guard_;
};

MemoryTrace::MemoryTrace(at::Device device) : recorder_(std::make_shared<Recorder>(device)) {
    if (device.is_cpu()) install_budget_allocator();
    guard_ = std::make_unique<Guard>(recorder_);
}

MemoryTrace::~MemoryTrace() = default;

void MemoryTrace::stop() {
    guard_.reset();
}

const std::vector<std::int64_t>& MemoryTrace::live_bytes() const {
    return recorder_->live_bytes();
}

bool MemoryTrace::complete() const {
    return recorder_->complete();
}

void MemoryTrace::clear() {
    recorder_->clear();
}

UntracedMemory::UntracedMemory()
    : no_operators_(/*is_enabled=*/false), guard_(c10::DebugInfoKind::PROFILER_STATE, std::make_shared<Nobody>()) {}

}  // namespace microbatch
