#include "microbatch/core/units.h"

#include <algorithm>
#include <array>
#include <charconv>
#include <cmath>
#include <limits>
#include <numeric>

#include "microbatch/core/error.h"

namespace microbatch {
namespace {

constexpr std::int64_t largest = std::numeric_limits<std::int64_t>::max();

/// What is being parsed, for the messages.
struct Wording {
    std::string_view noun;
    std::string_view examples;
};

constexpr Wording size_wording{"size", "400MiB, 1.5GiB or 2GB"};
constexpr Wording count_wording{"count", "64, 10k or 1M"};
constexpr Wording interval_wording{"interval", R"("100 steps", "2.5k samples" or "1M tokens")"};

template <class... Why>
[[noreturn]] void fail(const Wording& wording, std::string_view input, const Why&... why) {
    throw Error(ErrorKind::usage, "cannot read the ", wording.noun, " \"", input, "\": ", why...,
                "; write for example ", wording.examples);
}

bool is_space(char c) {
    return c == ' ' || c == '\t' || c == '\n' || c == '\r';
}
bool is_digit(char c) {
    return c >= '0' && c <= '9';
}

// Not std::tolower: the result must not depend on the locale.
std::string lowercase(std::string_view input) {
    std::string result(input);
    std::transform(result.begin(), result.end(), result.begin(),
                   [](char c) { return c >= 'A' && c <= 'Z' ? static_cast<char>(c - 'A' + 'a') : c; });
    return result;
}

/// The number digits / 10^places and the lowercase text behind it. Decimal, so that 0.1k is 100 and not nearly 100.
struct Quantity {
    std::uint64_t digits = 0;
    int places = 0;
    std::string suffix;
};

Quantity read_quantity(const Wording& wording, std::string_view input) {
    constexpr int most_places = 18;
    const std::string_view body = trimmed(input);
    if (body.empty()) fail(wording, input, "it is empty");
    if (body.front() == '-') fail(wording, input, "it is negative");

    Quantity quantity;
    bool any_digit = false;
    bool after_point = false;
    std::size_t at = 0;
    for (; at < body.size() && (is_digit(body[at]) || (body[at] == '.' && !after_point)); ++at) {
        if (body[at] == '.') {
            after_point = true;
            continue;
        }
        const auto digit = static_cast<std::uint64_t>(body[at] - '0');
        if (quantity.digits > (static_cast<std::uint64_t>(largest) - digit) / 10 || quantity.places == most_places) {
            fail(wording, input, "the number has too many digits for 64 bits");
        }
        quantity.digits = quantity.digits * 10 + digit;
        quantity.places += after_point ? 1 : 0;
        any_digit = true;
    }
    if (!any_digit) fail(wording, input, "it does not begin with a number");
    quantity.suffix = lowercase(trimmed(body.substr(at)));
    return quantity;
}

/// quantity * scale, rounded down, and whether nothing was lost by that.
struct Scaled {
    std::int64_t count = 0;
    bool is_whole = true;
};

// Exact in 64 bits: after cancelling, remainder * scale stays below 10^places / gcd * scale / gcd, which is at most
// 5^18 * 2^22 = 1.6e19 for the largest scale (2^40) and 18 places, less than 2^64.
Scaled scaled(const Wording& wording, std::string_view input, const Quantity& quantity, std::uint64_t scale) {
    std::uint64_t divisor = 1;
    for (int place = 0; place < quantity.places; ++place) divisor *= 10;
    const std::uint64_t common = std::gcd(scale, divisor);
    scale /= common;
    divisor /= common;

    const std::uint64_t whole = quantity.digits / divisor;
    const std::uint64_t remainder = quantity.digits % divisor;
    const std::uint64_t fraction = remainder * scale / divisor;
    if (whole > (static_cast<std::uint64_t>(largest) - fraction) / scale) {
        fail(wording, input, "it is above ", largest, ", the largest 64-bit number");
    }
    return {static_cast<std::int64_t>(whole * scale + fraction), remainder == 0};
}

struct ByteUnit {
    std::string_view name;
    std::uint64_t bytes;
};

constexpr std::array<ByteUnit, 10> byte_units{{
    {"", 1},
    {"b", 1},
    {"kib", 1ULL << 10U},
    {"mib", 1ULL << 20U},
    {"gib", 1ULL << 30U},
    {"tib", 1ULL << 40U},
    {"kb", 1'000},
    {"mb", 1'000'000},
    {"gb", 1'000'000'000},
    {"tb", 1'000'000'000'000},
}};

/// Removes k, m or g from the front of the suffix and returns its value, or 1 without such a letter.
std::uint64_t take_multiplier(std::string& suffix) {
    std::uint64_t multiplier = 1;
    if (suffix.starts_with('k')) multiplier = 1'000;
    if (suffix.starts_with('m')) multiplier = 1'000'000;
    if (suffix.starts_with('g')) multiplier = 1'000'000'000;
    if (multiplier != 1) suffix = trimmed(std::string_view(suffix).substr(1));
    return multiplier;
}

std::int64_t whole_count(const Wording& wording, std::string_view input, const Quantity& quantity,
                         std::uint64_t multiplier) {
    const Scaled result = scaled(wording, input, quantity, multiplier);
    if (!result.is_whole) fail(wording, input, "it is not a whole number");
    return result.count;
}

constexpr std::array<Unit, 3> all_units{Unit::steps, Unit::samples, Unit::tokens};

Unit read_unit(std::string_view input, std::string_view name, std::string_view whole_suffix) {
    if (name.empty()) fail(interval_wording, input, "it has no unit; the units are steps, samples and tokens");
    for (const Unit unit : all_units) {
        const std::string_view plural = to_string(unit);
        if (name == plural || name == plural.substr(0, plural.size() - 1)) return unit;
    }
    fail(interval_wording, input, "unknown unit \"", whole_suffix, "\"; the units are steps, samples and tokens");
}

std::int64_t sum(std::int64_t left, std::int64_t right, Unit unit) {
    const bool fits = right >= 0 ? left <= largest - right : left >= std::numeric_limits<std::int64_t>::min() - right;
    require_that(fits, "progress exceeds 64 bits: ", left, " + ", right, " ", to_string(unit),
                 "; give the actual size of the step, not a placeholder for \"no limit\"");
    return left + right;
}

std::int64_t product(std::int64_t count, std::int64_t rate) {
    require_that(count <= largest / rate, "an interval exceeds 64 bits: ", count, " * ", rate, "; shorten it");
    return count * rate;
}

std::int64_t quotient_up(std::int64_t count, std::int64_t rate) {
    return count / rate + (count % rate == 0 ? 0 : 1);
}

}  // namespace

std::string_view trimmed(std::string_view input) {
    while (!input.empty() && is_space(input.front())) input.remove_prefix(1);
    while (!input.empty() && is_space(input.back())) input.remove_suffix(1);
    return input;
}

std::int64_t parse_bytes(std::string_view input) {
    const Quantity quantity = read_quantity(size_wording, input);
    const auto* const unit = std::find_if(byte_units.begin(), byte_units.end(),
                                          [&](const ByteUnit& each) { return each.name == quantity.suffix; });
    if (unit == byte_units.end()) {
        fail(size_wording, input, "unknown unit \"", quantity.suffix,
             "\"; the units are B, KiB, MiB, GiB, TiB, KB, MB, GB, TB");
    }
    if (quantity.suffix.empty() && input.find('.') != std::string_view::npos) {
        fail(size_wording, input, "a fraction needs a unit");
    }
    const std::int64_t bytes = scaled(size_wording, input, quantity, unit->bytes).count;
    if (bytes == 0) fail(size_wording, input, "it must be above 0");
    return bytes;
}

std::string format_bytes(std::int64_t bytes) {
    constexpr std::array<std::string_view, 7> names{"B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"};
    double value = std::abs(static_cast<double>(bytes));
    std::size_t unit = 0;
    // From 1023.5 on, three digits would round to 1024 of this unit, which is 1 of the next.
    while (value >= 1023.5 && unit + 1 < names.size()) {
        value /= 1024;
        ++unit;
    }
    int decimals = 0;
    if (value < 100) decimals = 1;
    if (value < 10) decimals = 2;
    std::array<char, 32> buffer{};
    char* const first = buffer.data();
    char* const last = std::to_chars(first, first + buffer.size(), value, std::chars_format::fixed, decimals).ptr;
    std::string number(first, last);
    if (decimals > 0) {
        number.erase(number.find_last_not_of('0') + 1);
        if (number.back() == '.') number.pop_back();
    }
    return str_cat(bytes < 0 ? "-" : "", number, " ", names.at(unit));
}

std::string format_seconds(double seconds) {
    if (!std::isfinite(seconds) || seconds < 0.0 || seconds > 1e8) return "-";
    const auto whole = static_cast<std::int64_t>(std::lround(seconds));
    const auto two_digits = [](std::int64_t count) { return str_cat(count < 10 ? "0" : "", count); };
    const std::int64_t hours = whole / 3600, minutes = whole / 60 % 60;
    return str_cat(hours > 0 ? str_cat(hours, ":", two_digits(minutes)) : str_cat(minutes), ":",
                   two_digits(whole % 60));
}

std::int64_t parse_count(std::string_view input) {
    Quantity quantity = read_quantity(count_wording, input);
    const std::string suffix = quantity.suffix;
    const std::uint64_t multiplier = take_multiplier(quantity.suffix);
    if (!quantity.suffix.empty()) {
        fail(count_wording, input, "\"", suffix, "\" is not one of k, M and G");
    }
    return whole_count(count_wording, input, quantity, multiplier);
}

std::string format_count(std::int64_t count) {
    std::string digits = std::to_string(count);
    const std::ptrdiff_t first = count < 0 ? 1 : 0;
    for (auto end = std::ssize(digits) - 3; end > first; end -= 3) digits.insert(static_cast<std::size_t>(end), 1, ',');
    return digits;
}

std::string_view to_string(Unit unit) {
    constexpr std::array<std::string_view, 3> names{"steps", "samples", "tokens"};
    return names.at(static_cast<std::size_t>(unit));
}

Interval parse_interval(std::string_view input) {
    Quantity quantity = read_quantity(interval_wording, input);
    const std::string suffix = quantity.suffix;
    const std::uint64_t multiplier = take_multiplier(quantity.suffix);
    const Unit unit = read_unit(input, quantity.suffix, suffix);
    return {whole_count(interval_wording, input, quantity, multiplier), unit};
}

std::string to_string(Interval interval) {
    std::string_view unit = to_string(interval.unit);
    if (interval.count == 1) unit.remove_suffix(1);
    return str_cat(interval.count, " ", unit);
}

std::int64_t Progress::in(Unit unit) const {
    if (unit == Unit::steps) return steps;
    return unit == Unit::samples ? samples : tokens;
}

Progress& Progress::operator+=(const Progress& other) {
    return *this = *this + other;
}

Progress operator+(Progress left, const Progress& right) {
    return {.steps = sum(left.steps, right.steps, Unit::steps),
            .samples = sum(left.samples, right.samples, Unit::samples),
            .tokens = sum(left.tokens, right.tokens, Unit::tokens)};
}

Interval convert(Interval interval, Unit to, std::int64_t samples_per_step, std::int64_t tokens_per_sample) {
    require_that(interval.count >= 0 && samples_per_step >= 1 && tokens_per_sample >= 1, "cannot convert ",
                 to_string(interval), " to ", to_string(to), " with ", samples_per_step, " samples per step and ",
                 tokens_per_sample, " tokens per sample: the interval must be 0 or more, both rates 1 or more");
    if (interval.unit == to) return interval;
    std::int64_t samples = interval.count;
    if (interval.unit == Unit::steps) samples = product(samples, samples_per_step);
    if (interval.unit == Unit::tokens) samples = quotient_up(samples, tokens_per_sample);
    if (to == Unit::steps) return {quotient_up(samples, samples_per_step), to};
    if (to == Unit::tokens) return {product(samples, tokens_per_sample), to};
    return {samples, to};
}

}  // namespace microbatch
