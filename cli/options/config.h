#pragma once

#include <filesystem>
#include <set>
#include <string>

#include "cli/options/options.h"

namespace microbatch::cli {

/// What config.toml holds: `--config` with it gives the same run again. Requires: resolved() settings.
std::string config_text(const Settings& settings);

/// Fills what the flags left open from the --config, a TOML file of up to 1 MiB. A key is an option's name; keys of
/// other commands are ignored. Without a --config nothing changes.
/// Errors: ErrorKind::usage if the file cannot be read or parsed, or a key is not an option of any command: the message
///         names the nearest one that is.
void apply_config_file(Arguments& arguments);

/// Does the same with a text that comes from `source`, except for some keys.
void apply_config(Arguments& arguments, const std::string& text, const std::string& source,
                  const std::set<std::string>& without = {});

/// The keys of such a text with their values. Errors: ErrorKind::bad_data if it is not one.
Values config_values(const std::string& text, const std::string& source);

/// The same of a run's config.toml; empty if there is none.
Values read_config(const std::filesystem::path& folder);

}  // namespace microbatch::cli
