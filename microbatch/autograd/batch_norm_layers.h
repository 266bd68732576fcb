#pragma once

#include <cstddef>
#include <map>
#include <optional>
#include <string>
#include <vector>

#include "microbatch/autograd/moments.h"
#include "microbatch/core/batch_norm.h"
#include "microbatch/state/stateful.h"

namespace microbatch {

/// True if these buffers are those of a model with BatchNorm layers that keep running statistics.
bool has_batch_norm(const NamedTensors& buffers);

/// True for the buffer in which a BatchNorm counts its batches.
bool counts_batches(const NamedTensor& buffer);

/// During its lifetime, the BatchNorm layers with these buffers follow a policy, deferred or frozen, while they are in
/// training mode. Works for every model, because it overrides torch's operator aten::batch_norm; layers are known by
/// their running statistics, and those without any are left as they are.
///
/// State:   running statistics and counts of batches change in finish() only, apart from those that a forward counts up
///          and the next one puts back.
/// Threads: one forward at a time; backward, which may run a layer again, on any thread. The first object of a process
///          overrides the operator: no other thread may compute at that moment.
/// Cost:    deferred: some operators on [channels] per layer and micro-batch; no second pass over the activations.
class BatchNormLayers {
public:
    /// Errors: ErrorKind::usage if another object already has these layers.
    BatchNormLayers(BatchNorm policy, const NamedTensors& buffers);
    BatchNormLayers(const BatchNormLayers&) = delete;
    BatchNormLayers& operator=(const BatchNormLayers&) = delete;
    ~BatchNormLayers();

    /// The calls from now on are those of a micro-batch's forward.
    void begin_forward();

    /// The calls until the next begin_forward() repeat earlier ones: they do not count.
    void end_forward();

    /// What finish() needs of the forwards here, in fp64 and one dimension: for pool() of another process.
    at::Tensor packed() const;

    /// Instead of those of the forwards here: the statistics of all processes, in order.
    /// Requires: they are packed by objects for the same layers.
    void pool(const std::vector<at::Tensor>& all);

    /// Moves the running statistics by the statistics of all forwards since construction, if the policy is deferred.
    void finish();

    /// What the forwards so far have left, to go on in another object for the same layers.
    void save(const StateWriter& writer) const;
    void load(const StateReader& reader);

    /// One call of a layer. Requires: it has running statistics among the buffers.
    at::Tensor run(const at::Tensor& x, const std::optional<at::Tensor>& weight, const std::optional<at::Tensor>& bias,
                   const at::Tensor& mean, const at::Tensor& variance, double momentum, double epsilon, bool cudnn);

private:
    struct Collected {
        Moments moments = {};
        double momentum = 0.0;
    };
    struct Layer {
        std::string name;  ///< of its running mean
        at::Tensor mean, variance;
        std::vector<Collected> calls = {};  ///< by call in a forward: each has statistics of its own
        std::size_t next = 0;               ///< call of this forward
    };
    struct Count {
        at::Tensor buffer;
        std::string name;
        at::Tensor before;
        at::Tensor after = {};  ///< one forward
    };

    BatchNorm policy_;
    std::map<const void*, Layer> layers_;  // by running mean
    std::vector<Count> counts_;
    bool counting_ = false;
};

}  // namespace microbatch
