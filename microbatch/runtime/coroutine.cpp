#include "microbatch/runtime/coroutine.h"

#include <ATen/ThreadLocalState.h>

#include <semaphore>
#include <thread>
#include <utility>

#include "microbatch/runtime/autocast_types.h"

namespace microbatch {

struct Coroutine::Shared {
    std::function<void()> function;
    at::ThreadLocalState state = {};
    AutocastTypes autocast = {};
    std::binary_semaphore function_runs{0};
    std::binary_semaphore caller_runs{0};
    const std::function<void()>* work = nullptr;  // for the caller's thread
    std::exception_ptr failure = {};              // of the work, or of the function
    bool cancelled = false;
    bool ended = false;
    std::thread thread = {};

    void run() {
        function_runs.acquire();
        current() = this;
        const at::ThreadLocalStateGuard guard(state);
        autocast.establish();
        try {
            if (!cancelled) function();
        } catch (...) {
            failure = std::current_exception();
        }
        function = nullptr;
        ended = true;
        caller_runs.release();
    }

    void yield() {
        if (cancelled) throw Cancelled();
        caller_runs.release();
        function_runs.acquire();
        if (cancelled) throw Cancelled();
    }

    void resume() {
        function_runs.release();
        caller_runs.acquire();
    }

    static Shared*& current() {
        static thread_local Shared* shared = nullptr;
        return shared;
    }
};

Coroutine::Coroutine(std::function<void()> function) : shared_(new Shared{.function = std::move(function)}) {
    shared_->thread = std::thread([shared = shared_.get()] { shared->run(); });
}

Coroutine::~Coroutine() {
    shared_->cancelled = true;
    if (!shared_->ended) shared_->resume();
    shared_->thread.join();
}

void Coroutine::advance() {
    shared_->resume();
    while (const auto* work = std::exchange(shared_->work, nullptr)) {
        try {
            (*work)();
        } catch (...) {
            shared_->failure = std::current_exception();
        }
        shared_->resume();
    }
    if (shared_->ended && shared_->failure) std::rethrow_exception(std::exchange(shared_->failure, nullptr));
}

bool Coroutine::ended() const {
    return shared_->ended;
}

void Coroutine::pause() {
    Shared::current()->yield();
}

void Coroutine::on_caller(const std::function<void()>& work) {
    Shared& shared = *Shared::current();
    shared.work = &work;
    shared.yield();
    if (shared.failure) std::rethrow_exception(std::exchange(shared.failure, nullptr));
}

}  // namespace microbatch
