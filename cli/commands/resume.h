#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "cli/commands/job.h"
#include "cli/options/options.h"
#include "microbatch/data/listing.h"
#include "microbatch/run/run_folder.h"
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

/// Fills options that are not set from the checkpoint that the folder resumes from. --micro-batch auto becomes the
/// recorded micro-batch, unless the budget differs. If options that change the training were given and the newest
/// checkpoint is not healthy, the folder resumes from the newest healthy one instead: this is the way out of a
/// divergence.
/// Errors: ErrorKind::usage if the model differs, naming each difference; ErrorKind::bad_data if the checkpoint was not
///         written by `train`.
void fill_from_checkpoint(Arguments& arguments, RunFolder& folder);

/// Throws ErrorKind::usage, naming each difference, if the model, data, batch, optimizer or seed differ from the
/// checkpoint's and --resume-changed was not given. The split of the batch may differ.
void require_same_run(const StateDict& state, const RunNotes& now, const Settings& settings);

/// What changes when a run is resumed.
struct Changes {
    std::vector<std::string> lines = {};
    bool beyond_cut = false;  ///< more than the split of the batch
};

/// Adapts the state of a run to changed settings. For a different run, the partial batch, the guard's statistics and
/// the noise average are dropped, and so is the optimizer's state if it does not match. Returns what changes. Errors:
/// as require_same_run(); ErrorKind::bad_data if the parameters or buffers do not match the model, or if the
///         optimizer's state does not match although nothing differs.
Changes reconcile(StateDict& state, const RunNotes& now, const Settings& settings, std::int64_t dataset_size,
                  Accumulator& accumulator);

}  // namespace microbatch::cli
