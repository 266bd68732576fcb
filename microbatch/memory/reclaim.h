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

/// Something that can give memory back when it has run out.
struct Reclaimer {
    /// True if memory was freed (or less is needed from now on), and another attempt is worthwhile.
    std::function<bool()> reclaim;
    /// The attempt that follows is reported as one that ran out of memory. False where nothing is lost by reclaiming,
    /// such as waiting for a checkpoint's copy.
    bool counts = true;
};

/// In the order in which they are asked: the cheapest loss first.
using Reclaimers = std::vector<Reclaimer>;

/// True if it is c10::OutOfMemoryError, or an exception that a registered test takes for one.
bool is_oom(const std::exception_ptr& failure);

/// Adds a test to is_oom(), for exceptions of another language. Threads: any.
void register_oom_test(std::function<bool(const std::exception_ptr&)> test);

/// What an exception says, without a stack trace.
std::string message_of(const std::exception_ptr& failure);

/// Calls `attempt`. Returns none if it ran out of memory, with what was said in `message`: by then the exception, which
/// keeps tensors of the attempt alive, is gone.
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

/// The first of the reclaimers that frees something; null if none does. Caches are emptied too.
const Reclaimer* reclaim(const Reclaimers& reclaimers);

/// Calls `attempt` until it does not run out of memory. After each failure `undo` runs, then the reclaimers are asked
/// in their order; `retried(reclaimer, message)` tells which one helped. Where none does, `give_up(message)` throws.
/// The one place where running out of memory is handled.
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
