#include "cli/commands/commands.h"
#include "cli/options/config.h"
#include "cli/print/output.h"
#include "microbatch/run/run_report.h"

namespace microbatch::cli {
namespace {

int write_report(const Arguments& arguments) {
    const std::string& run = arguments.settings.run;
    const std::string warning = write_report_of(run);
    if (!warning.empty()) print(stderr, "warning: {}\n", warning);
    print(stdout, "written   {}\n", (std::filesystem::path(run) / "report.html").string());
    return 0;
}

}  // namespace

std::string write_report_of(const std::filesystem::path& folder, const RunSummary& more) {
    const Values config = read_config(folder);
    return write_run_report(folder, {config.begin(), config.end()}, more);
}

CommandSpec report_command() {
    return {.command = command::report,
            .name = "report",
            .summary = "Write report.html for a run: charts of its training",
            .footer = R"(Example:
  microbatch report runs/gpt-tiny-20261124-120000
`train` writes the same page at its end. The page works offline. For TensorBoard, the folder also contains
events.out.tfevents.*.)",
            .run = write_report};
}

}  // namespace microbatch::cli
