#pragma once

#include <sstream>
#include <string>

namespace microbatch {

/// The arguments as written by `operator<<`, concatenated. For messages, not for data.
template <class... Parts>
std::string str_cat(const Parts&... parts) {
    std::ostringstream out;
    (out << ... << parts);
    return out.str();
}

}  // namespace microbatch
