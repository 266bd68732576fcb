#pragma once

#include <functional>
#include <string>

#include "microbatch/io/checkpoint.h"
#include "microbatch/step/reducer.h"

namespace microbatch {

/// The parts of checkpoints that the other ranks of a run write, as the first one sees them. The others call
/// write_parts() whenever the first one may write a checkpoint; then it calls end().
///
/// Ownership: borrows the reducer.
class PartsOfRanks final : public CheckpointParts {
public:
    explicit PartsOfRanks(Reducer& reducer) : reducer_(reducer) {}

    std::int64_t bytes_beside(const StateDict& state) const override;
    void begin(const std::filesystem::path& folder) override;
    std::vector<CheckpointFile> finish() override;

    /// Tells the others that no more is to be written now. Errors: ErrorKind::lost_rank.
    void end();

private:
    Reducer& reducer_;
};

/// Writes this rank's part of a state as often as the first rank asks for it, until it calls end().
/// Errors: ErrorKind::lost_rank. What prevents writing is told to the first rank.
void write_parts(Reducer& reducer, FileSystem& files, const std::function<StateDict()>& state);

}  // namespace microbatch
