#pragma once

#include <cstdint>
#include <cstdio>
#include <string>
#include <vector>

namespace microbatch::cli {

/// Prints rows in aligned columns; the first row is the heading, the first column goes left and the others right.
void print_table(std::FILE* stream, const std::vector<std::vector<std::string>>& rows);

/// 3723 s -> "1:02:03", 62 s -> "1:02".
std::string clock_time(double seconds);

}  // namespace microbatch::cli
