#include "microbatch/runtime/parallel.h"

#include <ATen/Parallel.h>
#include <ATen/TensorIterator.h>
#include <ATen/ops/from_blob.h>

#include <algorithm>
#include <array>

// OpenMP's function, from the library that comes with torch; a torch with other threads has none.
extern "C" __attribute__((weak)) int omp_get_max_threads();
extern "C" __attribute__((weak)) void omp_set_num_threads(int threads);

namespace microbatch {

namespace {

// Ranges end at multiples of count / shares: fine enough for an even split among up to this many threads.
constexpr std::int64_t shares = 1024;

// A TensorIterator iterates over this: a thread's pointer into it tells where its range begins.
std::array<std::uint8_t, shares> places;

}  // namespace

void in_parallel(std::int64_t count, std::int64_t grain, const std::function<void(std::int64_t, std::int64_t)>& work) {
    if (count < grain) {
        if (count > 0) work(0, count);
        return;
    }
    const at::Tensor all = at::from_blob(places.data(), {shares}, at::kByte);
    at::TensorIterator iterator = at::TensorIteratorConfig().add_owned_const_input(all).build();
    const auto border = [count](std::int64_t share) {
        return count / shares * share + count % shares * share / shares;
    };
    const auto loop = [&](char** data, const std::int64_t*, std::int64_t length, std::int64_t) {
        const std::int64_t first = reinterpret_cast<std::uint8_t*>(data[0]) - places.data();
        const std::int64_t begin = border(first), end = border(first + length);
        if (begin < end) work(begin, end);
    };
    iterator.for_each(loop, /*grain_size=*/1);
}

std::int64_t thread_places() {
    return std::max(at::get_num_threads(), at::get_thread_num() + 1);
}

// Affects only the calling thread's task, neither torch's setting nor other threads.
OneThread::OneThread() : before_(possible() ? omp_get_max_threads() : 1) {
    if (possible()) omp_set_num_threads(1);
}

OneThread::~OneThread() {
    if (possible()) omp_set_num_threads(before_);
}

bool OneThread::possible() {
    return omp_get_max_threads != nullptr && omp_set_num_threads != nullptr;
}

}  // namespace microbatch
