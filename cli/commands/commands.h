#pragma once

#include <CLI/App.hpp>
#include <functional>

namespace microbatch::cli {

/// What a sub-command does once its flags are read; returns the exit code.
using Action = std::function<int()>;

/// Each declares its sub-command on the application and sets `action` when it was the one called.
void add_train(CLI::App& application, Action& action);
void add_compare(CLI::App& application, Action& action);
void add_advise(CLI::App& application, Action& action);
void add_report(CLI::App& application, Action& action);
void add_plan(CLI::App& application, Action& action);
void add_doctor(CLI::App& application, Action& action);

}  // namespace microbatch::cli
