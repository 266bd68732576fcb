#include "microbatch/run/checkpoint_parts.h"

#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include "microbatch/distributed/group_reducer.h"
#include "microbatch/io/checkpoint_store.h"
#include "microbatch/run/recovery.h"
#include "support/errors.h"
#include "support/faulty_files.h"
#include "support/gradients.h"
#include "support/ranks.h"
#include "support/temp_folder.h"

namespace microbatch {
namespace {

using test::failures_of_ranks;
using test::Fault;
using test::FaultyFiles;
using test::run_ranks;

// Rank 0 has the scalars, the model and its part of the optimizer's state; the others have theirs.
StateDict state_of_rank(int rank, std::int64_t steps) {
    StateDict state;
    const StateWriter writer(state);
    const auto number = static_cast<double>(100 * steps + rank);
    writer.section("optimizer").put(str_cat(rank, "/0"), at::full({5}, number));
    writer.section("recovery").section("0").section("optimizer").put(str_cat(rank, "/0"), at::full({3}, number));
    writer.section("model").put("weight", at::full({4}, static_cast<double>(steps)));
    if (rank > 0) return state;
    const StateWriter data = writer.section("data");
    for (const char* name : {"steps", "samples", "tokens"}) data.put(name, steps);
    return state;
}

void expect_whole(const StateDict& state, int ranks, std::int64_t steps) {
    EXPECT_EQ(StateReader(state).section("data").count("steps"), steps);
    EXPECT_EQ(state.tensors().size(), 1 + 2 * static_cast<std::size_t>(ranks));
    for (int rank = 0; rank < ranks; ++rank) {
        const StateDict part = own_part(state_of_rank(rank, steps));
        EXPECT_EQ(part.tensors().size(), 2U);
        for (const auto& [name, tensor] : part.tensors()) {
            EXPECT_TRUE(test::same_bits(state.tensors().at(name).get(), tensor.get())) << name;
        }
    }
}

/// What the ranks do of a run that saves after each of these steps.
void save_steps(const std::shared_ptr<Group>& group, const std::filesystem::path& folder, FileSystem& files,
                const std::vector<std::int64_t>& steps, std::vector<std::string>* warnings = nullptr) {
    GroupReducer reducer(group);
    PartsOfRanks parts(reducer);
    std::optional<CheckpointStore> store;
    if (group->rank() == 0) store.emplace(folder, CheckpointOptions{.keep = 2, .parts = &parts}, files);
    for (const std::int64_t step : steps) {
        if (group->rank() > 0) {
            write_parts(reducer, files, [&] { return state_of_rank(group->rank(), step); });
            continue;
        }
        store->save(state_of_rank(0, step));
        EXPECT_FALSE(store->is_busy());
        if (warnings != nullptr) {
            for (std::string& one : store->warnings()) warnings->push_back(std::move(one));
        }
        parts.end();
    }
}

TEST(CheckpointParts, TogetherAreTheStateOfAll) {
    for (const int ranks : {1, 2, 4}) {
        const test::TempFolder temp;
        run_ranks(ranks, [&](const auto& group) { save_steps(group, temp.path(), system_files(), {1, 2, 3}); });
        CheckpointStore store(temp.path());
        expect_whole(*store.newest(), ranks, 3);
        EXPECT_EQ(store.folder(), temp.path());
        EXPECT_FALSE(std::filesystem::exists(temp.path() / "step-00000001"));  // the newest two are kept
    }
}

// Whatever fails on whichever rank: it is told, the checkpoint before is there, and the next one is written.
TEST(CheckpointParts, ThatCannotBeWrittenLeaveTheOthersAsTheyAre) {
    for (const int failing : {0, 2}) {
        for (const Fault fault : {Fault::error, Fault::half_error}) {
            bool struck = true;
            for (int strike = 1; struck; ++strike) {
                const test::TempFolder temp;
                const std::filesystem::path folder = temp.path() / "checkpoints";
                std::vector<std::string> warnings;
                run_ranks(3, [&](const auto& group) {
                    const std::filesystem::path attic = temp.path() / std::to_string(group->rank());
                    std::filesystem::create_directories(attic);
                    const bool fails = group->rank() == failing;
                    FaultyFiles files(attic, fails ? strike : 0, fault);
                    save_steps(group, folder, files, {1, 2}, &warnings);
                    if (fails) struck = files.operations() >= strike;
                });
                CheckpointStore store(folder);
                const std::optional<StateDict> newest = store.newest();
                ASSERT_TRUE(newest.has_value());  // one of two is always written
                const std::int64_t steps = StateReader(*newest).section("data").count("steps");
                expect_whole(*newest, 3, steps);
                EXPECT_TRUE(store.warnings().empty());
                EXPECT_TRUE(struck || (warnings.empty() && steps == 2));
                if (failing > 0 && struck) {
                    ASSERT_EQ(warnings.size(), 1U);
                    EXPECT_NE(warnings.front().find("was not written: rank 2"), std::string::npos) << warnings.front();
                }
            }
        }
    }
}

// The one that is named may be the other that has noticed.
TEST(CheckpointParts, OfARankThatEndsMeanwhileAreNotWaitedFor) {
    const test::TempFolder temp;
    run_ranks(3, [&](const auto& group) { save_steps(group, temp.path(), system_files(), {1}); });
    std::vector<std::string> warnings;
    const auto failures = failures_of_ranks(3, [&](const std::shared_ptr<Group>& group) {
        if (group->rank() == 2) throw std::runtime_error("killed");
        save_steps(group, temp.path(), system_files(), {2}, &warnings);
    });
    for (int rank = 0; rank < 2; ++rank) {
        test::expect_error(ErrorKind::lost_rank, {"rank ", " has ended"},
                           [&] { std::rethrow_exception(failures[static_cast<std::size_t>(rank)]); });
    }
    ASSERT_EQ(warnings.size(), 1U);
    EXPECT_NE(warnings.front().find("was not written: rank "), std::string::npos) << warnings.front();
    expect_whole(*CheckpointStore(temp.path()).newest(), 3, 1);
}

}  // namespace
}  // namespace microbatch
