#pragma once

#include <torch/csrc/distributed/c10d/HashStore.hpp>

#include <chrono>
#include <exception>
#include <functional>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "microbatch/distributed/gloo.h"
#include "microbatch/distributed/group.h"

namespace microbatch::test {

using Rank = std::function<void(const std::shared_ptr<Group>&)>;

/// Runs a rank in each of `size` threads of this process, and returns what each has thrown.
inline std::vector<std::exception_ptr> failures_of_ranks(int size, const Rank& run, Group::Options options = {}) {
    const auto store = c10::make_intrusive<c10d::HashStore>();
    std::vector<std::exception_ptr> failures(static_cast<std::size_t>(size));
    std::vector<std::thread> ranks;
    for (int rank = 0; rank < size; ++rank) {
        ranks.emplace_back([&, rank] {
            std::shared_ptr<Group> group;
            try {
                group = std::make_shared<Group>(make_gloo(store, rank, size, "127.0.0.1", std::chrono::seconds(60)),
                                                options);
                run(group);
            } catch (...) {
                failures[static_cast<std::size_t>(rank)] = std::current_exception();
                if (group) group->leave("it failed");
            }
        });
    }
    for (std::thread& rank : ranks) rank.join();
    return failures;
}

/// Runs the ranks, and throws what the first that failed has thrown.
inline void run_ranks(int size, const Rank& run) {
    for (const std::exception_ptr& failure : failures_of_ranks(size, run)) {
        if (failure) std::rethrow_exception(failure);
    }
}

}  // namespace microbatch::test
