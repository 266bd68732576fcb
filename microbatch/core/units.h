#pragma once

#include <cstdint>
#include <string>
#include <string_view>

namespace microbatch {

/// Without the spaces, tabs and line ends around it.
std::string_view trimmed(std::string_view input);

/// Bytes of a size as people write it: "400MiB", "1.5 GiB", "2GB", "512 KiB", "123", "123B".
///
/// Units:  KiB, MiB, GiB, TiB are powers of 1024; KB, MB, GB, TB powers of 1000; B or nothing is bytes. Case does not
///         matter. A fraction of a byte is rounded down, exactly: reading a budget never enlarges it.
/// Errors: ErrorKind::usage if there is no number, the unit is unknown, or the size is below one byte or above int64.
std::int64_t parse_bytes(std::string_view input);

/// Bytes in the largest binary unit that leaves at least 1, with three significant digits: "512 B", "2.25 GiB".
/// Units: whole numbers keep all digits ("1023 MiB"); trailing zeros are dropped ("400 MiB"); rounded to nearest.
std::string format_bytes(std::int64_t bytes);

/// 3723 s as "1:02:03", 62 s as "1:02"; "-" if it is negative, not finite or longer than three years.
std::string format_seconds(double seconds);

/// A count such as "64", "10k" or "1M".
///
/// Units:  k = 1,000, M = 1,000,000, G = 1,000,000,000; case does not matter.
/// Errors: ErrorKind::usage if it is not a whole number from 0 to int64's largest.
std::int64_t parse_count(std::string_view input);

/// 1234567 as "1,234,567".
std::string format_count(std::int64_t count);

/// What an interval counts.
enum class Unit { steps, samples, tokens };

/// "steps", "samples" or "tokens".
std::string_view to_string(Unit unit);

/// A stretch of training, with its unit: a bare number would mean something different at every batch size.
struct Interval {
    std::int64_t count = 0;
    Unit unit = Unit::steps;

    bool operator==(const Interval&) const = default;
};

/// An interval such as "100 steps", "2.5k samples", "1M tokens" or "1 step".
///
/// Units:  k, M and G as in parse_count; case does not matter.
/// Errors: ErrorKind::usage if the count is not a whole number from 0 up, or the unit is missing or unknown.
Interval parse_interval(std::string_view input);

/// "100 steps", "1 token": parse_interval reads the same interval back.
std::string to_string(Interval interval);

/// The progress of a run, in each unit.
struct Progress {
    std::int64_t steps = 0;
    std::int64_t samples = 0;
    std::int64_t tokens = 0;

    std::int64_t in(Unit unit) const;

    /// Errors: ErrorKind::usage if a sum exceeds int64; then this is unchanged.
    Progress& operator+=(const Progress& other);

    bool operator==(const Progress&) const = default;
};

/// Errors: ErrorKind::usage if a sum leaves int64.
Progress operator+(Progress left, const Progress& right);

/// The smallest interval in unit `to` that is at least as long as this one: rounded up.
///
/// Units:  samples_per_step is the batch; tokens_per_sample is 1 for data without tokens.
/// Errors: ErrorKind::usage if the count is negative, a rate is below 1, or the result leaves int64.
Interval convert(Interval interval, Unit to, std::int64_t samples_per_step, std::int64_t tokens_per_sample);

}  // namespace microbatch
