#pragma once

#include "microbatch/model/model.h"
#include "microbatch/state/stateful.h"

namespace microbatch {

/// A copy of what a forward pass may change beside gradients: buffers and training flags in `model/`, torch's
/// generators (the CPU's and those of the parameters' devices) and those of the model in `rng/`.
///
/// Cost: one copy of the buffers, 5 KB a generator.
StateDict forward_state(const Model& model);

/// The generators alone, in the section that `writer` writes.
void save_generators(const Model& model, const StateWriter& writer);

/// Validates generators' states that save_generators() wrote. Errors: ErrorKind::bad_data.
Commit prepare_generators(Model& model, const StateReader& reader);

/// Validates what forward_state() returned. Errors: ErrorKind::bad_data.
Commit prepare_forward_state(Model& model, const StateReader& reader);

/// Puts back buffers and training flags, or with `generators` all of it, bit for bit.
void restore_forward_state(Model& model, const StateDict& state, bool generators);

/// Restores it all when it goes out of scope.
class ForwardStateScope {
public:
    explicit ForwardStateScope(Model& model) : model_(model), before_(forward_state(model)) {}
    ForwardStateScope(const ForwardStateScope&) = delete;
    ForwardStateScope& operator=(const ForwardStateScope&) = delete;
    ~ForwardStateScope() { restore(); }

    void restore() { restore_forward_state(model_, before_, /*generators=*/true); }
    const StateDict& before() const { return before_; }

private:
    Model& model_;
    StateDict before_;
};

}  // namespace microbatch
