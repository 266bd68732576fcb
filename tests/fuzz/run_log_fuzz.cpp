// metrics.jsonl, which `report`, `advise` and a resumed run read.
#include "microbatch/run/run_log.h"

#include "fuzz/fuzz.h"

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
    using namespace microbatch;
    const std::string_view input = fuzz::characters(data, size);
    fuzz::folder().write("metrics.jsonl", input);
    const auto run = fuzz::accepted(ErrorKind::bad_data, [] { return read_run_log(fuzz::folder().path()); });
    if (!run) return 0;
    fuzz::require(!run->steps.empty(), "a run that is read has a step");
    for (const StepRecord& step : run->steps) {
        fuzz::require(step.step > 0 && step.peak_bytes >= 0 && step.micro_batch > 0, "a step is sound");
    }
    // Whatever a process left of a line: the lines before it are read as they were.
    fuzz::folder().write("metrics.jsonl", std::string(input.substr(0, input.rfind('\n') + 1)) + R"({"step":)");
    const auto cut = fuzz::accepted(ErrorKind::bad_data, [] { return read_run_log(fuzz::folder().path()); });
    if (!cut) return 0;
    fuzz::require(cut->cut, "a line that is cut off is told");
    const bool was_whole = input.ends_with('\n');
    fuzz::require(cut->steps.size() + (was_whole || run->cut ? 0 : 1) == run->steps.size(), "the others are the same");
    return 0;
}
