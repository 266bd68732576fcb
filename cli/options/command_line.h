#pragma once

#include <CLI/App.hpp>
#include <CLI/Config.hpp>
#include <CLI/Formatter.hpp>
#include <functional>
#include <string>
#include <vector>

#include "cli/options/options.h"

namespace microbatch::cli {

/// A sub-command. The table of options defines its options.
struct CommandSpec {
    unsigned command;
    const char* name;
    const char* summary;
    std::string footer;                  ///< of its --help
    std::string length = {};             ///< the default length, in words
    std::function<int(Arguments&)> run;  ///< returns the exit code
};

/// Runs the selected sub-command; returns the exit code.
using Action = std::function<int()>;

/// Declares the sub-command. Parsing sets `action`, which fills options that are not set from the --config and runs.
void declare(CLI::App& application, const CommandSpec& spec, Action& action);

/// What is wrong with the command line, and similar names; `words` is the command line.
std::string explain(const CLI::App& application, const CLI::ParseError& error, const std::vector<std::string>& words);

}  // namespace microbatch::cli
