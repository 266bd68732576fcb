// Which checkpoints exist, and which one is resumed.
#include "microbatch/io/checkpoint_store.h"

#include <cstdio>

#include "microbatch/core/crc32c.h"
#include "support/rich_run.h"
#include "support/states.h"
#include "support/stores.h"

namespace microbatch {
namespace {

using namespace test;
namespace fs = std::filesystem;

using CheckpointStoreTest = CheckpointFolder;

TEST_F(CheckpointStoreTest, KeepsTheNewestAndGivesBackTheLast) {
    CheckpointStore store(folder(), {.keep = 2});
    EXPECT_FALSE(store.newest());
    EXPECT_FALSE(fs::exists(folder()));  // created with the first one
    for (int i = 0; i < 4; ++i) EXPECT_TRUE(store.save_now(after(3)));
    EXPECT_EQ(names_in(folder()), (Names{"step-00000009", "step-00000012"}));
    EXPECT_TRUE(store.warnings().empty());
    CheckpointStore other(folder());
    const auto newest = other.newest();
    ASSERT_TRUE(newest);
    expect_same(*newest, run_.taken_apart());
    EXPECT_TRUE(other.warnings().empty());
}

TEST_F(CheckpointStoreTest, KeepsTheFirstAtOrAfterEveryMultiple) {
    const auto kept = [this](Interval every, int steps_between) {
        const TempFolder elsewhere;
        Training run({});
        CheckpointStore store(elsewhere.path(), {.keep = 1, .keep_every = every});
        for (int i = 0; i < 8; ++i) {
            for (int j = 0; j < steps_between; ++j) run.step();
            EXPECT_TRUE(store.save_now(state_of(run.trainer())));
        }
        return names_in(elsewhere.path());
    };
    EXPECT_EQ(kept({4, Unit::steps}, 1), (Names{"step-00000004", "step-00000008"}));
    EXPECT_EQ(kept({4, Unit::steps}, 3), (Names{"step-00000006", "step-00000009", "step-00000012", "step-00000018",
                                                "step-00000021", "step-00000024"}));
    EXPECT_EQ(kept({28, Unit::samples}, 1), (Names{"step-00000004", "step-00000008"}));  // 7 samples a step
    EXPECT_EQ(kept({30, Unit::samples}, 1), (Names{"step-00000005", "step-00000008"}));
    EXPECT_EQ(kept({1000, Unit::steps}, 1), (Names{"step-00000008"}));
}

TEST_F(CheckpointStoreTest, AKeptCheckpointStaysKeptInTheNextProcess) {
    const CheckpointOptions options{.keep = 1, .keep_every = Interval{4, Unit::steps}};
    for (int i = 0; i < 9; ++i) {
        CheckpointStore store(folder(), options);
        const auto newest = store.newest();
        if (newest) load(run_.trainer(), StateReader(*newest));
        EXPECT_TRUE(store.save_now(after(1)));
    }
    EXPECT_EQ(names_in(folder()), (Names{"step-00000004", "step-00000008", "step-00000009"}));
}

TEST_F(CheckpointStoreTest, ABatchThatIsLeftHalfWayHasAPlaceBetweenTheSteps) {
    const auto run = rich_run();
    StateDict whole = run->taken_apart();
    whole.erase("batch/");
    CheckpointStore store(folder());
    EXPECT_TRUE(store.save_now(whole));
    EXPECT_TRUE(store.save_now(state_of(run->trainer())));
    EXPECT_EQ(names_in(folder()), (Names{"step-00000010", "step-00000010-3"}));
    run->step();
    CheckpointStore other(folder());
    EXPECT_TRUE(other.newest()->has("batch/"));
    EXPECT_TRUE(other.save_now(state_of(run->trainer())));
    EXPECT_FALSE(CheckpointStore(folder()).newest()->has("batch/"));
}

TEST_F(CheckpointStoreTest, SortsByNumberNotByName) {
    CheckpointStore store(folder(), {.keep = 2});
    const StateDict state = run_.taken_apart();
    for (const std::int64_t steps : {99'999'998, 99'999'999, 100'000'000, 123'456'789}) {
        EXPECT_TRUE(store.save_now(with(state, "data/steps", steps)));
    }
    EXPECT_EQ(names_in(folder()), (Names{"step-100000000", "step-123456789"}));
    EXPECT_EQ(steps_in(*CheckpointStore(folder()).newest()), 123'456'789);
}

TEST_F(CheckpointStoreTest, SkipsACorruptedNewestOneAndNamesIt) {
    CheckpointStore store(folder());
    for (int i = 0; i < 3; ++i) EXPECT_TRUE(store.save_now(after(1)));
    damage("step-00000003");
    fs::remove(folder() / "step-00000002" / "manifest.json");
    CheckpointStore other(folder());
    const auto newest = other.newest();
    ASSERT_TRUE(newest);
    EXPECT_EQ(steps_in(*newest), 1);
    const std::vector<std::string> warnings = other.warnings();
    ASSERT_EQ(warnings.size(), 2U);
    for (const char* name : {"step-00000003/model.safetensors", "step-00000002/manifest.json"}) {
        EXPECT_TRUE(std::any_of(warnings.begin(), warnings.end(), [name](const std::string& warning) {
            return warning.find(name) != std::string::npos;
        })) << name;
    }
    EXPECT_TRUE(other.warnings().empty());  // once
}

TEST_F(CheckpointStoreTest, TheRunOverwritesCorruptedOnes) {
    CheckpointStore store(folder());
    for (int i = 0; i < 3; ++i) EXPECT_TRUE(store.save_now(after(1)));
    damage("step-00000003");
    CheckpointStore other(folder());
    load(run_.trainer(), StateReader(*other.newest()));
    other.warnings();
    EXPECT_TRUE(other.save_now(after(1)));  // replaces the corrupted one
    EXPECT_TRUE(other.warnings().empty());
    EXPECT_EQ(steps_in(*CheckpointStore(folder()).newest()), 3);
    EXPECT_EQ(names_in(folder()).size(), 3U);
}

TEST_F(CheckpointStoreTest, ANewerCorruptedOneDoesNotDeleteAValidOne) {
    CheckpointStore store(folder(), {.keep = 2});
    EXPECT_TRUE(store.save_now(after(2)));
    EXPECT_TRUE(store.save_now(after(2)));
    damage("step-00000004");
    CheckpointStore other(folder(), {.keep = 2});
    load(run_.trainer(), StateReader(*other.newest()));
    EXPECT_TRUE(other.save_now(after(1)));  // step 3, below the corrupted one
    EXPECT_EQ(steps_in(*CheckpointStore(folder()).newest()), 3);
    damage("step-00000003");
    EXPECT_EQ(steps_in(*CheckpointStore(folder()).newest()), 2);
}

TEST_F(CheckpointStoreTest, IfNoneIsValidTheErrorNamesEach) {
    CheckpointStore store(folder());
    for (int i = 0; i < 3; ++i) EXPECT_TRUE(store.save_now(after(1)));
    for (const std::string& name : names_in(folder())) damage(name, "state.json");
    CheckpointStore other(folder());
    expect_error(ErrorKind::bad_data, {folder().string(), "step-00000001", "step-00000002", "step-00000003"},
                 [&] { other.newest(); });
}

TEST_F(CheckpointStoreTest, WhatAProcessThatWasKilledLeftGoes) {
    CheckpointStore store(folder());
    EXPECT_TRUE(store.save_now(after(1)));
    for (const char* name : {"step-00000002.part", "step-00000000.old", "step-00000005-3.part"}) {
        fs::copy(folder() / "step-00000001", folder() / name);
    }
    for (const char* name : {"mine", "before-the-change.old", "step-notes.part"}) fs::create_directory(folder() / name);
    std::ofstream(folder() / "step-notes") << "mine";
    CheckpointStore other(folder());
    EXPECT_EQ(names_in(folder()),
              (Names{"before-the-change.old", "mine", "step-00000001", "step-notes", "step-notes.part"}));
    EXPECT_EQ(steps_in(*other.newest()), 1);
    EXPECT_TRUE(other.warnings().empty());
}

TEST_F(CheckpointStoreTest, TheSameProgressIsNotWrittenTwice) {
    CheckpointStore store(folder());
    EXPECT_TRUE(store.save_now(after(1)));
    const auto written = fs::last_write_time(folder() / "step-00000001");
    const std::string before = read_file(folder() / "step-00000001" / "manifest.json");
    const StateDict noted = with(state_of(run_.trainer()), "notes/other", std::string("text"));
    EXPECT_TRUE(store.save_now(noted));
    store.save(noted);
    EXPECT_FALSE(store.is_busy());
    EXPECT_EQ(read_file(folder() / "step-00000001" / "manifest.json"), before);
    CheckpointStore other(folder());
    other.newest();
    EXPECT_TRUE(other.save_now(noted));  // it was read
    EXPECT_EQ(fs::last_write_time(folder() / "step-00000001"), written);
}

TEST_F(CheckpointStoreTest, WhatIsToBeOnTheDiskFirstAndIsNotThereIsAWarning) {
    const fs::path log = temp_.path() / "metrics.jsonl";
    CheckpointStore store(folder(), {.sync_first = {log}});
    EXPECT_TRUE(store.save_now(after(1)));  // a log is no reason to have no checkpoint
    const std::vector<std::string> warnings = store.warnings();
    ASSERT_EQ(warnings.size(), 1U);
    EXPECT_NE(warnings.front().find(log.string()), std::string::npos);
    EXPECT_EQ(steps_in(*CheckpointStore(folder()).newest()), 1);
    std::ofstream(log) << "{}\n";
    EXPECT_TRUE(store.save_now(after(1)));
    EXPECT_TRUE(store.warnings().empty());
    EXPECT_EQ(store.written(), 2);
}

TEST_F(CheckpointStoreTest, AnUnreadableFolderIsNotTakenForAnEmptyOne) {
    fs::create_directories(folder().parent_path());
    fs::create_directory_symlink(temp_.path() / "gone", folder());
    expect_error(ErrorKind::bad_data, {folder().string()}, [&] { CheckpointStore(folder()).newest(); });
    fs::remove(folder());
    std::ofstream(folder()) << "mine";
    expect_error(ErrorKind::bad_data, {folder().string()}, [&] { CheckpointStore(folder()).newest(); });
    fs::remove(folder());
    EXPECT_FALSE(CheckpointStore(folder()).newest());
}

TEST_F(CheckpointStoreTest, ACorruptedOneDoesNotCountAsKept) {
    CheckpointStore store(folder());
    for (int i = 0; i < 3; ++i) EXPECT_TRUE(store.save_now(after(1)));
    damage("step-00000003", "state.json");
    CheckpointStore reader(folder()), other(folder());
    Training resumed(TrainingOptions{});
    const StateDict newest = *reader.newest();
    load(resumed.trainer(), StateReader(newest));
    other.go_on_from(newest, reader.damaged());
    for (int i = 0; i < 2; ++i) resumed.step();  // 3 is not written again
    EXPECT_TRUE(other.save_now(state_of(resumed.trainer())));
    EXPECT_EQ(names_in(folder()), (Names{"step-00000001", "step-00000002", "step-00000004"}));
    for (int i = 0; i < 3; ++i) {
        resumed.step();
        EXPECT_TRUE(other.save_now(state_of(resumed.trainer())));
    }
    EXPECT_EQ(names_in(folder()), (Names{"step-00000005", "step-00000006", "step-00000007"}));
}

TEST_F(CheckpointStoreTest, OneOfAnotherVersionIsNotSkipped) {
    CheckpointStore store(folder());
    for (int i = 0; i < 2; ++i) EXPECT_TRUE(store.save_now(after(1)));
    const fs::path manifest = folder() / "step-00000002" / "manifest.json";
    std::string text = read_file(manifest);
    char digits[9];
    text.replace(text.find("\"version\": 2"), 12, "\"version\": 9");
    text.erase(text.rfind(",\n  \"crc32c\""));
    std::snprintf(digits, sizeof(digits), "%08x", crc32c(text));
    std::ofstream(manifest) << text << ",\n  \"crc32c\": \"" << digits << "\"\n}\n";
    for (const bool healthy : {false, true}) {
        expect_error(ErrorKind::bad_data, {"step-00000002", "format 9", "reads format 2"},
                     [&] { CheckpointStore(folder()).newest(healthy); });
        EXPECT_THROW(CheckpointStore(folder()).newest(healthy), AnotherVersion);
    }
}

TEST_F(CheckpointStoreTest, ARunOfThePreviousVersionIsRefusedAndUnchanged) {
    fs::create_directories(folder() / "step-00000003");
    for (const char* file : {"manifest.json", "state.json"}) {
        fs::copy(test_file("io/format1") / file, folder() / "step-00000003" / file);
    }
    const auto before = contents_of(folder());
    EXPECT_EQ(before.size(), 2U);
    expect_error(ErrorKind::bad_data, {"step-00000003", "format 1", "reads format 2", "microbatch 0.1"},
                 [&] { CheckpointStore(folder(), {.keep = 1}).newest(); });
    EXPECT_EQ(contents_of(folder()), before);
}

TEST_F(CheckpointStoreTest, TheNewestHealthyOneIsAlwaysKept) {
    const auto save = [&](CheckpointStore& store, bool healthy) {
        EXPECT_TRUE(store.save_now(with(after(1), "data/healthy", StateScalar(healthy))));
        EXPECT_TRUE(store.warnings().empty());
    };
    CheckpointStore store(folder(), {.keep = 2});
    for (const bool healthy : {true, true, false}) save(store, healthy);
    EXPECT_EQ(names_in(folder()), (Names{"step-00000002", "step-00000003"}));
    CheckpointStore other(folder(), {.keep = 2});  // in the next process too
    EXPECT_EQ(steps_in(*other.newest()), 3);
    for (int i = 0; i < 4; ++i) save(other, false);
    EXPECT_EQ(names_in(folder()), (Names{"step-00000002", "step-00000006", "step-00000007"}));
    EXPECT_EQ(steps_in(*CheckpointStore(folder()).newest()), 7);
    EXPECT_EQ(steps_in(*CheckpointStore(folder()).newest(/*healthy=*/true)), 2);
    save(other, true);
    EXPECT_EQ(names_in(folder()), (Names{"step-00000007", "step-00000008"}));
    save(other, false);
    save(other, false);
    save(other, false);
    EXPECT_EQ(names_in(folder()), (Names{"step-00000008", "step-00000010", "step-00000011"}));
}

TEST_F(CheckpointStoreTest, ACorruptedHealthyOneIsSkipped) {
    CheckpointStore store(folder(), {.keep = 5});
    for (const bool healthy : {true, true, false}) {
        EXPECT_TRUE(store.save_now(with(after(1), "data/healthy", StateScalar(healthy))));
    }
    damage("step-00000002");
    CheckpointStore other(folder(), {.keep = 1});
    EXPECT_EQ(steps_in(*other.newest(/*healthy=*/true)), 1);
    const std::vector<std::string> warnings = other.warnings();
    ASSERT_EQ(warnings.size(), 1U);
    EXPECT_NE(warnings[0].find("step-00000002"), std::string::npos) << warnings[0];
    // And does not count instead of a valid one.
    EXPECT_TRUE(other.save_now(with(after(1), "data/healthy", StateScalar(false))));
    EXPECT_EQ(names_in(folder()), (Names{"step-00000001", "step-00000004"}));
}

TEST_F(CheckpointStoreTest, WithoutAHealthyOneThereIsNoNewestHealthyOne) {
    CheckpointStore store(folder());
    EXPECT_FALSE(store.newest(/*healthy=*/true));
    EXPECT_TRUE(store.save_now(with(after(1), "data/healthy", StateScalar(false))));
    EXPECT_FALSE(CheckpointStore(folder()).newest(/*healthy=*/true));
    EXPECT_TRUE(CheckpointStore(folder()).newest());
}

TEST_F(CheckpointStoreTest, ARecoveredRunReplacesTheDivergedOne) {
    CheckpointStore store(folder());
    for (const bool healthy : {true, false, false}) {
        EXPECT_TRUE(store.save_now(with(after(1), "data/healthy", StateScalar(healthy))));
    }
    CheckpointStore other(folder());
    const StateDict cure = *other.newest(/*healthy=*/true);
    EXPECT_EQ(steps_in(cure), 1);
    load(run_.trainer(), StateReader(cure));
    for (int i = 0; i < 3; ++i) EXPECT_TRUE(other.save_now(after(1)));
    EXPECT_TRUE(other.warnings().empty());
    EXPECT_EQ(names_in(folder()), (Names{"step-00000002", "step-00000003", "step-00000004"}));
    EXPECT_TRUE(read_checkpoint_manifest(folder() / "step-00000002").healthy);
    EXPECT_TRUE(read_checkpoint_manifest(folder() / "step-00000003").healthy);
}

TEST_F(CheckpointStoreTest, RefusesInvalidOptions) {
    expect_usage_error({"keep", "0"}, [&] { CheckpointStore(folder(), {.keep = 0}); });
    expect_usage_error({"keep", "-1"}, [&] { CheckpointStore(folder(), {.keep = -1}); });
    expect_usage_error({"keep_every"}, [&] { CheckpointStore(folder(), {.keep_every = Interval{0, Unit::steps}}); });
    expect_usage_error({"memory_bytes"}, [&] { CheckpointStore(folder(), {.memory_bytes = -1}); });
}

}  // namespace
}  // namespace microbatch
