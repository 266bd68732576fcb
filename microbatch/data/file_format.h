#pragma once

#include "microbatch/io/input_file.h"

namespace microbatch {

/// What the first 8 KiB of a file look like.
struct FileFormat {
    enum Kind {
        text,    ///< no NUL byte
        utf16,   ///< a byte order mark, or ASCII text with a NUL byte next to each character
        known,   ///< the signature of a known format
        binary,  ///< a NUL byte
    };
    Kind kind = text;
    const char* name = "text";  ///< as in "is ..."
};

/// Errors: as InputFile::read.
FileFormat format_of(const InputFile& file);

}  // namespace microbatch
