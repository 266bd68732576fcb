#include "cli/commands/run_notes.h"

#include <ATen/Parallel.h>
#include <ATen/Version.h>

namespace microbatch::cli {

StateDict RunNotes::save() const {
    StateDict state;
    const StateWriter writer(state);
    writer.put("config", config);
    writer.put("threads", threads);
    writer.put("processor", processor);
    writer.put("version", version);
    writer.put("data", data);
    return state;
}

RunNotes RunNotes::from(const StateDict& state) {
    const StateReader reader = StateReader(state).section("notes");
    return {.config = reader.word("config"),
            .threads = static_cast<int>(reader.count("threads", 1, 1 << 20)),
            .processor = reader.word("processor"),
            .version = reader.word("version"),
            .data = static_cast<std::uint32_t>(reader.count("data", 0, UINT32_MAX))};
}

RunNotes RunNotes::of_machine() {
    return {.threads = at::get_num_threads(), .processor = at::get_cpu_capability(), .version = MICROBATCH_VERSION};
}

}  // namespace microbatch::cli
