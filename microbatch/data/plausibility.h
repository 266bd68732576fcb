#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "microbatch/data/tokens.h"

namespace microbatch {

/// What is likely wrong with a file of tokens, a line each: a largest token far above all others.
///
/// source: of the tokens, for messages.
/// Errors: ErrorKind::bad_data if they are surely not uint16 tokens: every second one is 0 or next to it (uint32), or
///         two bytes of text in one; or if they are all the same.
std::vector<std::string> check_tokens(const TokenScan& seen, const std::string& source);

/// What is likely wrong with the labels of images, a line each: classes that no image, or only a held-out one, has; a
/// single class held out.
///
/// Errors: ErrorKind::bad_data if all training images have the same label.
std::vector<std::string> check_labels(std::span<const std::uint8_t> trained, std::span<const std::uint8_t> held_out,
                                      const std::string& source);

/// Throws ErrorKind::bad_data if the images stand in order of their class: then their last tenth tells nothing of the
/// others. Fewer than ten images a class may stand so by chance.
void refuse_grouped(std::span<const std::uint8_t> labels, const std::string& source);

}  // namespace microbatch
