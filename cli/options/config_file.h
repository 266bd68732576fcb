#pragma once

#include <CLI/App.hpp>
#include <map>
#include <string>
#include <vector>

namespace microbatch::cli {

/// Fills what the flags left open from a TOML file: flags win. A key is a flag's name; keys that only another command
/// knows are left to it.
/// No file, nothing to fill.
/// Errors: ErrorKind::usage if the file cannot be read (it may have 1 MiB) or parsed, or a key is no flag of any
///         command: the message names the nearest one that is.
void apply_config_file(CLI::App& command, const std::string& file);

/// The same of a text that comes from `source`, but for some keys.
void apply_config(CLI::App& command, const std::string& text, const std::string& source,
                  const std::vector<std::string>& without = {});

/// The keys of such a text with their values, as flags would give them. Errors: ErrorKind::bad_data if it is none.
std::map<std::string, std::string> config_values(const std::string& text, const std::string& source);

}  // namespace microbatch::cli
