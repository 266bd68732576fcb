#pragma once

namespace microbatch::cli {

/// From now on, the first SIGINT, SIGTERM or SIGHUP is only recorded. A second one of any kind ends the process
/// immediately, unless it arrives within a fifth of a second: some senders signal a process and also its group. A
/// signal that was ignored when the process started (nohup) stays ignored.
void watch_interrupts();

/// True once a signal has arrived. Threads: any.
bool interrupted();

inline constexpr int interrupted_exit_code = 130;

}  // namespace microbatch::cli
