#pragma once

#include <memory>

#include "microbatch/distributed/group.h"
#include "microbatch/step/reducer.h"
#include "python/src/bindings.h"

namespace microbatch::python {

/// The reducer of a group; LocalReducer without one. If `whole`, every rank passes the same whole batch and gathers its
/// share; otherwise each passes its own part.
std::shared_ptr<Reducer> reducer_of(const std::shared_ptr<Group>& group, bool whole);

}  // namespace microbatch::python
