#include "cli/commands/ranks.h"

#include <ATen/ops/tensor.h>
#include <fmt/format.h>

#include <set>
#include <vector>

#include "cli/options/config.h"
#include "cli/options/refuse.h"
#include "microbatch/core/error.h"
#include "microbatch/distributed/group_reducer.h"
#include "microbatch/distributed/launch.h"

namespace microbatch::cli {
namespace {

// Never destroyed: the process ends without waiting for calls that cannot end.
std::shared_ptr<Group>& joined_group() {
    static auto& group = *new std::shared_ptr<Group>;
    return group;
}

// May differ between machines: each rank has its own.
const std::set<std::string> own_settings{"data",    "memory", "micro-batch",      "recompute",  "batch-norm",
                                         "threads", "keep",   "checkpoint-every", "keep-every", "no-checkpoints"};

void require_same_settings(std::size_t rank, const std::string& config, const std::string& of_first) {
    const Values own = config_values(config, "a rank's settings"), first = config_values(of_first, "rank 0's settings");
    Values all = first;  // also those that only this rank has
    all.insert(own.begin(), own.end());
    for (const auto& [name, ignored] : all) {
        const std::string &mine = value_in(own, name), &wanted = value_in(first, name);
        if (own_settings.contains(name) || mine == wanted) continue;
        refuse("rank {} was started with other settings: --{} is {}, and {} on rank 0", rank, name, mine, wanted);
    }
}

void require_same_word(std::size_t rank, const char* what, const std::vector<std::string>& words) {
    if (words[rank] == words.front()) return;
    refuse("rank {} was started differently: it has {} {}, and rank 0 {} {}", rank, what, words[rank], what,
           words.front());
}

}  // namespace

Ranks::Ranks(Settings& settings) {
    const Launched launched = read_flag("several processes", [] { return Launched::from_environment(); });
    if (settings.processes > 1 && launched.size != settings.processes) {
        refuse("--processes {} contradicts WORLD_SIZE, which is {}: leave the flag out under torchrun",
               settings.processes, launched.size);
    }
    settings.processes = launched.local_size;
    if (launched.size == 1) return;
    if (!device_of(settings).is_cpu()) refuse("--device {}: several processes train on the CPU", settings.device);
    joined_group() = group_ = launched.join();
}

std::shared_ptr<Reducer> Ranks::reducer() const {
    if (group_ == nullptr) return std::make_shared<LocalReducer>();
    return std::make_shared<GroupReducer>(group_);
}

void Ranks::require_same(const std::string& config, std::uint32_t data, std::int64_t steps) const {
    if (group_ == nullptr) return;
    const std::vector<std::string> configs = group_->gather_bytes(config);
    const std::vector<std::string> versions = group_->gather_bytes(MICROBATCH_VERSION);
    const std::vector<std::string> checksums = group_->gather_bytes(fmt::format("{:08x}", data));
    const std::vector<std::string> points = group_->gather_bytes(fmt::format("{}", steps));
    for (std::size_t rank = 1; rank < configs.size(); ++rank) {
        require_same_settings(rank, configs[rank], configs.front());
        require_same_word(rank, "version", versions);
        require_same_word(rank, "data", checksums);
        require_same_word(rank, "step", points);
    }
}

std::string Ranks::from_first(const std::string& mine) const {
    return group_ == nullptr ? mine : group_->gather_bytes(mine).front();
}

void Ranks::agree(Plan& plan, std::int64_t& noise_every) const {
    if (group_ == nullptr) return;
    const at::Tensor mine = at::tensor(
        {plan.micro_batch, std::int64_t{plan.recompute}, static_cast<std::int64_t>(plan.batch_norm), noise_every},
        at::kLong);
    const at::Tensor first = group_->gather(mine).front();
    const auto* const numbers = first.const_data_ptr<std::int64_t>();
    plan = {.micro_batch = numbers[0], .recompute = numbers[1] != 0, .batch_norm = static_cast<BatchNorm>(numbers[2])};
    noise_every = numbers[3];
}

void leave_ranks(const std::string& why) noexcept {
    if (joined_group() != nullptr) joined_group()->leave(why);
}

}  // namespace microbatch::cli
