#pragma once

#include <filesystem>

#include "microbatch/data/tokens.h"

namespace microbatch {

/// The tokens of a file of little-endian uint16 tokens: as written by nanoGPT (only tokens) or by llm.c (with a header
/// of 256 int32: 20240520, version 1, the number of tokens).
///
/// Errors: ErrorKind::bad_data if the file cannot be opened (see InputFile), is empty, ends with half a token, has an
///         llm.c header that is truncated, contradicts the file's size, has another version, or claims uint32 tokens
///         (20240801); or if it has no header and looks like text or another format (see format_of).
/// State:  only the header is read; the file stays open, even if it is deleted, while a copy of the tokens exists.
Tokens open_token_file(const std::filesystem::path& path);

}  // namespace microbatch
