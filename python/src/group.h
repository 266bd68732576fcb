#pragma once

#include <memory>

#include "microbatch/distributed/group.h"
#include "microbatch/step/reducer.h"
#include "python/src/bindings.h"

namespace microbatch::python {

/// The reducer of a group, or of a single process if there is none. `whole`: every rank has the whole batch, of which it
/// takes its share; else it has its own part.
std::shared_ptr<Reducer> reducer_of(const std::shared_ptr<Group>& group, bool whole);

}  // namespace microbatch::python
