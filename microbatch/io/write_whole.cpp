#include "microbatch/io/write_whole.h"

#include <cerrno>
#include <cstring>
#include <fstream>

#include "microbatch/core/error.h"
#include "microbatch/core/text.h"

namespace microbatch {

void write_whole(const std::filesystem::path& file, std::string_view content) {
    std::filesystem::path unfinished = file;
    unfinished += ".part";
    errno = 0;
    std::ofstream stream(unfinished, std::ios::binary | std::ios::trunc);
    stream << content;
    stream.close();
    std::error_code failure;
    if (stream) std::filesystem::rename(unfinished, file, failure);
    if (stream && !failure) return;
    const std::string why = stream ? failure.message() : std::strerror(errno);
    std::filesystem::remove(unfinished, failure);
    throw Error(ErrorKind::usage, text("cannot write ", file.string(), ": ", why));
}

}  // namespace microbatch
