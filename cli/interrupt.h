#pragma once

namespace microbatch::cli {

/// From now on the first SIGINT, SIGTERM or SIGHUP is only remembered; a second one ends the process at once, as usual.
void watch_interrupts();

/// True once a signal has come. Threads: any.
bool interrupted();

inline constexpr int interrupted_exit_code = 130;

}  // namespace microbatch::cli
