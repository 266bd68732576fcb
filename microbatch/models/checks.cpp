#include "microbatch/models/checks.h"

#include <limits>

#include "microbatch/core/error.h"
#include "microbatch/core/str_cat.h"

namespace microbatch {

void require_size(std::string_view model, std::string_view name, std::int64_t value) {
    // The upper limit keeps products with small factors, such as 4 * width, inside 64 bits.
    constexpr std::int64_t largest = std::numeric_limits<std::int32_t>::max();
    if (value < 1 || value > largest) {
        throw Error(ErrorKind::usage, str_cat(model, ": ", name, " is ", value, "; give 1 to ", largest));
    }
}

}  // namespace microbatch
