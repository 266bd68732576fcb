#pragma once

#include <string>
#include <string_view>
#include <vector>

namespace microbatch::cli {

/// The name with the smallest edit distance to `given`; empty if none is near enough to be a slip of the keyboard.
std::string nearest(std::string_view given, const std::vector<std::string>& names);

}  // namespace microbatch::cli
