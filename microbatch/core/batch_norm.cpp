#include "microbatch/core/batch_norm.h"

namespace microbatch {

std::string_view to_string(BatchNorm policy) {
    switch (policy) {
        case BatchNorm::naive:
            return "naive";
        case BatchNorm::deferred:
            return "deferred";
        case BatchNorm::frozen:
            return "frozen";
        case BatchNorm::exact:
            break;
    }
    return "exact";
}

std::optional<BatchNorm> parse_batch_norm(std::string_view name) {
    for (const BatchNorm policy : {BatchNorm::naive, BatchNorm::deferred, BatchNorm::frozen, BatchNorm::exact}) {
        if (to_string(policy) == name) return policy;
    }
    return std::nullopt;
}

}  // namespace microbatch
