#pragma once

#include <ATen/core/Tensor.h>

#include <algorithm>
#include <cstdint>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "microbatch/core/batch_plan.h"
#include "microbatch/model/parameters.h"
#include "microbatch/step/gathered.h"
#include "microbatch/step/micro_batch_caps.h"

namespace microbatch {

/// Why a process could not gather its share of a batch.
struct GatherFailure {
    bool out_of_memory = false;
    std::string message = {};
    SampleShape shape = {};  ///< if memory ran out: of the samples that ran last, and their plan
    Plan plan = {};
    int rank = 0;  ///< of the process
};

inline constexpr const char* no_gradient =
    "no parameter received a gradient: are these the parameters of the model that the loss function uses?";

/// One process or many: splits a batch, combines what each process has gathered into the same batch for all, and lets
/// all agree. All processes call the same functions in the same order; what they return is the same on all, in bits.
class Reducer {
public:
    Reducer() = default;
    Reducer(const Reducer&) = delete;
    Reducer& operator=(const Reducer&) = delete;
    virtual ~Reducer() = default;

    virtual int rank() const = 0;
    virtual int size() const = 0;

    /// The samples of the batch that was passed here which this process gathers, in whole grains; there may be none.
    virtual Slice share(std::int64_t samples, std::int64_t grain = 1) const {
        return share_of_grains(samples, grain, rank(), size());
    }

    /// What prevents the batch, if any process has failed: the failure of the first one that cannot be retried, else of
    /// the first one that ran out of memory. Empty if all have gathered their share.
    virtual std::optional<GatherFailure> agree(const std::optional<GatherFailure>& mine) = 0;

    /// The sums, weights and norm of the whole batch. `scale` is that of the gradients: see Precision. Sums are made in
    /// place, also for parameters that had no gradient here; if divides(), those of its own parameters alone are
    /// returned. Errors: ErrorKind::lost_rank; c10::OutOfMemoryError, on all.
    virtual Gathered reduce(Gathered gathered, const Parameters& parameters, double scale) = 0;

    /// Divides the parameters of an optimizer among the processes: from now on, each updates its own (ZeRO-1), and
    /// share_update() gives them to the others. Returns its own. Later calls may add parameters. A single process has them
    /// all, undivided.
    virtual std::vector<at::Tensor> divide(const std::vector<at::Tensor>& parameters) { return parameters; }
    virtual void unite() {}  ///< ends it
    virtual bool divides() const { return false; }

    /// Gives all the parameters of the reduced batch that each has updated. Does nothing unless divides().
    /// Errors: ErrorKind::lost_rank; the parameters are a mixture of before and after the update then.
    virtual void share_update() {}

    /// The largest share of any process, if the same batch is passed in all.
    virtual std::int64_t largest_share(std::int64_t samples, std::int64_t grain = 1) const {
        return std::min(samples, (micro_batch_count(samples, grain) + size() - 1) / size() * grain);
    }

    /// The time of a step's communication, as a few megabytes tell. All processes.
    virtual double exchange_seconds(const Parameters& /*parameters*/) { return 0.0; }

    /// The memory that reduce() and share_update() take, beside gradients and parameters. `in_double`: of sums in fp64.
    virtual std::int64_t buffer_bytes(const Parameters& /*parameters*/, bool /*in_double*/) const { return 0; }

    /// Tells the others that this process has failed where they have not, and makes every later call throw.
    virtual void abandon(const std::string& /*why*/) noexcept {}

    /// True if it is true for any process.
    virtual bool any_rank(bool mine) = 0;

    /// One-dimensional tensors of one type and any length, of all processes in order.
    virtual std::vector<at::Tensor> gather(const at::Tensor& mine) = 0;
};

/// A single process: its batch is the whole batch.
class LocalReducer final : public Reducer {
public:
    int rank() const override { return 0; }
    int size() const override { return 1; }
    std::optional<GatherFailure> agree(const std::optional<GatherFailure>& mine) override { return mine; }
    Gathered reduce(Gathered gathered, const Parameters&, double) override { return gathered; }
    bool any_rank(bool mine) override { return mine; }
    std::vector<at::Tensor> gather(const at::Tensor& mine) override { return {mine}; }
};

}  // namespace microbatch
