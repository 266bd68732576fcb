#include "microbatch/model/parameters.h"

#include <unordered_set>

#include "microbatch/core/error.h"
#include "microbatch/core/str_cat.h"

namespace microbatch {

Parameters without_repeats(const Parameters& parameters) {
    Parameters result;
    std::unordered_set<const void*> seen;
    for (const Parameter& parameter : parameters) {
        if (!parameter.tensor.defined()) {
            throw Error(ErrorKind::usage, str_cat("parameter ", parameter.name, " is an undefined tensor"));
        }
        if (seen.insert(parameter.tensor.unsafeGetTensorImpl()).second) result.push_back(parameter);
    }
    return result;
}

}  // namespace microbatch
