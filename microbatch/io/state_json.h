#pragma once

#include <string>
#include <string_view>

#include "microbatch/state/state_dict.h"

namespace microbatch {

/// The scalars of a state as a JSON object, in the order of their names. Non-finite numbers are the strings "nan",
/// "inf" and "-inf".
/// Errors: ErrorKind::usage if it would be larger than read_scalars() accepts.
std::string scalars_to_json(const StateDict& state);

/// Adds the scalars of such an object. The text is not trusted: at most 16 MiB and 400,000 values.
/// Errors: ErrorKind::bad_data, naming `source`.
void read_scalars(std::string_view json, const std::string& source, StateDict& state);

inline constexpr std::uint64_t most_scalar_bytes = std::uint64_t{16} << 20U;

}  // namespace microbatch
