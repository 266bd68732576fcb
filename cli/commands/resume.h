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

/// What the command keeps in a checkpoint beside the state of the run.
struct RunNotes {
    std::string config = {};  ///< as config.toml
    int threads = 1;
    std::string processor = {};  ///< the kind of vectors that torch's kernels use
    std::string version = {};    ///< of microbatch
    std::uint32_t data = 0;      ///< OpenedData::fingerprint
    DataListing files = {};      ///< of that data

    StateDict save() const;

    /// Reads them from a run's state. Errors: ErrorKind::bad_data.
    static RunNotes from(const StateDict& state);

    /// This machine's.
    static RunNotes of_machine();
};

/// Fills options that are still open from the checkpoint that the folder resumes from; --micro-batch auto becomes what
/// it was, unless the budget differs. Where options were given that change how the run trains, and the newest
/// checkpoint is of steps that were refused, the folder's state becomes the newest healthy one: the cure for a
/// divergence.
/// Errors: ErrorKind::usage if the model differs, naming each difference; ErrorKind::bad_data if the checkpoint is not
///         one of `train`.
void fill_from_checkpoint(Arguments& arguments, RunFolder& folder);

/// Throws ErrorKind::usage, naming each difference, if model, data, batch, optimizer or seed are not the checkpoint's
/// and --resume-changed was not given. How the batch is cut may differ.
void require_same_run(const StateDict& state, const RunNotes& now, const Settings& settings);

/// How a run is resumed as another one.
struct Changes {
    std::vector<std::string> lines = {};
    bool beyond_cut = false;  ///< not only how the batch is cut
};

/// Makes the state of a run that changes one of the run as it is now: a partial batch, the guard's memory and the noise
/// of another run are dropped, and so is the state of an optimizer that does not take it. Returns what changes.
/// Errors: as require_same_run(); ErrorKind::bad_data if parameters or buffers are not the model's, or the optimizer's
///         state does not fit though nothing differs.
Changes reconcile(StateDict& state, const RunNotes& now, const Settings& settings, std::int64_t dataset_size,
                  Accumulator& accumulator);

}  // namespace microbatch::cli
