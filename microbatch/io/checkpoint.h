#pragma once

#include <filesystem>
#include <vector>

#include "microbatch/io/checkpoint_manifest.h"
#include "microbatch/io/file_system.h"
#include "microbatch/state/state_dict.h"

namespace microbatch {

/// The manifest of a run's state, from `data/steps`, `data/samples`, `data/tokens`, `batch/samples` of the partial
/// batch, and `data/healthy`.
/// Errors: ErrorKind::bad_data if a count is missing.
CheckpointManifest manifest_of(const StateDict& state);

/// The other processes of a run, each of which writes its part of a checkpoint while the first one writes its own.
class CheckpointParts {
public:
    virtual ~CheckpointParts() = default;

    /// About how much the others write beside this state of the first one.
    virtual std::int64_t bytes_beside(const StateDict& state) const = 0;

    /// Has the others write their parts to this folder, which exists. Errors: ErrorKind::lost_rank.
    virtual void begin(const std::filesystem::path& folder) = 0;

    /// The files that they have written; called after each begin(). Errors: ErrorKind::not_written if one could not;
    /// ErrorKind::lost_rank.
    virtual std::vector<CheckpointFile> finish() = 0;
};

/// Writes a run's state to an existing, empty folder. Each file is synced to the disk; the manifest is written last.
///
/// Files:  SECTION.safetensors with the tensors of each section (model.safetensors has parameters and buffers),
///         state.json (the scalars), SECTION.RANK.safetensors and state.RANK.json of other processes, manifest.json (the
///         size and CRC-32C of each file).
/// Errors: ErrorKind::usage as FileSystem, or if a value could not be read back; whatever reading a tensor throws.
/// Memory: one tensor at a time, if it is in a file or not in row-major order.
void write_checkpoint(FileSystem& files, const std::filesystem::path& folder, const StateDict& state, bool kept = false,
                      CheckpointParts* others = nullptr);

/// Writes another process's part of a state to the folder of a checkpoint: see CheckpointParts. Errors and memory as
/// write_checkpoint().
std::vector<CheckpointFile> write_checkpoint_part(FileSystem& files, const std::filesystem::path& folder,
                                                  const StateDict& state, int rank);

/// Reads a checkpoint and verifies every bit of it against the manifest. Tensors are read on demand: the files stay
/// open, and may be deleted in the meantime.
///
/// Errors: ErrorKind::bad_data, naming the file and what is wrong, if a file is missing, has a different size or
///         checksum, or was not written by write_checkpoint(). Symbolic links are not followed.
/// Memory: bounded: the header of one file at a time (see parse_safetensors_header), and the requested tensors.
/// Cost:   reads everything once.
StateDict read_checkpoint(const std::filesystem::path& folder);

/// Reads only the manifest. Errors: ErrorKind::bad_data as parse_checkpoint_manifest(), or if the folder has no manifest.
CheckpointManifest read_checkpoint_manifest(const std::filesystem::path& folder);

}  // namespace microbatch
