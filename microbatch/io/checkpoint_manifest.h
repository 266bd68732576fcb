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

/// manifest.json, the last file of a checkpoint to be written: what the checkpoint is of, and what it is made of.
struct CheckpointManifest {
    Progress progress = {};
    std::int64_t open_samples = 0;  ///< of the batch that was left half-way
    bool healthy = true;            ///< steps were applied, and the run is not recovering from a divergence
    bool kept = false;              ///< not to be removed when newer ones are there
    std::vector<CheckpointFile> files = {};

    bool operator==(const CheckpointManifest&) const = default;
};

/// A checkpoint that is whole, but is for another version to read.
class AnotherVersion : public Error {
public:
    using Error::Error;
};

/// As text: a JSON object whose last line is the CRC-32C of all that stands before it.
std::string to_text(const CheckpointManifest& manifest);

/// Reads it back. It is not trusted: any change of a bit is found, names lead nowhere but into the checkpoint's folder.
/// Errors: ErrorKind::bad_data, naming the `file`, if it is not as to_text() writes it; AnotherVersion, of that kind.
CheckpointManifest parse_checkpoint_manifest(std::string_view text, const std::string& file);

}  // namespace microbatch
