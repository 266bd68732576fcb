#pragma once

#include <cstdint>
#include <cstdio>
#include <string>
#include <vector>

#include "microbatch/core/plan_report.h"

namespace microbatch::cli {

/// Prints rows in aligned columns; the first row is the heading, the first column goes left and the others right.
void print_table(std::FILE* stream, const std::vector<std::vector<std::string>>& rows);

/// 3723 s -> "1:02:03", 62 s -> "1:02".
std::string clock_time(double seconds);

/// True if lines may be drawn over; not on a dumb terminal.
bool is_terminal(std::FILE* stream);

/// How wide it is; 100 where that is not known.
std::size_t terminal_columns(std::FILE* stream);

/// "parameters 3.18 MiB, gradients 3.18 MiB, optimizer state 6.37 MiB, activations 36.1 MiB, other 64 KiB".
std::string describe_parts(const MemoryParts& parts);

/// How far a prediction is off, of what was measured: "+1.5 %".
std::string percent_off(double predicted, double measured);

/// Requires: at least one value.
double median(std::vector<double> values);

}  // namespace microbatch::cli
