// manifest.json of a checkpoint.
#include <string>

#include "fuzz/fuzz.h"
#include "microbatch/core/crc32c.h"
#include "microbatch/io/checkpoint_manifest.h"

namespace microbatch {
namespace {

using fuzz::require;

std::optional<CheckpointManifest> parse(std::string_view content) {
    return fuzz::accepted(ErrorKind::bad_data, [&] { return parse_checkpoint_manifest(content, "manifest.json"); });
}

/// The last line, which a change of anything before it makes wrong: without it no changed input would come further.
std::string with_checksum(std::string_view before) {
    char digits[9];
    std::snprintf(digits, sizeof digits, "%08x", crc32c(before));
    return std::string(before) + ",\n  \"crc32c\": \"" + digits + "\"\n}\n";
}

void check(const std::string& content) {
    const auto manifest = parse(content);
    if (!manifest) return;
    for (const CheckpointFile& file : manifest->files) {
        require(!file.name.empty() && file.name.find('/') == std::string::npos && file.name.front() != '.',
                "a name stays in the folder");
    }
    const std::string written = to_text(*manifest);
    require(parse(written) == manifest, "what is written reads back");
    for (std::size_t at = 0; at < content.size(); at += 1 + content.size() / 50) {
        std::string changed = content;
        changed[at] = static_cast<char>(changed[at] ^ 1);
        require(!parse(changed), "a changed bit is found");
    }
}

}  // namespace
}  // namespace microbatch

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
    using namespace microbatch;
    const std::string_view input = fuzz::characters(data, size);
    check(std::string(input));
    check(with_checksum(input));
    return 0;
}
