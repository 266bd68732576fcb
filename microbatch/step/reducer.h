#pragma once

#include <utility>

#include "microbatch/step/gathered.h"

namespace microbatch {

/// One process or many: combines what each has gathered into the same batch for all, and lets all agree.
class Reducer {
public:
    virtual ~Reducer() = default;

    /// The sums, weights and norm of the whole batch.
    virtual Gathered reduce(Gathered gathered) = 0;

    /// True if it is true for any process.
    virtual bool any_rank(bool mine) = 0;
};

/// A single process: its batch is the whole batch.
class LocalReducer final : public Reducer {
public:
    Gathered reduce(Gathered gathered) override { return gathered; }
    bool any_rank(bool mine) override { return mine; }
};

}  // namespace microbatch
