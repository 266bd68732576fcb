#include "microbatch/state/snapshot.h"

#include <ATen/ATen.h>
#include <sys/resource.h>

#include <csignal>

#include "support/errors.h"
#include "support/gradients.h"
#include "support/one_thread.h"
#include "support/temp_folder.h"

namespace microbatch {
namespace {

using namespace test;

std::vector<at::Tensor> some_tensors() {
    at::manual_seed(1);
    return {at::randn({3, 5}),           at::randn({2, 3, 4, 4}).contiguous(at::MemoryFormat::ChannelsLast),
            at::randn({4, 6}).t(),       at::tensor(7.5F),
            at::empty({0, 3}),           at::arange(5, at::kLong),
            at::randn({9}, at::kDouble), at::randn({8, 8}).slice(1, 0, 8, 2)};
}

void expect_equal(const std::vector<at::Tensor>& found, const std::vector<at::Tensor>& wanted) {
    ASSERT_EQ(found.size(), wanted.size());
    for (std::size_t i = 0; i < found.size(); ++i) {
        EXPECT_EQ(found[i].scalar_type(), wanted[i].scalar_type());
        EXPECT_TRUE(at::equal(found[i], wanted[i])) << i;
        if (wanted[i].is_non_overlapping_and_dense()) {
            EXPECT_EQ(found[i].strides(), wanted[i].strides()) << i;
        }
    }
}

TEST(Snapshot, HoldsWhatTheTensorsWereInMemoryOrInAFile) {
    const TempFolder folder;
    for (const bool in_file : {false, true}) {
        const std::vector<at::Tensor> live = some_tensors();
        const Snapshot snapshot = in_file ? Snapshot(live, folder.path() / "snapshot") : Snapshot(live);
        for (const at::Tensor& tensor : live) at::Tensor(tensor).zero_();
        expect_equal(snapshot.tensors(), some_tensors());
        EXPECT_EQ(snapshot.memory_bytes(), in_file ? 0 : bytes_of(some_tensors()));
    }
}

TEST(Snapshot, IsCopiedIntoWhatThereIs) {
    const TempFolder folder;
    for (const bool in_file : {false, true}) {
        const std::vector<at::Tensor> live = some_tensors();
        const Snapshot snapshot = in_file ? Snapshot(live, folder.path() / "snapshot") : Snapshot(live);
        for (const at::Tensor& tensor : live) at::Tensor(tensor).zero_();
        snapshot.copy_into(live);
        expect_equal(live, some_tensors());
        std::vector<at::Tensor> other = live;
        other.pop_back();
        expect_usage_error({"shapes"}, [&] { snapshot.copy_into(other); });
        other = live;
        other[0] = at::zeros({5, 3});
        expect_usage_error({"shapes"}, [&] { snapshot.copy_into(other); });
        other[0] = at::zeros({3, 5}, at::kDouble);
        expect_usage_error({"shapes"}, [&] { snapshot.copy_into(other); });
        expect_equal(live, some_tensors());
    }
}

TEST(Snapshot, AFileGoesWithItsLastOwner) {
    const TempFolder folder;
    const auto path = folder.path() / "snapshot";
    {
        std::optional<Snapshot> first(std::in_place, some_tensors(), path);
        const Snapshot second = *first;
        first.reset();
        expect_equal(second.tensors(), some_tensors());
    }
    EXPECT_FALSE(std::filesystem::exists(path));
}

TEST(Snapshot, WhatCannotBeWrittenLeavesNothing) {
    const TempFolder folder;
    expect_usage_error({"nowhere"}, [&] { Snapshot(some_tensors(), folder.path() / "nowhere" / "snapshot"); });
    const auto there = folder.write("there", "something of the user's");
    expect_usage_error({"there", "exists"}, [&] { Snapshot(some_tensors(), there); });
    EXPECT_EQ(read_file(there), "something of the user's");
}

TEST(Snapshot, ADiskThatIsFullLeavesNothing) {
    const TempFolder folder;
    ::signal(SIGXFSZ, SIG_IGN);
    rlimit before{};
    ASSERT_EQ(::getrlimit(RLIMIT_FSIZE, &before), 0);
    const rlimit little{1000, before.rlim_max};
    ASSERT_EQ(::setrlimit(RLIMIT_FSIZE, &little), 0);
    expect_usage_error({"snapshot", "too large"},
                       [&] { Snapshot({at::zeros({1 << 16})}, folder.path() / "snapshot"); });
    ASSERT_EQ(::setrlimit(RLIMIT_FSIZE, &before), 0);
    EXPECT_TRUE(std::filesystem::is_empty(folder.path()));
}

TEST(Snapshot, AFileThatIsNotWholeIsBadData) {
    const TempFolder folder;
    const auto path = folder.path() / "snapshot";
    const Snapshot snapshot(some_tensors(), path);
    std::filesystem::resize_file(path, std::filesystem::file_size(path) - 1);
    expect_error(ErrorKind::bad_data, {"snapshot"}, [&] { snapshot.tensors(); });
    std::filesystem::remove(path);
    expect_error(ErrorKind::bad_data, {"snapshot"}, [&] { snapshot.tensors(); });
}

}  // namespace
}  // namespace microbatch
