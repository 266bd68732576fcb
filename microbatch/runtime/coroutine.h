#pragma once

#include <exception>
#include <functional>
#include <memory>

namespace microbatch {

/// A function that runs on a thread of its own, in turn with the caller: exactly one of the two runs at any time.
///
///     Coroutine side([&] { first(); Coroutine::pause(); second(); });
///     side.advance();  // runs first()
///     side.advance();  // runs second(); side.ended() is now true
///
/// The function starts with the caller's thread-local state of torch (grad mode, dispatch keys, autocast, modes).
/// Errors:  what the function throws comes out of advance(), after which the coroutine has ended.
/// State:   a destroyed coroutine that has not ended is cancelled: its pending pause() or on_caller() throws Cancelled,
///          and so does every later one; the destructor waits until the function has returned.
/// Threads: advance() belongs to the thread that created it; the static functions to the function's thread.
/// Cost:    a thread; two switches per call, some microseconds each.
class Coroutine {
public:
    struct Cancelled : std::exception {
        const char* what() const noexcept override { return "cancelled, because another part of the batch failed"; }
    };

    explicit Coroutine(std::function<void()> function);
    Coroutine(const Coroutine&) = delete;
    Coroutine& operator=(const Coroutine&) = delete;
    ~Coroutine();

    /// Runs the function until it next pauses or ends. Requires: !ended().
    void advance();
    bool ended() const;

    /// In the function: returns control to the caller until its next advance().
    static void pause();

    /// In the function: runs `work` on the caller's thread, as part of its advance(). Throws what `work` throws.
    static void on_caller(const std::function<void()>& work);

private:
    struct Shared;

    std::unique_ptr<Shared> shared_;
};

}  // namespace microbatch
