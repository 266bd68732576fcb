#pragma once

#include <filesystem>

#include "microbatch/data/tokens.h"

namespace microbatch {

/// The tokens of a file of little-endian uint16 tokens: as nanoGPT writes them (nothing else in the file) or as llm.c
/// does (a header of 256 int32: 20240520, version 1, the number of tokens).
///
/// Errors: ErrorKind::bad_data if the file cannot be opened (see InputFile), is empty, has half a token at its end, or
///         has a header of llm.c that is cut off, disagrees with the file's size, is of another version, or announces
///         uint32 tokens (20240801); if it has no header and looks like text or another format (see format_of).
/// State:  only the header is read; the file stays open, even if it is removed, as long as a copy of the tokens lives.
Tokens open_token_file(const std::filesystem::path& path);

}  // namespace microbatch
