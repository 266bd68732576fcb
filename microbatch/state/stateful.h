#pragma once

#include <functional>

#include "microbatch/state/state_dict.h"

namespace microbatch {

/// The second phase of a load: makes what was validated true. It throws only what reading a tensor throws (a file that
/// is gone, no memory); what it restores is then a mixture, not to be trained on.
using Commit = std::function<void()>;

/// What a run can be resumed with. A load has two phases, so that a state that does not fit changes nothing.
class Stateful {
public:
    virtual ~Stateful() = default;

    /// Adds all that is needed to go on. Tensors are shared, not copied: see StateDict::own().
    virtual void save(const StateWriter& writer) const = 0;

    /// Validates a state against what is here and changes nothing. The Commit it returns must run before the next
    /// change of this object, and while the dict lives.
    /// Errors: ErrorKind::bad_data, naming the value, if it is not a state of such an object.
    virtual Commit prepare(const StateReader& reader) = 0;
};

/// prepare() and its Commit.
inline void load(Stateful& object, const StateReader& reader) {
    object.prepare(reader)();
}

/// What one Stateful saves, as a dict of its own.
inline StateDict state_of(const Stateful& object) {
    StateDict dict;
    object.save(StateWriter(dict));
    return dict;
}

/// How load_tensors() takes tensors that do not match.
enum class Fit {
    exact,    ///< every tensor, no other, all of the same sizes
    partial,  ///< tensors may be missing
    resize,   ///< as exact, but sizes may differ: a live tensor becomes what was saved (a cache that grows)
};

/// Validates the section's tensors against live ones of the same names; the Commit copies them in, one at a time.
/// Errors: ErrorKind::bad_data, naming the tensor, if one is missing, unknown, or of another shape or dtype. `what`
///         ("parameter") begins the message.
Commit prepare_tensors(const StateReader& reader, const NamedTensors& live, const char* what, Fit fit = Fit::exact);

}  // namespace microbatch
