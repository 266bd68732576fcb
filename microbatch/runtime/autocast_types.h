#pragma once

#include <c10/core/DeviceType.h>
#include <c10/core/ScalarType.h>

#include <utility>
#include <vector>

namespace microbatch {

/// The types to which autocast converts, of this thread, as they were on construction: torch leaves them out of
/// at::ThreadLocalState.
class AutocastTypes {
public:
    AutocastTypes();

    /// Sets them in the calling thread.
    void establish() const;

private:
    std::vector<std::pair<c10::DeviceType, c10::ScalarType>> types_;
};

}  // namespace microbatch
