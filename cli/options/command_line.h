#pragma once

#include <CLI/App.hpp>
#include <CLI/Config.hpp>
#include <CLI/Formatter.hpp>
#include <functional>
#include <string>
#include <vector>

#include "cli/options/options.h"

namespace microbatch::cli {

/// A sub-command. Its options are those that the table gives it.
struct CommandSpec {
    unsigned command;
    const char* name;
    const char* summary;
    std::string footer;                  ///< of its --help
    std::string length = {};             ///< the default, in words
    std::function<int(Arguments&)> run;  ///< returns the exit code
};

/// What the sub-command that was called does; returns the exit code.
using Action = std::function<int()>;

/// Declares the sub-command; when it is called it sets `action`, which fills what the flags left open from the
/// --config.
void declare(CLI::App& application, const CommandSpec& spec, Action& action);

/// What is wrong with the command line and what is near to it; `words` is the command line.
std::string explain(const CLI::App& application, const CLI::ParseError& error, const std::vector<std::string>& words);

}  // namespace microbatch::cli
