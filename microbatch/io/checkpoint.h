#pragma once

#include <filesystem>

#include "microbatch/io/checkpoint_manifest.h"
#include "microbatch/io/file_system.h"
#include "microbatch/state/state_dict.h"

namespace microbatch {

/// What a checkpoint's manifest says of a run's state: `data/steps`, `data/samples`, `data/tokens`, `batch/samples` of
/// the batch that was left half-way, and `data/healthy`.
/// Errors: ErrorKind::bad_data if a count is missing.
CheckpointManifest manifest_of(const StateDict& state);

/// Writes a run's state into a folder that is there and empty, each file to the disk; the manifest is the last.
///
/// Files:  SECTION.safetensors with the tensors of each section (model.safetensors holds parameters and buffers),
///         state.json (the scalars), manifest.json (the size and CRC-32C of each).
/// Errors: ErrorKind::usage as FileSystem's, or where something could not be read again; and what reading a tensor
///         throws.
/// Memory: one tensor at a time, where it is in a file or not in row-major order.
void write_checkpoint(FileSystem& files, const std::filesystem::path& folder, const StateDict& state,
                      bool kept = false);

/// Reads a checkpoint, every bit of which is verified against the manifest. Tensors are read when they are asked for:
/// the files stay open, and may be removed meanwhile.
///
/// Errors: ErrorKind::bad_data, naming the file and what is wrong, if one is missing, of another size or checksum, or
///         not as write_checkpoint() writes it. No file of it is a link that is followed. Memory is bounded: that of
///         one file's header (see parse_safetensors_header) at a time, and what the tensors that are asked for take.
/// Cost:   reads all of it once.
StateDict read_checkpoint(const std::filesystem::path& folder);

/// The manifest alone. Errors: ErrorKind::bad_data as parse_checkpoint_manifest(), or if there is none.
CheckpointManifest read_checkpoint_manifest(const std::filesystem::path& folder);

}  // namespace microbatch
