// summary.json, which `report` and a resumed run read.
#include "microbatch/run/report.h"

#include <string>

#include "fuzz/fuzz.h"

namespace microbatch {
namespace {

std::string written_again(const RunSummary& summary) {
    write_run_summary(fuzz::folder().path(), summary);
    return test::read_file(fuzz::folder().path() / "summary.json");
}

}  // namespace
}  // namespace microbatch

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
    using namespace microbatch;
    const auto& folder = fuzz::folder();
    folder.write("summary.json", fuzz::characters(data, size));
    const auto summary = fuzz::accepted(ErrorKind::bad_data, [&] { return read_run_summary(folder.path()); });
    if (!summary) return 0;
    const std::string once = written_again(*summary);
    const std::string twice = written_again(read_run_summary(folder.path()));
    fuzz::require(once == twice, "what is written reads back");
    return 0;
}
