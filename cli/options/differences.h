#pragma once

#include <set>
#include <string>
#include <vector>

#include "cli/options/options.h"

namespace microbatch::cli {

/// The differences between a run and its checkpoint, each as "lr was 0.001, is 0.002".
struct Differences {
    std::vector<std::string> another_run, another_cut, noted;
};

/// Compares two config.toml texts by the table of options.
Differences differences(const Values& was, const Values& is);

/// The recorded options, overridden by the given ones.
Values overridden(const Values& was, const Values& given);

/// Recorded options that have no meaning with the options of `now`, which override them.
std::set<std::string> outdated(const Values& was, const Values& now);

/// The value of that name, or "not given".
const std::string& value_in(const Values& values, const std::string& name);

}  // namespace microbatch::cli
