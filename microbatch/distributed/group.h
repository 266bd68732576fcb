#pragma once

#include <ATen/core/Tensor.h>

#include <chrono>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

namespace microbatch {

struct Backend;

/// The processes that train together ("ranks"), over torch's c10d. A function that all have to call says so.
///
/// Faults:  if a rank ends or hangs, the others' calls throw ErrorKind::lost_rank, which names the rank and, if it said
///          so, why it ended; every later call throws the same.
/// Threads: no two calls at the same time; each rank calls the same functions in the same order.
/// Cost:    a call with little data, one round trip of the network: some 0.1 ms on one machine.
class Group {
public:
    struct Options {
        /// How long the others are waited for although they show that they are alive.
        std::chrono::milliseconds timeout = std::chrono::minutes(30);
        /// A rank that shows no sign of life for so long has ended.
        std::chrono::milliseconds silence = std::chrono::seconds(6);
    };

    Group(Backend backend, Options options);
    Group(const Group&) = delete;
    Group& operator=(const Group&) = delete;
    ~Group();

    int rank() const;
    int size() const;

    /// Sums each tensor over all ranks, in place, with the same bits on all. All ranks, with tensors of the same shapes
    /// and types. The calls for large tensors overlap.
    void sum(const std::vector<at::Tensor>& tensors);

    /// The tensors of all ranks, in order. All ranks, with one shape and type.
    std::vector<at::Tensor> gather(const at::Tensor& mine);

    /// The bytes of all ranks, in order, of any length. All ranks.
    std::vector<std::string> gather_bytes(const std::string& mine);

    /// Sums each tensor over all ranks into the one of the rank `roots` names; on the others, its values are undefined
    /// afterwards. All ranks, as sum().
    void sum_to(const std::vector<at::Tensor>& tensors, const std::vector<int>& roots);

    /// Overwrites each tensor with that of the rank that `roots` names, in place. All ranks.
    void broadcast(const std::vector<at::Tensor>& tensors, const std::vector<int>& roots);
    void broadcast(const std::vector<at::Tensor>& tensors, int root) {
        broadcast(tensors, std::vector<int>(tensors.size(), root));
    }

    /// True if it is true for any rank. All ranks.
    bool any(bool mine);

    /// Shows no more signs of life, as a rank that hangs: for tests.
    void fall_silent();

    /// Tells the others that this rank ends because of an error, which they will name.
    void leave(const std::string& why) noexcept;

    /// leave(), and every later call throws: what this rank has done, the others have not.
    void abandon(const std::string& why) noexcept;

private:
    struct Calls;
    std::unique_ptr<Calls> calls_;
};

}  // namespace microbatch
