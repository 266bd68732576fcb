#pragma once

#include <cstdint>
#include <memory>
#include <string>

#include "cli/commands/job.h"
#include "cli/options/settings.h"
#include "microbatch/distributed/group.h"

namespace microbatch::cli {

/// The processes of a run, of which this is one: those that torchrun or --processes has started.
class Ranks {
public:
    /// Waits for the others; a single process if the environment names no others.
    /// Errors: ErrorKind::usage as Launched, or if --processes contradicts the environment.
    explicit Ranks(Settings& settings);

    bool is_first() const { return group_ == nullptr || group_->rank() == 0; }
    int size() const { return group_ == nullptr ? 1 : group_->size(); }
    std::shared_ptr<Reducer> reducer() const;

    /// Throws ErrorKind::usage, naming the difference, if a rank was started with other settings, data or another version
    /// than the first, or resumes from another step. All ranks.
    void require_same(const std::string& config, std::uint32_t data, std::int64_t steps) const;

    /// True if it is true for any rank. All ranks.
    bool any(bool mine) const { return group_ != nullptr ? group_->any(mine) : mine; }

    /// What the first rank says. All ranks.
    std::string from_first(const std::string& mine) const;

    /// The numbers that all have to have in common: the first rank's. All ranks.
    void agree(Plan& plan, std::int64_t& noise_every) const;

private:
    std::shared_ptr<Group> group_;
};

/// Tells the other ranks, if there are any, why this one ends.
void leave_ranks(const std::string& why) noexcept;

}  // namespace microbatch::cli
