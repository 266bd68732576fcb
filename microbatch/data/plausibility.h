#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "microbatch/data/tokens.h"

namespace microbatch {

/// What is probably wrong with a file of tokens, one line each: a largest token far above all others.
///
/// source: the origin of the tokens, for messages.
/// Errors: ErrorKind::bad_data if they are certainly not uint16 tokens: every second one is 0 or close to it (uint32),
///         or each has two bytes of text; or if they are all the same.
std::vector<std::string> check_tokens(const TokenScan& seen, const std::string& source);

/// What is probably wrong with the labels of images, one line each: classes that no image, or only a held-out one, has;
/// a single held-out class.
///
/// Errors: ErrorKind::bad_data if all training images have the same label.
std::vector<std::string> check_labels(std::span<const std::uint8_t> trained, std::span<const std::uint8_t> held_out,
                                      const std::string& source);

/// Throws ErrorKind::bad_data if the images are sorted by class: then their last tenth says nothing about the other
/// classes. With fewer than ten images per class, this may happen by chance.
void refuse_grouped(std::span<const std::uint8_t> labels, const std::string& source);

}  // namespace microbatch
