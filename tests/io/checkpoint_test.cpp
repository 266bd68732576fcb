// A checkpoint has everything that a run needs to resume.
#include "microbatch/io/checkpoint.h"

#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include <set>

#include "support/device_memory.h"
#include "support/errors.h"
#include "support/rich_run.h"
#include "support/states.h"
#include "support/temp_folder.h"

namespace microbatch {
namespace {

using namespace test;

using Counts = std::vector<std::int64_t>;
using Numbers = std::vector<double>;

constexpr std::int64_t largest = std::numeric_limits<std::int64_t>::max();

std::filesystem::path write(const TempFolder& folder, const StateDict& state) {
    static int number = 0;
    const std::filesystem::path path = folder.path() / std::to_string(number++);
    std::filesystem::create_directory(path);
    write_checkpoint(system_files(), path, state);
    return path;
}

TEST(Checkpoint, GivesBackEveryNameAndEveryBit) {
    const TempFolder folder;
    for (const char* optimizer : {"adamw", "sgd", "torch adamw"}) {
        expect_same(read_checkpoint(write(folder, rich_state(optimizer))), rich_state(optimizer));
    }
}

TEST(Checkpoint, RestoresARunThatHasNotStartedYet) {
    const TempFolder folder;
    for (const TrainingOptions& how : {TrainingOptions{}, TrainingOptions{.optimizer = "torch sgd"}, rich()}) {
        const StateDict state = Training(how).taken_apart();
        expect_same(read_checkpoint(write(folder, state)), state);
    }
}

/// Every kind of scalar, at its ends.
StateDict with_every_scalar(const StateDict& state) {
    StateDict all = with(state, "data/seed", std::numeric_limits<std::uint64_t>::max());
    auto put = [&all, i = 0](const StateScalar& value) mutable { all.put("notes/" + std::to_string(i++), value); };
    for (const bool flag : {true, false}) put(flag);
    for (const std::int64_t count : {largest, -largest - 1, std::int64_t{0}}) put(count);
    for (const std::uint64_t seed : {std::uint64_t{1} << 63U, std::uint64_t{7}}) put(seed);
    for (const double number : {5e-324, -0.0, 1e308, 3.0, std::numeric_limits<double>::quiet_NaN(),
                                std::numeric_limits<double>::infinity(), -std::numeric_limits<double>::infinity()}) {
        put(number);
    }
    for (const char* word : {"", "line\nend", "é \"quoted\" \\", "nan"}) put(std::string(word));
    put(Counts{});
    put(Counts{largest, -1, 0});
    put(Numbers{});
    put(Numbers{1.0, 2.0});
    put(Numbers{std::numeric_limits<double>::quiet_NaN(), 0.1});
    return all;
}

TEST(Checkpoint, NumbersThatAreNotFiniteAndTheLargestComeBack) {
    const TempFolder folder;
    const StateDict state = with_every_scalar(rich_state());
    const StateDict read = read_checkpoint(write(folder, state));
    expect_same(read, state);
    // And are read as what they were put in as.
    const StateReader notes = StateReader(read).section("notes");
    EXPECT_TRUE(notes.flag("0"));
    EXPECT_EQ(notes.count("2"), largest);
    EXPECT_EQ(notes.seed("5"), std::uint64_t{1} << 63U);
    EXPECT_EQ(notes.seed("6"), 7U);
    EXPECT_EQ(notes.number("7"), 5e-324);
    EXPECT_TRUE(std::signbit(notes.number("8")));
    EXPECT_TRUE(std::isnan(notes.number("11")));
    EXPECT_EQ(notes.number("13"), -std::numeric_limits<double>::infinity());
    EXPECT_EQ(notes.word("15"), "line\nend");
    EXPECT_EQ(notes.word("17"), "nan");
    EXPECT_EQ(notes.counts("18"), Counts{});
    EXPECT_EQ(notes.numbers("20"), Numbers{});
    EXPECT_EQ(notes.numbers("21"), (Numbers{1.0, 2.0}));
    EXPECT_TRUE(std::isnan(notes.numbers("22").front()));
}

TEST(Checkpoint, AllOtherValuesOfAStateAreRestored) {
    const TempFolder folder;
    StateDict state = with_every_scalar(Training({}).taken_apart());
    state.put("ema/0.weight", StoredTensor(at::randn({3, 2})));
    state.put("ema/nested/name", StoredTensor(at::arange(4)));
    const std::filesystem::path path = write(folder, state);
    EXPECT_TRUE(std::filesystem::exists(path / "ema.safetensors"));
    expect_same(read_checkpoint(path), state);
}

TEST(Checkpoint, WhatCouldNotBeReadAgainIsNotWritten) {
    const TempFolder folder;
    const StateDict& good = rich_state();
    const auto refused = [&](const std::vector<std::string>& parts, const StateDict& state, bool at_once = true) {
        const std::filesystem::path path = folder.path() / "refused";
        std::filesystem::create_directory(path);
        expect_usage_error(parts, [&] { write_checkpoint(system_files(), path, state); });
        EXPECT_FALSE(std::filesystem::exists(path / "manifest.json"));
        EXPECT_TRUE(std::filesystem::is_empty(path) || !at_once);
        std::filesystem::remove_all(path);
    };
    refused({"scalars"}, with(good, "notes/many", Counts(400'000)));
    refused({"scalars"}, with(good, "notes/long", std::string(17'000'000, 'x')));
    for (const char* name : {"bare", "", "/name", "Model/name", "a b/name", ".hidden/name", "é/name"}) {
        refused({"SECTION/NAME", name}, with(good, name, at::ones({2})));
    }
    refused({"SECTION/NAME"}, with(good, std::string(100, 'a') + "/name", at::ones({2})));
    refused({"__metadata__"}, with(good, "model/__metadata__", at::ones({2})), false);
    refused({"__metadata__"}, with(good, "model/__metadata__", at::ones({0})), false);
    refused({"UTF-8"}, with(good, "model/caf\xe9", at::ones({2})), false);
    refused({"complex", "cannot store"}, with(good, "model/complex", at::ones({2}, at::kComplexFloat)), false);
}

TEST(Checkpoint, TensorsWithoutElementsComeBack) {
    const TempFolder folder;
    StateDict state = with(rich_state(), "model/z", at::empty({0}));
    state.put("model/a", StoredTensor(at::empty({0, 3})));
    state.put("recovery/0/model/b", StoredTensor(at::empty({2, 0})));
    expect_same(read_checkpoint(write(folder, state)), state);
}

TEST(Checkpoint, ARunResumesFromItWithTheSameBits) {
    const TempFolder folder;
    for (const char* model : {"gpt", "resnet", "norm"}) {
        SCOPED_TRACE(model);
        TrainingOptions how = rich();
        how.model = model;
        Training run(how);
        for (int i = 0; i < 9; ++i) run.step();
        const std::filesystem::path path = write(folder, state_of(run.trainer()));
        std::vector<Seen> wanted;
        for (int i = 0; i < 5; ++i) wanted.push_back(see_step(run));
        const auto resumed = Training::from(how, read_checkpoint(path));
        for (const Seen& step : wanted) expect_same(see_step(*resumed), step);
    }
}

TEST(Checkpoint, ABatchThatWasLeftHalfWayIsResumed) {
    const TempFolder folder;
    const auto run = rich_run();
    const std::filesystem::path path = write(folder, state_of(run->trainer()));
    EXPECT_EQ(read_checkpoint_manifest(path).open_samples, 3);
    const Seen wanted = see_step(*run);
    const auto resumed = Training::from(rich(), read_checkpoint(path));
    EXPECT_TRUE(resumed->trainer().is_paused());
    expect_same(see_step(*resumed), wanted);
}

TEST(Checkpoint, SnapshotsInFilesAreInIt) {
    const TempFolder folder;
    TrainingOptions how = rich();
    how.trainer.recovery->memory_bytes = 0;
    how.snapshots = folder.path() / "snapshots";
    std::filesystem::path path;
    {
        const auto run = rich_run(how);
        const StateDict state = state_of(run->trainer());
        ASSERT_TRUE(state.reads_files("recovery/"));
        ASSERT_TRUE(StateReader(state).section("recovery").flag("in_files"));
        path = write(folder, state);
    }
    const auto resumed = Training::from(how, read_checkpoint(path));
    const StateDict state = state_of(resumed->trainer());
    EXPECT_EQ(StateReader(state).section("recovery").count("points"), 2);
    EXPECT_TRUE(state.reads_files("recovery/"));
    const auto comparable = [](const StateDict& one) {
        return without(without(one, "recovery/in_files"), "batch/seconds");
    };
    expect_same(comparable(state), comparable(rich_state()));
}

TEST(Checkpoint, MayBeRemovedOnceItIsRead) {
    const TempFolder folder;
    const std::filesystem::path path = write(folder, rich_state());
    const StateDict read = read_checkpoint(path);
    std::filesystem::remove_all(path);
    expect_same(read, rich_state());
}

TEST(Checkpoint, TheManifestHasTheProgress) {
    const TempFolder folder;
    Training run({});
    for (int i = 0; i < 3; ++i) run.step();
    const std::filesystem::path path = write(folder, state_of(run.trainer()));
    const CheckpointManifest manifest = read_checkpoint_manifest(path);
    EXPECT_EQ(manifest.progress, (Progress{3, 21, 21}));
    EXPECT_EQ(manifest.open_samples, 0);
    EXPECT_TRUE(manifest.healthy);
    EXPECT_FALSE(manifest.kept);
    std::vector<std::string> names;
    for (const CheckpointFile& file : manifest.files) {
        names.push_back(file.name);
        EXPECT_EQ(file.bytes, std::filesystem::file_size(path / file.name));
    }
    EXPECT_EQ(names, (std::vector<std::string>{"model.safetensors", "optimizer.safetensors", "rng.safetensors",
                                               "state.json"}));
    EXPECT_EQ(parse_checkpoint_manifest(to_text(manifest), "m"), manifest);
    const StateDict sick = with(state_of(run.trainer()), "data/healthy", StateScalar(false));
    EXPECT_FALSE(read_checkpoint_manifest(write(folder, sick)).healthy);
}

TEST(Checkpoint, ARunIsHealthyUnlessItRefusesStepsOrRecovers) {
    Training run(rich());  // refuses steps 6 and 7, is rolled back, and would take a snapshot two steps later
    std::vector<bool> healthy;
    for (int i = 0; i < 13; ++i) {
        healthy.push_back(manifest_of(state_of(run.trainer())).healthy);
        run.step();
    }
    EXPECT_EQ(healthy,
              (std::vector<bool>{true, true, true, true, true, true, true, false, false, false, true, true, true}));
}

TEST(Checkpoint, WhatCannotBeWrittenIsAnError) {
    const TempFolder folder;
    const StateDict state = Training({}).taken_apart();
    expect_write_error({"nowhere"}, [&] { write_checkpoint(system_files(), folder.path() / "nowhere", state); });
    const std::filesystem::path path = write(folder, state);
    expect_write_error({"model.safetensors"}, [&] { write_checkpoint(system_files(), path, state); });
    expect_same(read_checkpoint(path), state);
}

TEST(Checkpoint, OneOfTheVersionBeforeIsRefusedWithASentence) {
    // As microbatch 0.1 wrote it, without its tensors.
    const std::filesystem::path format1 = test_file("io/format1");
    for (const auto& read : {std::function<void()>([&] { read_checkpoint(format1); }),
                             std::function<void()>([&] { read_checkpoint_manifest(format1); })}) {
        EXPECT_THROW(read(), AnotherVersion);
        expect_error(ErrorKind::bad_data, {"manifest.json", "format 1", "reads format 2", "microbatch 0.1"}, read);
    }
}

TEST(Checkpoint, IsLoadedInTheMemoryOfTheStateAndOneTensor) {
    install_budget_allocator();
    const TempFolder folder;
    constexpr std::int64_t wide = 512;  // a tensor of 1 MiB, much larger than the rest
    const auto make = [] { return mlp_job({.inputs = wide, .layers = 4, .width = wide, .classes = 2}); };
    const auto options = TrainerOptions{.batch = 2, .length = {1000, Unit::steps}};
    std::filesystem::path path;
    {
        Job job = make();
        const TensorDataset dataset(job.make_batch(4));
        Trainer trainer(*job.accumulator, dataset, job.loss, options);
        trainer.step();
        path = write(folder, state_of(trainer));
    }
    Job job = make();
    const TensorDataset dataset(job.make_batch(4));
    Trainer trainer(*job.accumulator, dataset, job.loss, options);
    const StateDict checkpoint = read_checkpoint(path);
    const std::int64_t before = test::memory_use().live_bytes;
    test::reset_peak_memory();
    load(trainer, StateReader(checkpoint));
    const std::int64_t state = checkpoint.bytes("optimizer/"), tensor = wide * wide * 4;
    EXPECT_NEAR(static_cast<double>(test::memory_use().live_bytes - before), static_cast<double>(state), 20'000);
    EXPECT_LE(test::memory_use().peak_bytes - before, state + tensor + 20'000);
}

}  // namespace
}  // namespace microbatch
