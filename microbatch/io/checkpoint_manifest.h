#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "microbatch/core/error.h"
#include "microbatch/core/units.h"

namespace microbatch {

/// A file of a checkpoint.
struct CheckpointFile {
    std::string name;
    std::uint64_t bytes = 0;
    std::uint32_t crc32c = 0;

    bool operator==(const CheckpointFile&) const = default;
};

/// manifest.json, the last file of a checkpoint to be written: the progress of the run, and a list of the files.
struct CheckpointManifest {
    Progress progress = {};
    std::int64_t open_samples = 0;  ///< of the partial batch
    bool healthy = true;            ///< steps were applied, and the run is not recovering from a divergence
    bool kept = false;              ///< not to be deleted when there are newer ones
    std::vector<CheckpointFile> files = {};

    bool operator==(const CheckpointManifest&) const = default;
};

/// A valid checkpoint with a different format version.
class AnotherVersion : public Error {
public:
    using Error::Error;
};

/// As text: a JSON object whose last line is the CRC-32C of everything before it.
std::string to_text(const CheckpointManifest& manifest);

/// Parses the text, which is not trusted: any flipped bit is detected, and file names cannot lead out of the folder.
/// Errors: ErrorKind::bad_data, naming the `file`, if it was not written by to_text(); AnotherVersion, of that kind.
CheckpointManifest parse_checkpoint_manifest(std::string_view text, const std::string& file);

}  // namespace microbatch
