#pragma once

#include <memory>
#include <string>
#include <vector>

#include "microbatch/distributed/group.h"

namespace microbatch {

/// Processes that were started together. By torchrun, or by anything that sets RANK, WORLD_SIZE, MASTER_ADDR and
/// MASTER_PORT; see Launcher.
struct Launched {
    int rank = 0;
    int size = 1;
    int local_size = 1;  ///< of them on this machine

    /// Errors: ErrorKind::usage, naming the variable, if one is missing or no number.
    static Launched from_environment();

    /// Waits until all have come; a single process is a group of one. The store is that of torchrun or the Launcher, else rank 0 serves it.
    /// Errors: ErrorKind::usage if nobody answers at the address within 5 minutes; ErrorKind::lost_rank if another rank does
    ///         not come within that time, or ends meanwhile.
    std::shared_ptr<Group> join(Group::Options options = {}) const;
};

/// The store through which processes that this one starts find each other. It lives as long as this object.
class Launcher {
public:
    Launcher();
    Launcher(const Launcher&) = delete;
    Launcher& operator=(const Launcher&) = delete;
    ~Launcher();

    /// "RANK=1", "WORLD_SIZE=4", ...: what Launched::from_environment() reads in a process on this machine.
    std::vector<std::string> environment(int rank, int size) const;

    /// True once a rank has met all the others: from then on, it finds by itself if one is lost.
    bool has_joined(int rank) const;

private:
    struct Server;
    std::unique_ptr<Server> server_;
};

}  // namespace microbatch
