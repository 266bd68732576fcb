#include "microbatch/io/run_lock.h"

#include <fcntl.h>
#include <sys/file.h>
#include <unistd.h>

#include <cerrno>
#include <system_error>

#include "microbatch/core/error.h"
#include "microbatch/core/str_cat.h"
#include "microbatch/io/file_system.h"

namespace microbatch {

RunLock::RunLock(const std::filesystem::path& folder) {
    make_folders_to_the_disk(system_files(), folder);
    // Locks the folder itself: leaves no file behind, and child processes do not hold the lock.
    descriptor_ = ::open(folder.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (descriptor_ < 0) {
        throw Error(ErrorKind::usage, str_cat("cannot open the run folder ", folder.string(), ": ",
                                              std::generic_category().message(errno)));
    }
    held_ = ::flock(descriptor_, LOCK_EX | LOCK_NB) == 0;
    if (held_ || errno != EWOULDBLOCK) return;
    ::close(descriptor_);
    throw Error(ErrorKind::usage, str_cat("another process is training in ", folder.string(),
                                          ": wait for it, stop it, or name another folder for this run"));
}

RunLock::~RunLock() {
    ::close(descriptor_);
}

}  // namespace microbatch
