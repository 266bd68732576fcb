#pragma once

#include <nlohmann/json_fwd.hpp>
#include <string>

#include "microbatch/run/trainer_state.h"

namespace microbatch {

/// A trainer's state without its tensors, but for how many of them there are. Every double reads back with the same
/// bits, infinities, too; a NaN as some NaN.
nlohmann::ordered_json to_json(const TrainerState& state);

/// Reads what to_json() wrote; lists of tensors have as many elements as there are to be, without names or content.
/// Errors: nlohmann::json::exception or std::invalid_argument where it is something else. What the numbers mean is not
///         looked at: see Trainer::restore().
TrainerState trainer_state_from(const nlohmann::json& json);

}  // namespace microbatch
