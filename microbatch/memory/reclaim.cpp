#include "microbatch/memory/reclaim.h"

#include <c10/util/Exception.h>

#include <algorithm>
#include <mutex>

#include "microbatch/memory/budget_allocator.h"

namespace microbatch {
namespace {

struct Tests {
    std::mutex mutex;
    std::vector<std::function<bool(const std::exception_ptr&)>> all;
};

Tests& tests() {
    static Tests tests;
    return tests;
}

}  // namespace

bool is_oom(const std::exception_ptr& failure) {
    try {
        std::rethrow_exception(failure);
    } catch (const c10::OutOfMemoryError&) {
        return true;
    } catch (...) {
        const std::lock_guard lock(tests().mutex);
        return std::any_of(tests().all.begin(), tests().all.end(), [&](const auto& test) { return test(failure); });
    }
}

void register_oom_test(std::function<bool(const std::exception_ptr&)> test) {
    const std::lock_guard lock(tests().mutex);
    tests().all.push_back(std::move(test));
}

std::string message_of(const std::exception_ptr& failure) {
    try {
        std::rethrow_exception(failure);
    } catch (const c10::Error& error) {
        return error.what_without_backtrace();
    } catch (const std::exception& error) {
        return error.what();
    } catch (...) {
        return "an exception of unknown type";
    }
}

const Reclaimer* reclaim(const Reclaimers& reclaimers) {
    for (const Reclaimer& one : reclaimers) {
        if (!one.reclaim || !one.reclaim()) continue;
        release_cached_memory();
        return &one;
    }
    return nullptr;
}

}  // namespace microbatch
