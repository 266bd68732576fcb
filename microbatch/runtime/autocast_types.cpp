#include "microbatch/runtime/autocast_types.h"

#include <ATen/autocast_mode.h>

namespace microbatch {

AutocastTypes::AutocastTypes() {
    for (const at::DeviceType device : at::autocast::_AUTOCAST_SUPPORTED_DEVICES) {
        types_.emplace_back(device, at::autocast::get_autocast_dtype(device));
    }
}

void AutocastTypes::establish() const {
    for (const auto& [device, type] : types_) at::autocast::set_autocast_dtype(device, type);
}

}  // namespace microbatch
