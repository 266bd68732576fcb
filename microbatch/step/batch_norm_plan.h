#pragma once

#include <optional>

#include "microbatch/step/probe.h"

namespace microbatch {

/// plan_batch() with a BatchNorm policy, or with the best one: exact, if it fits and its step takes at most twice the
/// time of the batch at once, else deferred. With a given micro-batch, the time does not count, so that the same settings
/// give the same update. PlanReport::batch_norm says which and why. With exact, the batch at once is a candidate too: it
/// needs no policy.
///
/// options.batch_norm is set here.
/// Errors: as plan_batch(); ErrorKind::usage if a policy other than naive is given for a model without BatchNorm, or if
///         exact is given and the model cannot run so.
/// Cost:   for exact, and without a policy, twice that of plan_batch().
PlanReport plan_batch_norm(Accumulator& accumulator, const BatchSource& batch, const LossFunction& loss,
                           PlannerOptions options, std::optional<BatchNorm> policy);

}  // namespace microbatch
