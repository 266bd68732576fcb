#pragma once

#include <cstdint>
#include <string>

#include "cli/commands/outcome.h"

namespace microbatch::cli {

/// What the command writes into a checkpoint beside the trainer's state.
struct RunNotes {
    std::string config = {};  ///< as config.toml
    int threads = 1;
    std::string processor = {};  ///< the kind of vectors that torch's kernels use
    std::string version = {};    ///< of microbatch
    std::uint32_t data = 0;      ///< OpenedData::fingerprint
    Outcome outcome = {};        ///< so far, without the times of single steps
};

/// This machine's.
RunNotes notes_of_machine();

std::string to_json_text(const RunNotes& notes);

/// Reads it back. Errors: ErrorKind::bad_data if it is something else; `source` is named.
RunNotes run_notes_from(const std::string& json, const std::string& source);

}  // namespace microbatch::cli
