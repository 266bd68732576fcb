#pragma once

#include <cstdint>
#include <string>

#include "microbatch/data/listing.h"
#include "microbatch/state/state_dict.h"

namespace microbatch::cli {

/// What the command stores in a checkpoint in addition to the state of the run.
struct RunNotes {
    std::string config = {};  ///< the text of config.toml
    int threads = 1;
    std::string processor = {};  ///< the vector type of torch's kernels
    std::string version = {};    ///< of microbatch
    std::uint32_t data = 0;      ///< OpenedData::fingerprint
    DataListing files = {};      ///< of that data

    StateDict save() const;

    /// Reads them from a run's state. Errors: ErrorKind::bad_data.
    static RunNotes from(const StateDict& state);

    /// The notes for this machine.
    static RunNotes of_machine();
};

}  // namespace microbatch::cli
