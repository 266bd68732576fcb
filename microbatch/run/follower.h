#pragma once

#include <optional>

#include "microbatch/run/trainer.h"

namespace microbatch {

/// The run of a rank other than the first, whose Run it follows: the same steps, decisions and end. It writes nothing but
/// its part of each checkpoint, if the optimizer's state is sharded.
///
/// `state`: what the first rank resumes from; consumed.
/// Errors: as Trainer::step(); ErrorKind::bad_data if the state does not match.
void follow(Accumulator& accumulator, const Dataset& dataset, const LossFunction& loss, const TrainerOptions& options,
            std::optional<StateDict>& state);

}  // namespace microbatch
