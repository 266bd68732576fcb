#pragma once

#include <CLI/App.hpp>
#include <CLI/Config.hpp>
#include <CLI/Formatter.hpp>
#include <string>

#include "cli/options/settings.h"

namespace microbatch::cli {

/// Declares the flags that describe a job: model, data, batch, memory, optimizer, seed, threads, --config and --json.
void add_job_options(CLI::App& command, Settings& settings);

/// Declares what only a run has: the batch's schedule, the guard, the measuring of noise.
void add_train_options(CLI::App& command, Settings& settings);
void add_checkpoint_options(CLI::App& command, Settings& settings);

/// Errors: ErrorKind::usage if a flag was given an empty value.
void refuse_empty_values(const CLI::App& command);

/// What CLI11 says of a value that it cannot read, in words for the one who wrote it.
std::string reworded(const CLI::Error& error);

/// Declares --steps, --samples and --tokens; `fallback` is what the help says holds without them.
void add_length_options(CLI::App& command, Settings& settings, const std::string& fallback);

}  // namespace microbatch::cli
