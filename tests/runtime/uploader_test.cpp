#include "microbatch/runtime/uploader.h"

#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include "fake_device/fake_device.h"
#include "support/errors.h"

namespace microbatch {
namespace {

at::Tensor numbers(std::int64_t count, double first = 0.0) {
    return at::arange(first, first + static_cast<double>(count), at::TensorOptions().device(at::kCPU));
}

TEST(Uploads, HaveTheValuesShapesAndStridesOfWhatTheyCopy) {
    Uploader uploader(fake::device());
    const at::Tensor images = at::randn({2, 3, 4, 5}, at::TensorOptions().device(at::kCPU));
    const std::vector<at::Tensor> sent = {numbers(7),
                                          images.contiguous(at::MemoryFormat::ChannelsLast),
                                          images.slice(3, 0, 5, 2),
                                          numbers(3).to(at::kLong),
                                          numbers(2).to(at::kBool),
                                          at::empty({0, 3}, at::kCPU)};
    const std::vector<at::Tensor> got = uploader.upload(sent);
    ASSERT_EQ(got.size(), sent.size());
    for (std::size_t i = 0; i < sent.size(); ++i) {
        EXPECT_EQ(got[i].device(), fake::device());
        EXPECT_EQ(got[i].scalar_type(), sent[i].scalar_type());
        EXPECT_TRUE(at::equal(got[i].cpu(), sent[i])) << i;
    }
    EXPECT_EQ(got[1].strides(), sent[1].strides());
}

TEST(Uploads, OfWhatIsNotOnTheHostAreLeftAsTheyAre) {
    Uploader uploader(fake::device());
    const at::Tensor there = numbers(3).to(fake::device());
    const std::vector<at::Tensor> got = uploader.upload({there, at::Tensor(), numbers(2)});
    EXPECT_TRUE(got[0].is_same(there));
    EXPECT_FALSE(got[1].defined());
    EXPECT_TRUE(at::equal(got[2].cpu(), numbers(2)));
    const at::Tensor on_host = numbers(2);
    EXPECT_TRUE(Uploader(at::kCPU).upload({on_host})[0].is_same(on_host));
}

TEST(Uploads, ReadTheSourceAtOnce) {
    Uploader uploader(fake::device());
    at::Tensor source = numbers(4);
    const at::Tensor there = uploader.upload({source})[0];
    source.fill_(9);
    EXPECT_TRUE(at::equal(there.cpu(), numbers(4)));
}

TEST(Uploads, WaitForNothing) {
    Uploader uploader(fake::device());
    fake::reset_counts();
    at::Tensor sum = at::zeros({}, fake::device());
    for (int i = 0; i < 5; ++i) sum += uploader.upload({numbers(4), numbers(6)})[1].sum();
    EXPECT_EQ(fake::counts().host_reads(), 0);
    EXPECT_EQ(fake::counts().blocking_uploads, 0);
    EXPECT_EQ(fake::counts().uploads, 5);
    EXPECT_EQ(sum.item<double>(), 75.0);
}

TEST(Uploads, TakeTheMemoryOfTwoAndNoMoreHoweverManyThereAre) {
    Uploader uploader(fake::device());
    for (int i = 0; i < 3; ++i) uploader.upload({numbers(1000)});
    const std::int64_t before = fake::allocations();
    for (int i = 0; i < 20; ++i)
        EXPECT_EQ(uploader.upload({numbers(1000, i)})[0].sum().item<double>(), 499500.0 + 1000.0 * i);
    EXPECT_LE(fake::allocations() - before, 20 * 2);  // sums and views, never another piece of 4,000 bytes
}

TEST(Uploads, ThatAreStillHeldAreNotOverwritten) {
    Uploader uploader(fake::device());
    std::vector<at::Tensor> held;
    for (int i = 0; i < 6; ++i) held.push_back(uploader.upload({numbers(5, 10.0 * i)})[0]);
    for (int i = 0; i < 6; ++i) EXPECT_TRUE(at::equal(held[static_cast<std::size_t>(i)].cpu(), numbers(5, 10.0 * i)));
}

TEST(Uploads, GrowWithTheBatch) {
    Uploader uploader(fake::device());
    for (const std::int64_t count : {3, 3000, 5, 70000, 1}) {
        EXPECT_TRUE(at::equal(uploader.upload({numbers(count), numbers(2)})[0].cpu(), numbers(count)));
    }
}

TEST(Uploads, ThatDoNotFitLoseNothing) {
    Uploader uploader(fake::device());
    const at::Tensor source = numbers(1000);
    for (int n = 1; n < 4; ++n) {
        fake::fail_allocation(n);
        try {
            uploader.upload({source});
        } catch (const c10::OutOfMemoryError&) {
        }
        fake::fail_allocation(0);
        EXPECT_TRUE(at::equal(uploader.upload({source})[0].cpu(), source));
    }
}

TEST(Uploads, OfALeafAreNoPartOfItsGraph) {
    Uploader uploader(fake::device());
    const at::Tensor leaf = numbers(3).requires_grad_();
    EXPECT_FALSE(uploader.upload({leaf})[0].requires_grad());
}

}  // namespace
}  // namespace microbatch
