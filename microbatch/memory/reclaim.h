#pragma once

#include <cstdint>
#include <exception>
#include <functional>
#include <optional>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

namespace microbatch {

/// Something that can free memory when it has run out.
struct Reclaimer {
    /// Returns true if memory was freed (or less is needed from now on), so another attempt is worthwhile.
    std::function<bool()> reclaim;
    /// True if the next attempt counts as an out-of-memory retry. False if reclaiming loses nothing, such as waiting
    /// for a checkpoint's copy.
    bool counts = true;
};

/// In the order in which they are asked: cheapest first.
using Reclaimers = std::vector<Reclaimer>;

/// True if it is c10::OutOfMemoryError, or an exception that a registered test recognises.
bool is_oom(const std::exception_ptr& failure);

/// Adds a test to is_oom(), for exceptions from another language. Threads: any.
void register_oom_test(std::function<bool(const std::exception_ptr&)> test);

/// The message of an exception, without a stack trace.
std::string message_of(const std::exception_ptr& failure);

/// Calls `attempt`. Returns an empty result if it ran out of memory, with the error message in `message`. By then, the
/// exception, which keeps tensors of the attempt alive, has been destroyed.
template <class Attempt>
auto unless_oom(const Attempt& attempt, std::string* message = nullptr) {
    using Result = std::invoke_result_t<Attempt>;
    using Holder = std::conditional_t<std::is_void_v<Result>, std::true_type, Result>;
    std::optional<Holder> result;
    try {
        if constexpr (std::is_void_v<Result>) {
            attempt();
            result.emplace();
        } else {
            result.emplace(attempt());
        }
    } catch (...) {
        const std::exception_ptr failure = std::current_exception();
        if (!is_oom(failure)) throw;
        if (message != nullptr) *message = message_of(failure);
    }
    return result;
}

/// Returns the first reclaimer that frees something; null if none does. Also frees the allocator's caches.
const Reclaimer* reclaim(const Reclaimers& reclaimers);

/// Calls `attempt` until it does not run out of memory. After each failure, `undo` runs, then the reclaimers are asked
/// in order; `retried(reclaimer, message)` reports which one helped. If none does, `give_up(message)` throws. The only
/// place where running out of memory is handled.
template <class Attempt, class Undo, class Retried, class GiveUp>
auto retry_on_oom(const Reclaimers& reclaimers, const Attempt& attempt, const Undo& undo, const Retried& retried,
                  const GiveUp& give_up) {
    while (true) {
        std::string message;
        if (auto result = unless_oom(attempt, &message)) return std::move(*result);
        undo();
        const Reclaimer* helped = reclaim(reclaimers);
        if (helped == nullptr) give_up(message);
        retried(*helped, message);
    }
}

}  // namespace microbatch
