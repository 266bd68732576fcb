#pragma once

#include <cstdint>
#include <filesystem>
#include <memory>
#include <string>
#include <vector>

#include "microbatch/data/dataset.h"
#include "microbatch/data/listing.h"

namespace microbatch {

enum class DataKind { text, tokens, images };

/// The data at a path.
struct OpenedData {
    DataKind kind = DataKind::text;
    std::unique_ptr<Dataset> train;
    std::unique_ptr<Dataset> held_out;
    std::int64_t classes = 0;           ///< 256 for text, otherwise the largest token or label + 1 over both datasets
    std::int64_t height = 0;            ///< pixels; 0 unless images
    std::int64_t width = 0;             ///< pixels; 0 unless images
    std::uint32_t fingerprint = 0;      ///< CRC-32C of the training data, which identifies it
    std::string description;            ///< one line, for people
    DataListing files;                  ///< the files that were read
    std::vector<std::string> notes;     ///< which files were read, and which were skipped and why: one line each
    std::vector<std::string> warnings;  ///< what is probably wrong, one line each
};

/// Opens the data at a path for training, depending on what it is:
/// - a folder with an IDX file (`*idx3-ubyte*`, `*idx1-ubyte*`): images. `train-images-idx3-ubyte` and
///   `train-labels-idx1-ubyte` are the training data; the `t10k-` pair, if present, is held out. With or without `.gz`;
///   the uncompressed file takes precedence.
/// - a file named `*.bin`: uint16 tokens (see open_token_file).
/// - another file or folder: text, each byte a token (see read_text).
/// Without a held-out pair, the last 10 % (rounded down) of the tokens or images are held out. Pixels are normalised
/// with the mean and deviation of the training images. `warnings` says what is probably wrong: see check_tokens and
/// check_labels.
///
/// length: tokens per sample; not used for images.
/// Errors: ErrorKind::usage if length < 1 for text or tokens; ErrorKind::bad_data if a file is missing, corrupted or
///         does not match the others, either part has fewer than length + 1 tokens or no image, or text or an array of
///         images would take more than half of the memory that is available now.
/// State:  files of text and images are closed again. A file of tokens stays open and is read on demand: get() throws
///         ErrorKind::bad_data if it has become shorter; it may be deleted.
/// Cost:   text and images are read into memory, tokens are not; one pass over everything.
OpenedData open_data(const std::filesystem::path& path, std::int64_t length);

}  // namespace microbatch
