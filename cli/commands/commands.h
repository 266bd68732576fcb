#pragma once

#include "cli/options/command_line.h"

namespace microbatch::cli {

CommandSpec train_command();
CommandSpec compare_command();
CommandSpec advise_command();
CommandSpec plan_command();
CommandSpec report_command();
CommandSpec doctor_command();

}  // namespace microbatch::cli
