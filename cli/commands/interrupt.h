#pragma once

namespace microbatch::cli {

/// From now on the first SIGINT, SIGTERM or SIGHUP is only remembered; a second one, of whatever kind, ends the process
/// at once, as usual, unless it comes within a fifth of a second: some senders send one to a process and to its group.
/// One that was ignored when the process began (nohup) stays ignored.
void watch_interrupts();

/// True once a signal has come. Threads: any.
bool interrupted();

inline constexpr int interrupted_exit_code = 130;

}  // namespace microbatch::cli
