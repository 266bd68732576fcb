// What is written down of a run is all that it goes on from.
#include "microbatch/io/checkpoint.h"

#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include <nlohmann/json.hpp>

#include "support/errors.h"
#include "support/rich_run.h"
#include "support/states.h"
#include "support/temp_folder.h"

namespace microbatch {
namespace {

using namespace test;

std::filesystem::path write(const TempFolder& folder, const TrainerState& state, const std::string& notes = "{}") {
    static int number = 0;
    const std::filesystem::path path = folder.path() / std::to_string(number++);
    std::filesystem::create_directory(path);
    write_checkpoint(system_files(), path, {state, notes});
    return path;
}

TEST(Checkpoint, GivesBackEveryFieldAndEveryBit) {
    const TempFolder folder;
    for (const char* optimizer : {"adamw", "sgd", "torch adamw"}) {
        const TrainerState state = rich_run(rich(optimizer))->taken_apart();
        expect_same(read_checkpoint(write(folder, state)).trainer, state);
    }
}

TEST(Checkpoint, GivesBackARunThatHasNotBegunYet) {
    const TempFolder folder;
    for (const TrainingOptions& how : {TrainingOptions{}, TrainingOptions{.optimizer = "torch sgd"}, rich()}) {
        const TrainerState state = Training(how).taken_apart();
        expect_same(read_checkpoint(write(folder, state)).trainer, state);
    }
}

TEST(Checkpoint, NumbersThatAreNotFiniteAndTheLargestComeBack) {
    const TempFolder folder;
    constexpr std::int64_t largest = std::numeric_limits<std::int64_t>::max();
    TrainerState state = rich_run()->taken_apart();
    state.sampler = {.seed = std::numeric_limits<std::uint64_t>::max(), .epoch = largest, .position = largest};
    state.progress = {largest, largest, largest};
    state.noise.sum.variance = 5e-324;
    state.noise.sum.squared_gradient = -0.0;
    state.open->so_far.loss_sum = std::numeric_limits<double>::quiet_NaN();
    state.open->so_far.parts = {.count = largest, .weight = 1e308, .squares = -std::numeric_limits<double>::infinity()};
    state.limits = {{{{largest, 0}, {}}, {.micro_batch = largest, .recompute = true}}};
    expect_same(read_checkpoint(write(folder, state)).trainer, state);
}

TEST(Checkpoint, WhatCouldNotBeReadAgainIsNotWritten) {
    const TempFolder folder;
    const TrainerState state = rich_run()->taken_apart();
    std::string deep = "1";
    for (int i = 0; i < 16; ++i) deep = "{\"a\":" + deep + "}";
    expect_usage_error({"state.json"}, [&] { write_checkpoint(system_files(), folder.path(), {state, deep}); });
    std::string many = "{\"a\":[1";
    for (int i = 0; i < 399'990; ++i) many += ",1";
    expect_usage_error({"state.json"}, [&] { write_checkpoint(system_files(), folder.path(), {state, many + "]}"}); });
    EXPECT_TRUE(std::filesystem::is_empty(folder.path()));
}

TEST(Checkpoint, TensorsWithoutElementsKeepTheirOrder) {
    const TempFolder folder;
    TrainerState state = rich_run()->taken_apart();
    state.parameters.push_back(stored("z", at::empty({0})));
    state.buffers.insert(state.buffers.begin(), stored("a", at::empty({0, 3})));
    state.buffers.push_back(stored("b", at::empty({2, 0})));
    expect_same(read_checkpoint(write(folder, state)).trainer, state);
}

TEST(Checkpoint, ARunGoesOnFromItWithTheSameBits) {
    const TempFolder folder;
    for (const char* model : {"gpt", "resnet", "norm"}) {
        SCOPED_TRACE(model);
        TrainingOptions how = rich();
        how.model = model;
        Training run(how);
        for (int i = 0; i < 9; ++i) run.step();
        const std::filesystem::path path = write(folder, run.trainer().state());
        std::vector<Seen> wanted;
        for (int i = 0; i < 5; ++i) wanted.push_back(see_step(run));
        const auto resumed = Training::from(how, read_checkpoint(path).trainer);
        for (const Seen& step : wanted) expect_same(see_step(*resumed), step);
    }
}

TEST(Checkpoint, ABatchThatWasLeftOpenIsGoneOnWith) {
    const TempFolder folder;
    const auto run = rich_run();
    const std::filesystem::path path = write(folder, run->trainer().state());
    EXPECT_EQ(read_checkpoint_manifest(path).open_samples, 3);
    const Seen wanted = see_step(*run);
    const auto resumed = Training::from(rich(), read_checkpoint(path).trainer);
    EXPECT_TRUE(resumed->accumulator().is_paused());
    expect_same(see_step(*resumed), wanted);
}

TEST(Checkpoint, SnapshotsInFilesAreInIt) {
    const TempFolder folder;
    TrainingOptions how = rich();
    how.trainer.recovery->memory_bytes = 0;
    how.snapshots = folder.path() / "snapshots";
    std::filesystem::path path;
    TrainerState in_memory;
    {
        const auto run = rich_run(how);
        ASSERT_TRUE(run->trainer().state().recovery->in_files);
        path = write(folder, run->trainer().state());
        in_memory = rich_run()->taken_apart();
    }
    const auto resumed = Training::from(how, read_checkpoint(path).trainer);
    const TrainerState state = resumed->trainer().state();
    ASSERT_EQ(state.recovery->points.size(), 2U);
    for (std::size_t i = 0; i < 2; ++i) {
        expect_same(state.recovery->points[i].tensors, in_memory.recovery->points[i].tensors);
    }
}

TEST(Checkpoint, MayBeRemovedOnceItIsRead) {
    const TempFolder folder;
    const TrainerState state = rich_run()->taken_apart();
    const std::filesystem::path path = write(folder, state);
    const Checkpoint read = read_checkpoint(path);
    std::filesystem::remove_all(path);
    expect_same(read.trainer, state);
}

TEST(Checkpoint, NotesComeBackAsTheyAre) {
    const TempFolder folder;
    const TrainerState state = Training({}).taken_apart();
    const std::string notes = R"({"b":[1,2.5,null,true],"a":{"é":"line\nend"},"large":18446744073709551615})";
    const Checkpoint read = read_checkpoint(write(folder, state, notes));
    EXPECT_EQ(nlohmann::json::parse(read.notes), nlohmann::json::parse(notes));
    for (const char* wrong : {"", "no json", "[1]", "5", "null", "{", "{\"a\":1} x"}) {
        expect_usage_error({"notes"}, [&] { write(folder, state, wrong); });
    }
}

TEST(Checkpoint, TheManifestTellsWhatItIsOf) {
    const TempFolder folder;
    Training run({});
    for (int i = 0; i < 3; ++i) run.step();
    const std::filesystem::path path = write(folder, run.trainer().state());
    const CheckpointManifest manifest = read_checkpoint_manifest(path);
    EXPECT_EQ(manifest.progress, (Progress{3, 21, 21}));
    EXPECT_EQ(manifest.open_samples, 0);
    EXPECT_FALSE(manifest.kept);
    std::vector<std::string> names;
    for (const CheckpointFile& file : manifest.files) {
        names.push_back(file.name);
        EXPECT_EQ(file.bytes, std::filesystem::file_size(path / file.name));
    }
    EXPECT_EQ(names, (std::vector<std::string>{"generators.safetensors", "optimizer.safetensors", "state.json",
                                               "weights.safetensors"}));
    EXPECT_EQ(parse_checkpoint_manifest(to_text(manifest), "m"), manifest);
}

TEST(Checkpoint, WhatCannotBeWrittenIsAnError) {
    const TempFolder folder;
    const TrainerState state = Training({}).taken_apart();
    expect_usage_error({"nowhere"}, [&] { write_checkpoint(system_files(), folder.path() / "nowhere", {state}); });
    const std::filesystem::path path = write(folder, state);
    expect_usage_error({"weights.safetensors"}, [&] { write_checkpoint(system_files(), path, {state}); });
    expect_same(read_checkpoint(path).trainer, state);
}

TEST(Checkpoint, IsRestoredInTheMemoryOfTheStateAndOneTensor) {
    install_budget_allocator();
    const TempFolder folder;
    constexpr std::int64_t wide = 512;  // a tensor of a MiB, beside which all else is little
    const auto make = [] { return mlp_job({.inputs = wide, .layers = 4, .width = wide, .classes = 2}); };
    const auto options = TrainerOptions{.batch = 2, .length = {1000, Unit::steps}};
    std::filesystem::path path;
    {
        Job job = make();
        const TensorDataset dataset(job.make_batch(4));
        Trainer trainer(*job.accumulator, dataset, job.loss, options);
        trainer.step();
        path = write(folder, trainer.state());
    }
    Job job = make();
    const TensorDataset dataset(job.make_batch(4));
    Trainer trainer(*job.accumulator, dataset, job.loss, options);
    const Checkpoint checkpoint = read_checkpoint(path);
    const std::int64_t before = memory_use().live_bytes;
    reset_peak_memory();
    trainer.restore(checkpoint.trainer);
    const std::int64_t state = bytes_of(checkpoint.trainer.optimizer), tensor = wide * wide * 4;
    EXPECT_NEAR(static_cast<double>(memory_use().live_bytes - before), static_cast<double>(state), 20'000);
    EXPECT_LE(memory_use().peak_bytes - before, state + tensor + 20'000);
}

}  // namespace
}  // namespace microbatch
