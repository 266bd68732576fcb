// A copy of tensors, in memory or in a file, to which a run can be rolled back.
#include <ATen/ATen.h>
#include <gtest/gtest.h>
#include <sys/resource.h>

#include <csignal>
#include <optional>

#include "microbatch/core/str_cat.h"
#include "microbatch/io/safetensors.h"
#include "microbatch/state/stateful.h"
#include "support/errors.h"
#include "support/one_thread.h"
#include "support/temp_folder.h"

namespace microbatch {
namespace {

using namespace test;

NamedTensors named(const std::vector<at::Tensor>& tensors) {
    NamedTensors result;
    for (std::size_t i = 0; i < tensors.size(); ++i) result.push_back({str_cat("tensor", i), tensors[i]});
    return result;
}

NamedTensors some_tensors() {
    at::manual_seed(1);
    return named({at::randn({3, 5}), at::randn({2, 3, 4, 4}).contiguous(at::MemoryFormat::ChannelsLast),
                  at::randn({4, 6}).t(), at::full({}, 7.5F), at::empty({0, 3}), at::arange(5, at::kLong),
                  at::randn({9}, at::kDouble), at::randn({8, 8}).slice(1, 0, 8, 2)});
}

StateDict shared(const NamedTensors& tensors) {
    StateDict state;
    StateWriter(state).put(tensors);
    return state;
}

/// In memory, or in a file.
StateDict snapshot_of(const NamedTensors& tensors, const std::optional<std::filesystem::path>& file) {
    StateDict state = shared(tensors);
    if (file) return moved_to_file(state, *file);
    state.own();
    return state;
}

void zero(const NamedTensors& tensors) {
    for (const NamedTensor& one : tensors) at::Tensor(one.tensor).zero_();
}

void expect_equal(const at::Tensor& found, const at::Tensor& wanted, const std::string& name) {
    EXPECT_EQ(found.scalar_type(), wanted.scalar_type()) << name;
    EXPECT_TRUE(at::equal(found, wanted)) << name;
    if (wanted.is_non_overlapping_and_dense()) {
        EXPECT_EQ(found.strides(), wanted.strides()) << name;
    }
}

void expect_equal(const StateDict& found, const NamedTensors& wanted) {
    ASSERT_EQ(found.tensors().size(), wanted.size());
    for (const auto& [name, tensor] : wanted) expect_equal(found.tensors().at(name).get(), tensor, name);
}

void expect_equal(const NamedTensors& found, const NamedTensors& wanted) {
    for (std::size_t i = 0; i < wanted.size(); ++i) expect_equal(found[i].tensor, wanted[i].tensor, wanted[i].name);
}

TEST(Snapshot, HoldsWhatTheTensorsWereInMemoryOrInAFile) {
    const TempFolder folder;
    for (const bool in_file : {false, true}) {
        const NamedTensors live = some_tensors();
        const StateDict snapshot =
            snapshot_of(live, in_file ? std::optional(folder.path() / "snapshot") : std::nullopt);
        zero(live);
        expect_equal(snapshot, some_tensors());
        EXPECT_EQ(snapshot.reads_files(), in_file);
        EXPECT_EQ(snapshot.bytes(), shared(live).bytes());
        for (const auto& [name, tensor] : snapshot.tensors()) {
            EXPECT_EQ(tensor.is_resident(), !in_file);
            EXPECT_EQ(tensor.shape().is_meta(), in_file) << name;  // a file's takes no memory
        }
    }
}

TEST(Snapshot, IsCopiedIntoWhatThereIs) {
    const TempFolder folder;
    for (const bool in_file : {false, true}) {
        const NamedTensors live = some_tensors();
        const StateDict snapshot =
            snapshot_of(live, in_file ? std::optional(folder.path() / "snapshot") : std::nullopt);
        const StateReader reader(snapshot);
        zero(live);
        prepare_tensors(reader, live, "tensor")();
        expect_equal(live, some_tensors());
        const auto refused = [&](const std::vector<std::string>& words, const NamedTensors& other) {
            expect_error(ErrorKind::bad_data, words, [&] { prepare_tensors(reader, other, "tensor"); });
        };
        NamedTensors other = live;
        other.pop_back();
        refused({"tensor7"}, other);
        other = live;
        other[0].tensor = at::zeros({5, 3});
        refused({"tensor0", "[3, 5]", "[5, 3]"}, other);
        other[0].tensor = at::zeros({3, 5}, at::kDouble);
        refused({"tensor0", "Float", "Double"}, other);
        expect_equal(live, some_tensors());
    }
}

TEST(Snapshot, InAFileIsRemovedWithItsLastOwner) {
    const TempFolder folder;
    const auto path = folder.path() / "snapshot";
    {
        std::optional<StateDict> first(moved_to_file(shared(some_tensors()), path));
        const StateDict second = *first;
        first.reset();
        expect_equal(second, some_tensors());
        EXPECT_TRUE(std::filesystem::exists(path));
    }
    EXPECT_FALSE(std::filesystem::exists(path));
}

TEST(Snapshot, ThatCannotBeWrittenLeavesNothing) {
    const TempFolder folder;
    const StateDict state = shared(some_tensors());
    expect_write_error({"nowhere"}, [&] { moved_to_file(state, folder.path() / "nowhere" / "snapshot"); });
    const auto there = folder.write("there", "something of the user's");
    expect_write_error({"there", "exists"}, [&] { moved_to_file(state, there); });
    EXPECT_EQ(read_file(there), "something of the user's");
}

TEST(Snapshot, OnADiskThatIsFullLeavesNothing) {
    const TempFolder folder;
    ::signal(SIGXFSZ, SIG_IGN);
    rlimit before{};
    ASSERT_EQ(::getrlimit(RLIMIT_FSIZE, &before), 0);
    const rlimit little{1000, before.rlim_max};
    ASSERT_EQ(::setrlimit(RLIMIT_FSIZE, &little), 0);
    expect_write_error({"snapshot", "too large"}, [&] {
        moved_to_file(shared({{"large", at::zeros({1 << 16})}}), folder.path() / "snapshot");
    });
    ASSERT_EQ(::setrlimit(RLIMIT_FSIZE, &before), 0);
    EXPECT_TRUE(std::filesystem::is_empty(folder.path()));
}

TEST(Snapshot, InATruncatedFileIsBadData) {
    const TempFolder folder;
    const auto path = folder.path() / "snapshot";
    StateDict snapshot = moved_to_file(shared({{"large", at::ones({1000})}}), path);
    snapshot.require_readable();
    std::filesystem::resize_file(path, std::filesystem::file_size(path) - 1);
    expect_error(ErrorKind::bad_data, {"snapshot"}, [&] { snapshot.require_readable(); });
    expect_error(ErrorKind::bad_data, {"snapshot"}, [&] { snapshot.own(); });
    EXPECT_TRUE(snapshot.reads_files());  // unchanged
    expect_error(ErrorKind::bad_data, {"snapshot"}, [&] { snapshot.tensors().at("large").get(); });
}

TEST(Snapshot, InAFileThatSomebodyRemovedIsStillRead) {
    const TempFolder folder;
    const StateDict snapshot = moved_to_file(shared(some_tensors()), folder.path() / "snapshot");
    std::filesystem::remove(folder.path() / "snapshot");
    expect_equal(snapshot, some_tensors());
}

}  // namespace
}  // namespace microbatch
