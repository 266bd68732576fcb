#pragma once

#include <functional>

#include "microbatch/data/batch.h"
#include "microbatch/model/model.h"
#include "microbatch/step/loss.h"

namespace microbatch {

/// Throws ErrorKind::usage unless a grain, which `grain` loads, gives the same gradients each time, bit for bit, and draws from torch's default
/// generators alone. The message names the operator, or else the parameter, whose numbers differ. The model's state and
/// the generators are restored; parameters have no gradient before and after.
/// Cost: two forward and backward passes, and more if they differ.
void require_repeatable(Model& model, const Parameters& parameters, const LossFunction& loss,
                        const std::function<Batch()>& grain);

}  // namespace microbatch
