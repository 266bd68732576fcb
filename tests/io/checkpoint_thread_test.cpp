// A checkpoint that is written while the run continues, and its possible failures.
#include <ATen/ATen.h>
#include <unistd.h>

#include <atomic>
#include <functional>
#include <future>
#include <stdexcept>
#include <thread>

#include "support/device_memory.h"
#include "support/full_disk.h"
#include "support/rich_run.h"
#include "support/stores.h"
#include "support/waiting.h"

namespace microbatch {
namespace {

using namespace test;
namespace fs = std::filesystem;

using CheckpointThread = CheckpointFolder;

TEST_F(CheckpointThread, AThreadWritesTheBytesThatWouldBeWrittenAtOnceAlthoughTheRunContinues) {
    for (const TrainingOptions& how : {TrainingOptions{.model = "gpt"}, rich()}) {
        const TempFolder now, later;
        Training run(how);
        for (int i = 0; i < 10; ++i) run.step();
        CheckpointStore at_once(now.path()), in_thread(later.path());
        EXPECT_TRUE(at_once.save_now(state_of(run.trainer())));
        in_thread.save(state_of(run.trainer()));
        EXPECT_GT(in_thread.memory_bytes(), 0);
        do run.step();
        while (in_thread.is_busy());
        EXPECT_TRUE(in_thread.release());
        EXPECT_TRUE(in_thread.warnings().empty());
        EXPECT_EQ(contents_of(now.path()), contents_of(later.path()));
    }
}

/// The system's files, none of which is created before the gate opens; and what happens then.
class GatedFiles final : public FileSystem {
public:
    explicit GatedFiles(std::function<void()> then = [] {}) : then_(std::move(then)) {}

    void open() { gate_.set_value(); }

    std::unique_ptr<OutputFile> create(const fs::path& file) override {
        opened_.wait();
        then_();
        return system_files().create(file);
    }
    void make_folder(const fs::path& folder) override { system_files().make_folder(folder); }
    void rename(const fs::path& from, const fs::path& to) override { system_files().rename(from, to); }
    void remove_all(const fs::path& path) override { system_files().remove_all(path); }
    void sync(const fs::path& path) override { system_files().sync(path); }

private:
    std::promise<void> gate_;
    std::shared_future<void> opened_ = gate_.get_future().share();
    std::function<void()> then_;
};

TEST_F(CheckpointThread, IsBusyAndHoldsItsCopyUntilItIsWritten) {
    GatedFiles files;
    CheckpointStore store(folder(), {}, files);
    const StateDict state = after(1);
    EXPECT_FALSE(store.is_busy());
    EXPECT_EQ(store.memory_bytes(), 0);
    EXPECT_FALSE(store.release());
    store.save(state);
    EXPECT_TRUE(store.is_busy());
    EXPECT_EQ(store.memory_bytes(), state.bytes());
    EXPECT_TRUE(store.warnings().empty());
    EXPECT_TRUE(store.is_busy());
    EXPECT_TRUE(comes_true([this] { return !names_in(folder()).empty(); }));
    EXPECT_EQ(names_in(folder()), (Names{"step-00000001.part"}));
    files.open();
    EXPECT_TRUE(store.release());
    EXPECT_FALSE(store.is_busy());
    EXPECT_EQ(store.memory_bytes(), 0);
    EXPECT_FALSE(store.release());
    EXPECT_EQ(names_in(folder()), (Names{"step-00000001"}));
}

TEST_F(CheckpointThread, WarningsFreeTheCopyOfWhatIsWritten) {
    CheckpointStore store(folder());
    store.save(after(1));
    EXPECT_TRUE(comes_true([&store] { return !store.is_busy(); }));
    EXPECT_GT(store.memory_bytes(), 0);
    EXPECT_TRUE(store.warnings().empty());
    EXPECT_EQ(store.memory_bytes(), 0);
}

TEST_F(CheckpointThread, TheMemoryOfTheCopyIsThatOfTheTensorsAndComesBack) {
    install_budget_allocator();
    Training run({});
    for (int i = 0; i < 3; ++i) run.step();
    CheckpointStore store(folder());
    const StateDict state = state_of(run.trainer());
    const std::int64_t before = test::memory_use().live_bytes;
    store.save(state);
    EXPECT_EQ(test::memory_use().live_bytes - before, store.memory_bytes());
    EXPECT_TRUE(store.release());
    EXPECT_EQ(test::memory_use().live_bytes, before);
}

TEST_F(CheckpointThread, WithoutRoomForACopyItIsWrittenAtOnce) {
    CheckpointStore store(folder(), {.memory_bytes = 100});
    store.save(after(1));
    EXPECT_EQ(store.memory_bytes(), 0);
    EXPECT_FALSE(store.is_busy());
    EXPECT_EQ(names_in(folder()), (Names{"step-00000001"}));
    install_budget_allocator();
    CheckpointStore tight(folder());
    const StateDict next = after(1);
    test::fail_allocation(3);
    tight.save(next);
    test::fail_allocation(0);
    EXPECT_EQ(tight.memory_bytes(), 0);
    EXPECT_EQ(names_in(folder()), (Names{"step-00000001", "step-00000002"}));
    EXPECT_TRUE(tight.warnings().empty());
    EXPECT_EQ(steps_in(*CheckpointStore(folder()).newest()), 2);
}

TEST_F(CheckpointThread, SnapshotsInFilesAreReadWhileNoStepIsTaken) {
    TrainingOptions how = rich();
    how.trainer.recovery->memory_bytes = 0;
    how.snapshots = temp_.path() / "snapshots";
    const auto run = rich_run(how);
    CheckpointStore store(folder());
    store.save(state_of(run->trainer()));
    EXPECT_FALSE(store.is_busy());
    EXPECT_EQ(store.memory_bytes(), 0);
    EXPECT_EQ(names_in(folder()), (Names{"step-00000010-3"}));
}

TEST_F(CheckpointThread, ASecondSaveWaitsForTheFirst) {
    GatedFiles files;
    CheckpointStore store(folder(), {}, files);
    store.save(after(1));
    std::atomic<bool> opened = false;
    std::thread opens([&, waiting = ::gettid()] {
        EXPECT_TRUE(comes_true([waiting] { return is_asleep(waiting); }));
        opened = true;
        files.open();
    });
    store.save(after(1));
    EXPECT_TRUE(opened);
    opens.join();
    EXPECT_TRUE(store.release());
    EXPECT_EQ(names_in(folder()), (Names{"step-00000001", "step-00000002"}));
}

TEST_F(CheckpointThread, ItsEndWaitsForWhatIsBeingWritten) {
    GatedFiles files;
    std::thread opens;
    {
        CheckpointStore store(folder(), {}, files);
        store.save(after(1));
        opens = std::thread([&files, waiting = ::gettid()] {
            EXPECT_TRUE(comes_true([waiting] { return is_asleep(waiting); }));
            files.open();
        });
    }
    EXPECT_EQ(names_in(folder()), (Names{"step-00000001"}));
    opens.join();
}

TEST_F(CheckpointThread, AThreadThatDiesIsAWarningAndTheNextSaveWorks) {
    const std::vector<std::function<void()>> deaths = {
        [] { throw Error(ErrorKind::bad_data, "struck"); },
        [] { throw std::runtime_error("struck"); },
        [] { TORCH_CHECK(false, "struck"); },
        [] { throw 5; },
        [] { throw std::bad_alloc(); },
    };
    std::function<void()> death = [] {};
    GatedFiles files([&death] { death(); });
    files.open();
    CheckpointStore store(folder(), {}, files);
    EXPECT_TRUE(store.save_now(after(1)));
    const auto before = contents_of(folder());
    const auto expect_warning = [&] {
        const std::vector<std::string> warnings = store.warnings();
        ASSERT_EQ(warnings.size(), 1U);
        EXPECT_NE(warnings[0].find("step " + std::to_string(run_.steps())), std::string::npos) << warnings[0];
        EXPECT_EQ(contents_of(folder()), before);
        EXPECT_EQ(names_in(folder()), (Names{"step-00000001"}));  // no half of one
    };
    for (const auto& each : deaths) {
        death = each;
        store.save(after(1));
        EXPECT_TRUE(store.release());
        expect_warning();
        EXPECT_FALSE(store.save_now(after(1)));
        expect_warning();
        // Or where a tensor is read.
        death = [] {};
        StateDict state = after(1);
        state.put("recovery/tensor", StoredTensor(at::ones({3}), [&each] {
                      each();
                      return at::ones({3});
                  }));
        EXPECT_FALSE(store.save_now(state));
        expect_warning();
    }
    const std::int64_t steps = run_.steps();
    EXPECT_TRUE(store.save_now(state_of(run_.trainer())));
    EXPECT_TRUE(store.warnings().empty());
    EXPECT_EQ(steps_in(*CheckpointStore(folder()).newest()), steps);
}

TEST_F(CheckpointThread, AFolderThatCannotBeWrittenIsAWarning) {
    std::ofstream(temp_.path() / "run") << "a file in its place";
    CheckpointStore store(folder());
    EXPECT_FALSE(store.save_now(after(1)));
    store.save(after(1));
    EXPECT_TRUE(store.release());
    const std::vector<std::string> warnings = store.warnings();
    ASSERT_EQ(warnings.size(), 2U);
    for (const std::string& warning : warnings) EXPECT_NE(warning.find("run"), std::string::npos) << warning;
    fs::remove(temp_.path() / "run");
    EXPECT_TRUE(store.save_now(after(1)));
    EXPECT_TRUE(store.warnings().empty());
}

TEST_F(CheckpointThread, AFolderThatMayNoLongerBeWrittenIsAWarningAndWhatIsThereStays) {
    CheckpointStore store(folder());
    EXPECT_TRUE(store.save_now(after(1)));
    const auto before = contents_of(folder());
    fs::permissions(temp_.path() / "run", fs::perms::all);
    temp_.without_permission(folder(), [&] { EXPECT_FALSE(store.save_now(after(1))); });
    ASSERT_EQ(store.warnings().size(), 1U);
    EXPECT_EQ(contents_of(folder()), before);
    EXPECT_TRUE(store.save_now(after(1)));
}

TEST_F(CheckpointThread, AFullDiskIsAWarningAndWhatIsThereStays) {
    CheckpointStore store(folder());
    EXPECT_TRUE(store.save_now(after(1)));
    const auto before = contents_of(folder());
    for (const rlim_t room : {0, 100, 1000, 5000}) {  // a generator alone takes 5 kB
        const FullDisk disk(room);
        EXPECT_FALSE(store.save_now(after(1)));
        store.save(after(1));
        EXPECT_TRUE(store.release());
        const std::vector<std::string> warnings = store.warnings();
        ASSERT_EQ(warnings.size(), 2U);
        for (const std::string& warning : warnings) {
            EXPECT_NE(warning.find("File too large"), std::string::npos) << warning;
        }
        EXPECT_EQ(contents_of(folder()), before);
        EXPECT_EQ(names_in(folder()), (Names{"step-00000001"}));  // and gives back what it took
    }
    EXPECT_TRUE(store.save_now(after(1)));
    EXPECT_TRUE(store.warnings().empty());
}

}  // namespace
}  // namespace microbatch
