#pragma once

#include <functional>

#include "microbatch/state/state_dict.h"

namespace microbatch {

/// The second phase of a load: applies a validated state. It throws only what reading a tensor throws (the file is
/// gone, no memory); the object is then a mixture of states and must not be used for training.
using Commit = std::function<void()>;

/// An object whose state can be saved and loaded. A load has two phases, so a state that does not match changes
/// nothing.
class Stateful {
public:
    virtual ~Stateful() = default;

    /// Adds everything needed to continue. Tensors are shared, not copied: see StateDict::own().
    virtual void save(const StateWriter& writer) const = 0;

    /// Validates a state against this object and changes nothing. The returned Commit must run before this object
    /// changes, and during the lifetime of the dict.
    /// Errors: ErrorKind::bad_data, naming the value, if the state does not match this object.
    virtual Commit prepare(const StateReader& reader) = 0;
};

/// prepare() and its Commit.
inline void load(Stateful& object, const StateReader& reader) {
    object.prepare(reader)();
}

/// What one Stateful saves, as a separate dict.
inline StateDict state_of(const Stateful& object) {
    StateDict dict;
    object.save(StateWriter(dict));
    return dict;
}

/// How load_tensors() handles tensors that do not match.
enum class Fit {
    exact,    ///< every tensor, no others, all of the same sizes
    partial,  ///< tensors may be missing
    resize,   ///< as exact, but sizes may differ: a live tensor is resized to the saved one (a cache that grows)
};

/// Validates the section's tensors against live ones of the same names; the Commit copies them, one at a time.
/// Errors: ErrorKind::bad_data, naming the tensor, if one is missing, unknown, or has a different shape or dtype.
///         `what` ("parameter") is the start of the message.
Commit prepare_tensors(const StateReader& reader, const NamedTensors& live, const char* what, Fit fit = Fit::exact);

}  // namespace microbatch
