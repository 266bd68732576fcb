#pragma once

#include <filesystem>
#include <set>
#include <string>

#include "cli/options/options.h"

namespace microbatch::cli {

/// The text of config.toml; passing it to `--config` repeats the run. Requires: resolved() settings.
std::string config_text(const Settings& settings);

/// Fills options that are not set from the --config, a TOML file of up to 1 MiB. A key is the name of an option; keys
/// of other commands are ignored. Without --config, nothing changes.
/// Errors: ErrorKind::usage if the file cannot be read or parsed, or a key is not an option of any command: the message
///         suggests the most similar option.
void apply_config_file(Arguments& arguments);

/// Does the same with the text of `source`, except for some keys.
void apply_config(Arguments& arguments, const std::string& text, const std::string& source,
                  const std::set<std::string>& without = {});

/// The keys of such a text with their values. Errors: ErrorKind::bad_data if it cannot be parsed.
Values config_values(const std::string& text, const std::string& source);

/// The same for the config.toml of a run; empty if the run has no such file.
Values read_config(const std::filesystem::path& folder);

}  // namespace microbatch::cli
