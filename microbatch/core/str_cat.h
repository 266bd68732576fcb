#pragma once

#include <sstream>
#include <string>

namespace microbatch {

/// The arguments written one after the other, as `operator<<` writes them. For messages, not for data.
template <class... Parts>
std::string str_cat(const Parts&... parts) {
    std::ostringstream out;
    (out << ... << parts);
    return out.str();
}

}  // namespace microbatch
