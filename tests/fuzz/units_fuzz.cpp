// Input from the command line and config.toml: sizes, counts, intervals, names and batch schedules.
#include <string>

#include "fuzz/fuzz.h"
#include "microbatch/core/batch_schedule.h"
#include "microbatch/core/learning_rate.h"
#include "microbatch/core/schedule.h"
#include "microbatch/core/units.h"

namespace microbatch {
namespace {

using fuzz::accepted;
using fuzz::require;

void read_numbers(std::string_view input) {
    if (const auto bytes = accepted(ErrorKind::usage, [&] { return parse_bytes(input); })) {
        require(*bytes > 0, "a size is above 0");
        require(parse_bytes(std::to_string(*bytes)) == *bytes, "a size in bytes is that size");
        require(!format_bytes(*bytes).empty(), "a size can be printed");
    }
    if (const auto count = accepted(ErrorKind::usage, [&] { return parse_count(input); })) {
        require(*count >= 0, "a count is not negative");
        require(parse_count(std::to_string(*count)) == *count, "a count without a suffix is that count");
    }
    if (const auto interval = accepted(ErrorKind::usage, [&] { return parse_interval(input); })) {
        require(interval->count >= 0, "an interval is not negative");
        require(parse_interval(to_string(*interval)) == *interval, "an interval reads back");
    }
}

void read_names(std::string_view input) {
    if (const auto shape = accepted(ErrorKind::usage, [&] { return parse_schedule(input); })) {
        require(to_string(*shape) == input, "a schedule's name reads back");
    }
    if (const auto rule = accepted(ErrorKind::usage, [&] { return parse_rate_rule(input); })) {
        require(to_string(*rule) == input, "a rule's name reads back");
    }
}

void read_schedule(std::string_view input) {
    const auto schedule = accepted(ErrorKind::usage, [&] { return parse_batch_schedule(input); });
    if (!schedule) return;
    validate(*schedule);
    require(parse_batch_schedule(to_string(*schedule)) == *schedule, "a batch schedule reads back");
    const std::int64_t least = smallest_batch(*schedule), most = largest_batch(*schedule);
    require(1 <= least && least <= most, "a batch is at least 1");
    for (const BatchStage& stage : *schedule) {
        const std::int64_t at = stage.from.count;
        const std::int64_t batch = batch_at(*schedule, Progress{.steps = at, .samples = at, .tokens = at});
        require(stage.from.count == 0 || batch == stage.batch, "a stage begins where it says");
        require(least <= batch && batch <= most, "a batch is one of the stages'");
    }
}

}  // namespace
}  // namespace microbatch

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
    const std::string_view input = microbatch::fuzz::characters(data, size);
    microbatch::read_numbers(input);
    microbatch::read_names(input);
    microbatch::read_schedule(input);
    return 0;
}
