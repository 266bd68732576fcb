#pragma once

#include "microbatch/model/model.h"
#include "microbatch/state/stateful.h"

namespace microbatch {

/// A copy of everything that a forward pass may change, except gradients: buffers and training flags in `model/`,
/// torch's generators (for the CPU and the parameters' devices) in `rng/`.
///
/// Cost: one copy of the buffers, 5 KB per generator.
StateDict forward_state(const Model& model);

/// Only the generators, in the section that `writer` writes.
void save_generators(const Model& model, const StateWriter& writer);

/// Validates generator states from save_generators(). Errors: ErrorKind::bad_data.
Commit prepare_generators(const Model& model, const StateReader& reader);

/// Validates a state from forward_state(). Errors: ErrorKind::bad_data.
Commit prepare_forward_state(Model& model, const StateReader& reader);

/// Restores buffers and training flags, and with `generators` also the generators, bit for bit.
void restore_forward_state(Model& model, const StateDict& state, bool generators);

/// Restores the whole state when it goes out of scope.
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
