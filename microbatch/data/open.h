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

/// What a path of data turned out to hold.
struct OpenedData {
    DataKind kind = DataKind::text;
    std::unique_ptr<Dataset> train;
    std::unique_ptr<Dataset> held_out;
    std::int64_t classes = 0;           ///< 256 for text, else the largest token or label + 1 over both datasets
    std::int64_t height = 0;            ///< pixels; 0 unless images
    std::int64_t width = 0;             ///< pixels; 0 unless images
    std::uint32_t fingerprint = 0;      ///< CRC-32C of the bytes trained on: other data has another one
    std::string description;            ///< one line for a person
    DataListing files;                  ///< what was read
    std::vector<std::string> notes;     ///< what was read, and what was left out and why: a line each
    std::vector<std::string> warnings;  ///< what is likely not meant, a line each
};

/// Opens the data at a path for training, by what it is:
/// - a folder with an IDX file (`*idx3-ubyte*`, `*idx1-ubyte*`): images. `train-images-idx3-ubyte` and
///   `train-labels-idx1-ubyte` are trained on; the `t10k-` pair is held out, if it is there. With or without `.gz`, the
///   plain one first.
/// - a file named `*.bin`: uint16 tokens (see open_token_file).
/// - another file or folder: text, each byte a token (see read_text).
/// Without a held-out pair, the last 10 % (rounded down) of the tokens or images are held out. Pixels are scaled by the
/// mean and deviation of the images trained on. What is likely not meant is in the warnings: see check_tokens and
/// check_labels.
///
/// length: tokens per sample; not used for images.
/// Errors: ErrorKind::usage if length < 1 for text or tokens; ErrorKind::bad_data if a file is missing, damaged or does
///         not fit the others, either part has fewer than length + 1 tokens or no image, or text or an array of images
///         would take more than half of the memory that the machine has available now.
/// State:  files of text and images are closed again. A file of tokens stays open and is read when a sample is asked
///         for: get() throws ErrorKind::bad_data if it has become shorter; it may be removed.
/// Cost:   text and images are read into memory, tokens are not; one pass over all of it.
OpenedData open_data(const std::filesystem::path& path, std::int64_t length);

}  // namespace microbatch
