#pragma once

#include <filesystem>
#include <string>

#include "microbatch/io/checkpoint_manifest.h"
#include "microbatch/io/file_system.h"
#include "microbatch/run/trainer_state.h"

namespace microbatch {

/// A run at a point, to go on from.
struct Checkpoint {
    TrainerState trainer;
    std::string notes = "{}";  ///< what whoever trains wants to find again: one JSON object, as text
};

/// Writes a checkpoint's files into a folder that is there and empty, each to the disk; the manifest is the last.
///
/// Files:  weights.safetensors (parameters, then the model's buffers), optimizer.safetensors, generators.safetensors,
///         snapshot-STEPS.safetensors for each that Recovery has, open_batch.safetensors where a batch was left open,
///         state.json (the rest), manifest.json (the size and CRC-32C of each).
/// Errors: ErrorKind::usage as FileSystem's, or where notes are no JSON object; and what getting a tensor throws.
/// Memory: one tensor at a time, where it is in a file or not in row-major order.
void write_checkpoint(FileSystem& files, const std::filesystem::path& folder, const Checkpoint& checkpoint,
                      bool kept = false);

/// Reads a checkpoint whose every bit has been held against the manifest. Tensors are read when they are asked for: the
/// files stay open, and may be removed meanwhile.
///
/// Errors: ErrorKind::bad_data, naming the file and what is wrong, if one is missing, of another size or checksum, or
///         not as write_checkpoint() writes it. No file of it is a link that is followed. Memory is bounded: that of
///         one file's header (see parse_safetensors_header) at a time, and what the tensors that are asked for take.
/// Cost:   reads all of it once.
Checkpoint read_checkpoint(const std::filesystem::path& folder);

/// The manifest alone. Errors: ErrorKind::bad_data as parse_checkpoint_manifest(), or if there is none.
CheckpointManifest read_checkpoint_manifest(const std::filesystem::path& folder);

}  // namespace microbatch
