// A fault at any operation on a file: the run continues, or is resumed from a valid checkpoint.
#include <gtest/gtest.h>

#include "microbatch/io/checkpoint_store.h"
#include "support/errors.h"
#include "support/faulty_files.h"
#include "support/rich_run.h"
#include "support/states.h"
#include "support/temp_folder.h"

namespace microbatch {
namespace {

using namespace test;
namespace fs = std::filesystem;

/// The state of a run after each of its steps.
const std::vector<StateDict>& states() {
    static const std::vector<StateDict> all = [] {
        std::vector<StateDict> made;
        TrainingOptions how = rich();
        how.spikes.clear();
        Training run(how);
        for (int i = 0; i < 6; ++i) {
            made.push_back(run.taken_apart());
            run.step();
        }
        return made;
    }();
    return all;
}

const StateDict& of_step(std::int64_t steps) {
    return states()[static_cast<std::size_t>(steps)];
}

/// A folder with the checkpoints of steps 1 and 2; on request, also a corrupted one of step 3.
class Disk {
public:
    explicit Disk(bool with_damaged = false) {
        static const TempFolder written;  // by the system's own files, once
        if (fs::is_empty(written.path())) {
            CheckpointStore store(written.path());
            for (const int steps : {1, 2, 3}) store.save_now(of_step(steps));
            std::ofstream(written.path() / "step-00000003" / "state.json") << "{}";
        }
        fs::create_directories(checkpoints());
        fs::create_directory(attic());
        fs::copy(written.path(), checkpoints(), fs::copy_options::recursive);
        if (!with_damaged) fs::remove_all(checkpoints() / "step-00000003");
        std::ofstream(log()) << "{}\n";
    }

    fs::path root() const { return temp_.path() / "run"; }
    fs::path checkpoints() const { return root() / "checkpoints"; }
    fs::path log() const { return root() / "metrics.jsonl"; }
    fs::path attic() const { return temp_.path() / "attic"; }

    CheckpointOptions options() const { return {.keep = 2, .sync_first = {log()}}; }

    /// The step of the checkpoint that a new process finds, which is unchanged and can be resumed.
    std::int64_t found() const {
        CheckpointStore store(checkpoints(), options());
        const std::optional<StateDict> newest = store.newest();
        if (!newest) return -1;
        const std::int64_t steps = StateReader(*newest).section("data").count("steps");
        expect_same(*newest, of_step(steps));
        return steps;
    }

    /// Every one that a new process leaves there is, but for this.
    void expect_whole(const std::string& damaged) const {
        for (const auto& entry : fs::directory_iterator(checkpoints())) {
            if (entry.path().filename() == damaged) continue;
            EXPECT_NO_THROW(read_checkpoint(entry.path())) << entry.path();
        }
    }

    /// And saves again.
    void expect_goes_on() const {
        const auto run = Training::from(rich(), *CheckpointStore(checkpoints()).newest());
        FaultyFiles files(attic());  // no operation fails; they do not wait for the disk
        CheckpointStore store(checkpoints(), options(), files);
        store.newest();
        store.warnings();
        EXPECT_TRUE(store.save_now(of_step(5)));
        EXPECT_TRUE(store.warnings().empty());
        EXPECT_EQ(found(), 5);
        for (const auto& entry : fs::directory_iterator(checkpoints())) {
            EXPECT_EQ(entry.path().extension(), "") << entry.path();
        }
    }

private:
    TempFolder temp_;
};

/// Operations of a save that nothing strikes.
int operations_of_a_save(bool with_damaged = false) {
    const Disk disk(with_damaged);
    FaultyFiles files(disk.attic());
    CheckpointStore store(disk.checkpoints(), disk.options(), files);
    store.newest();
    const int before = files.operations();
    EXPECT_TRUE(store.save_now(of_step(3)));
    EXPECT_EQ(before, 0);
    return files.operations();
}

TEST(CheckpointFaults, AnErrorAtAnyOperationIsAWarningAndTheRunContinues) {
    const int operations = operations_of_a_save();
    ASSERT_GT(operations, 60);
    for (const Fault fault : {Fault::error, Fault::half_error}) {
        for (const bool in_thread : {false, true}) {
            for (int n = 1; n <= operations && !::testing::Test::HasFailure(); ++n) {
                SCOPED_TRACE(::testing::Message() << "operation " << n << " of " << operations);
                const Disk disk;
                FaultyFiles files(disk.attic(), n, fault);
                CheckpointStore store(disk.checkpoints(), disk.options(), files);
                store.newest();
                if (in_thread) {
                    store.save(of_step(3));
                    EXPECT_TRUE(store.release());
                } else {
                    store.save_now(of_step(3));
                }
                ASSERT_GE(files.operations(), n);
                const std::vector<std::string> warnings = store.warnings();
                ASSERT_EQ(warnings.size(), 1U);
                EXPECT_NE(warnings[0].find("struck by the test"), std::string::npos) << warnings[0];
                const std::int64_t found = disk.found();
                const bool written = warnings[0].find("was not written") == std::string::npos;
                EXPECT_TRUE(found == 3 || (found == 2 && !written)) << found;
                // The same process continues.
                EXPECT_TRUE(store.save_now(of_step(4)));
                EXPECT_TRUE(store.warnings().empty());
                EXPECT_EQ(disk.found(), 4);
                disk.expect_goes_on();
            }
        }
    }
}

void crash_everywhere(Fault fault, Loss loss, bool with_damaged) {
    const int operations = operations_of_a_save(with_damaged);
    int old_ones = 0, new_ones = 0;
    for (int n = 1; n <= operations && !::testing::Test::HasFailure(); ++n) {
        SCOPED_TRACE(::testing::Message() << "operation " << n << " of " << operations << ", fault "
                                          << static_cast<int>(fault) << ", loss " << static_cast<int>(loss));
        const Disk disk(with_damaged);
        FaultyFiles files(disk.attic(), n, fault);
        bool written = false;
        {
            CheckpointStore store(disk.checkpoints(), disk.options(), files);
            store.newest();
            written = store.save_now(of_step(3));
        }
        EXPECT_TRUE(files.crashed());
        files.lose(loss, disk.root());
        const std::int64_t found = disk.found();
        EXPECT_TRUE(found == 2 || found == 3) << found;
        if (written) {
            EXPECT_EQ(found, 3);
        }
        disk.expect_whole(with_damaged && found == 2 ? "step-00000003" : "");
        ++(found == 3 ? new_ones : old_ones);
        disk.expect_goes_on();
    }
    // What can be seen of both, or the test would show little.
    EXPECT_GT(old_ones, 40);
    EXPECT_GT(new_ones, 1);
}

class CheckpointCrash : public ::testing::TestWithParam<std::tuple<Fault, Loss>> {};

TEST_P(CheckpointCrash, AtAnyOperationLeavesAValidCheckpoint) {
    const auto& [fault, loss] = GetParam();
    crash_everywhere(fault, loss, false);
}

TEST_P(CheckpointCrash, WithACorruptedOneOfTheSameName) {
    const auto& [fault, loss] = GetParam();
    crash_everywhere(fault, loss, true);
}

INSTANTIATE_TEST_SUITE_P(Everywhere, CheckpointCrash,
                         ::testing::Combine(::testing::Values(Fault::crash, Fault::half_crash, Fault::crash_after),
                                            ::testing::Values(Loss::none, Loss::contents, Loss::names)));

TEST(CheckpointFaults, OnceItIsSavedALossOfPowerLosesNothing) {
    for (const Loss loss : {Loss::contents, Loss::names}) {
        const Disk disk;
        FaultyFiles files(disk.attic());
        CheckpointStore store(disk.checkpoints(), disk.options(), files);
        store.newest();
        ASSERT_TRUE(store.save_now(of_step(3)));
        files.lose(loss, disk.root());
        EXPECT_EQ(disk.found(), 3);
    }
}

TEST(CheckpointFaults, NotEvenTheFirstOfARunWhoseFoldersAreNew) {
    for (const Loss loss : {Loss::contents, Loss::names}) {
        const TempFolder temp;
        fs::create_directory(temp.path() / "attic");
        fs::create_directory(temp.path() / "disk");
        FaultyFiles files(temp.path() / "attic");
        CheckpointStore store(temp.path() / "disk" / "runs" / "first" / "checkpoints", {}, files);
        ASSERT_TRUE(store.save_now(of_step(1)));
        files.lose(loss, temp.path() / "disk");
        CheckpointStore other(store.folder());
        const auto newest = other.newest();
        ASSERT_TRUE(newest);
        expect_same(*newest, of_step(1));
    }
}

TEST(CheckpointFaults, WhatGoesWrongWhileLeftoversAreRemovedIsNoHarm) {
    const Disk disk;
    fs::copy(disk.checkpoints() / "step-00000001", disk.checkpoints() / "step-00000003.part");
    fs::copy(disk.checkpoints() / "step-00000001", disk.checkpoints() / "step-00000000.old");
    for (const int n : {1, 2}) {
        FaultyFiles files(disk.attic(), n);
        CheckpointStore store(disk.checkpoints(), disk.options(), files);
        EXPECT_EQ(manifest_of(*store.newest()).progress.steps, 2);
    }
    FaultyFiles files(disk.attic(), 1);
    fs::copy(disk.checkpoints() / "step-00000001", disk.checkpoints() / "step-00000003.part");
    CheckpointStore store(disk.checkpoints(), disk.options(), files);
    EXPECT_TRUE(store.save_now(of_step(3)));  // over what could not be removed
    EXPECT_EQ(disk.found(), 3);
}

/// Writes a file of 3 parts by write_whole() with a fault, and says what is then found.
std::string found_after(int n, Fault fault, Loss loss, int* operations = nullptr) {
    const TempFolder temp;
    fs::create_directory(temp.path() / "attic");
    const fs::path file = temp.write("disk/file", "old");
    FaultyFiles files(temp.path() / "attic", n, fault);
    try {
        write_whole(
            file,
            [](OutputFile& out) {
                for (const char* part : {"new ", "content ", "at last"}) out.write(part);
            },
            files);
        EXPECT_TRUE(n == 0 || files.operations() < n);
    } catch (const Crash&) {
    } catch (const Error& error) {
        EXPECT_EQ(error.kind(), ErrorKind::not_written);
        EXPECT_FALSE(fs::exists(temp.path() / "disk" / "file.part")) << n;
    }
    if (operations != nullptr) *operations = files.operations();
    files.lose(loss, temp.path() / "disk");
    return read_file(file);
}

TEST(CheckpointFaults, AnAtomicallyWrittenFileIsAlwaysTheOldOrTheNewOne) {
    int operations = 0;
    EXPECT_EQ(found_after(0, Fault::error, Loss::names, &operations), "new content at last");
    EXPECT_EQ(operations, 9);
    int old_ones = 0, new_ones = 0;
    for (const Fault fault : {Fault::error, Fault::half_error, Fault::crash, Fault::half_crash, Fault::crash_after}) {
        for (const Loss loss : {Loss::none, Loss::contents, Loss::names}) {
            for (int n = 1; n <= operations; ++n) {
                const std::string found = found_after(n, fault, loss);
                EXPECT_TRUE(found == "old" || found == "new content at last") << found;
                ++(found == "old" ? old_ones : new_ones);
            }
        }
    }
    EXPECT_GT(old_ones, 60);
    EXPECT_GT(new_ones, 10);
}

}  // namespace
}  // namespace microbatch
