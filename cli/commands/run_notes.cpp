#include "cli/commands/run_notes.h"

#include <ATen/Parallel.h>
#include <ATen/Version.h>

#include <string>

namespace microbatch::cli {
namespace {

void save_files(const StateWriter& writer, const DataListing& listing) {
    writer.put("count", listing.count);
    writer.put("bytes", listing.bytes);
    writer.put("listed", listing.files.size());
    for (std::size_t i = 0; i < listing.files.size(); ++i) {
        const StateWriter file = writer.section(std::to_string(i));
        file.put("name", listing.files[i].name);
        file.put("bytes", listing.files[i].bytes);
        file.put("checksum", listing.files[i].checksum);
    }
}

DataListing files_from(const StateReader& reader) {
    DataListing listing{.files = {}, .count = reader.count("count"), .bytes = reader.seed("bytes")};
    const std::int64_t listed = reader.count("listed", 0, DataListing::most_files);
    for (std::int64_t i = 0; i < listed; ++i) {
        const StateReader file = reader.section(std::to_string(i));
        listing.files.push_back(
            {file.word("name"), file.seed("bytes"), static_cast<std::uint32_t>(file.count("checksum", 0, UINT32_MAX))});
    }
    return listing;
}

}  // namespace

StateDict RunNotes::save() const {
    StateDict state;
    const StateWriter writer(state);
    writer.put("config", config);
    writer.put("threads", threads);
    writer.put("processor", processor);
    writer.put("version", version);
    writer.put("data", data);
    save_files(writer.section("files"), files);
    return state;
}

RunNotes RunNotes::from(const StateDict& state) {
    const StateReader reader = StateReader(state).section("notes");
    return {.config = reader.word("config"),
            .threads = static_cast<int>(reader.count("threads", 1, 1 << 20)),
            .processor = reader.word("processor"),
            .version = reader.word("version"),
            .data = static_cast<std::uint32_t>(reader.count("data", 0, UINT32_MAX)),
            .files = files_from(reader.section("files"))};
}

RunNotes RunNotes::of_machine() {
    return {.threads = at::get_num_threads(), .processor = at::get_cpu_capability(), .version = MICROBATCH_VERSION};
}

}  // namespace microbatch::cli
