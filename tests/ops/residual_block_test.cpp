// The residual block in one operation against the same block by torch's operators in double.
#include "microbatch/ops/residual_block.h"

#include <ATen/Parallel.h>
#include <gtest/gtest.h>
#include <torch/csrc/autograd/autograd.h>
#include <torch/csrc/autograd/function.h>

#include <atomic>
#include <cmath>
#include <string>
#include <vector>

#include "microbatch/memory/budget_allocator.h"
#include "microbatch/runtime/parallel.h"
#include "support/gradients.h"
#include "support/one_thread.h"

namespace {

using namespace microbatch;
using test::relative_difference;
using test::same_bits;

constexpr auto channels_last = at::MemoryFormat::ChannelsLast;

struct Shape {
    std::int64_t samples, inputs, outputs, size, stride, kernel = 3;

    bool projects() const { return inputs != outputs || stride != 1; }
    std::string name() const {
        return std::to_string(samples) + " images of " + std::to_string(size) + ", " + std::to_string(inputs) + " to " +
               std::to_string(outputs) + ", stride " + std::to_string(stride);
    }
};

const std::vector<Shape> shapes = {{1, 8, 8, 5, 1},    {2, 16, 16, 9, 1}, {3, 8, 16, 9, 2},  {5, 16, 32, 8, 2},
                                   {7, 8, 8, 6, 2, 1}, {2, 4, 12, 7, 1},  {16, 32, 32, 7, 1}};

struct Block {
    ResidualOptions options;
    std::vector<at::Tensor> weights;
    at::Tensor x;

    explicit Block(const Shape& shape) : options{.stride = shape.stride, .groups = 4} {
        const auto add = [this](std::int64_t in, std::int64_t out, std::int64_t kernel) {
            const double deviation = std::sqrt(2.0 / static_cast<double>(in * kernel * kernel));
            weights.push_back((at::randn({out, in, kernel, kernel}) * deviation).requires_grad_());
            weights.push_back((at::randn({out}) * 0.3 + 1).requires_grad_());
            weights.push_back((at::randn({out}) * 0.3).requires_grad_());
        };
        add(shape.inputs, shape.outputs, shape.kernel);
        add(shape.outputs, shape.outputs, shape.kernel);
        if (shape.projects()) add(shape.inputs, shape.outputs, 1);
        x = at::randn({shape.samples, shape.inputs, shape.size, shape.size}).contiguous(channels_last).requires_grad_();
    }

    Block to(at::ScalarType type) const {
        Block result = *this;
        for (at::Tensor& one : result.weights) one = one.detach().to(type).requires_grad_();
        result.x = x.detach().to(type).requires_grad_();
        return result;
    }

    ResidualWeights named() const {
        const auto& w = weights;
        ResidualWeights result{w[0], w[1], w[2], w[3], w[4], w[5]};
        if (w.size() > 6) {
            result.projection = w[6];
            result.projection_scale = w[7];
            result.projection_shift = w[8];
        }
        return result;
    }
    at::Tensor operator()() const { return residual_block(x, named(), options); }
    at::Tensor by_operators() const { return residual_block_by_operators(x, named(), options); }
    std::vector<at::Tensor> all() const {
        std::vector<at::Tensor> result = weights;
        result.push_back(x);
        return result;
    }
};

at::Tensor scalar_of(const at::Tensor& out) {
    return (out * at::arange(out.numel(), out.options()).view(out.sizes()).sin()).sum();
}

bool is_fast(const at::Tensor& out) {
    return out.grad_fn()->name().find("FusedResidual") != std::string::npos;
}

// Two convolutions and norms after one another in fp32, about 1e-7 each times what the inverse deviations of groups
// of some dozen numbers multiply. Where a sum before a ReLU is within that of 0 the slope may be the other one: drawn
// here are none.
constexpr double tolerance = 1e-5;

TEST(ResidualBlock, HasTheValueAndEveryGradientOfTorchsOperatorsInDouble) {
    for (const int threads : {1, 2, 3}) {
        at::set_num_threads(threads);
        at::manual_seed(1);
        for (const Shape& shape : shapes) {
            SCOPED_TRACE(shape.name() + ", threads " + std::to_string(threads));
            const Block block(shape), exact = block.to(at::kDouble);
            const at::Tensor out = block(), expected = exact.by_operators();
            ASSERT_TRUE(is_fast(out));
            ASSERT_EQ(out.sizes(), expected.sizes());
            EXPECT_LE(relative_difference(out, expected), tolerance);
            scalar_of(out).backward();
            scalar_of(expected).backward();
            for (std::size_t i = 0; i < block.all().size(); ++i) {
                EXPECT_LE(relative_difference(block.all()[i].grad(), exact.all()[i].grad()), tolerance) << i;
            }
        }
    }
    at::set_num_threads(1);
}

TEST(ResidualBlock, HasTheSameBitsEveryTime) {
    at::set_num_threads(2);
    at::manual_seed(2);
    const Block block({9, 16, 32, 12, 2});
    const auto run = [&] {
        const at::Tensor out = block();
        auto results = torch::autograd::grad({scalar_of(out)}, block.all());
        results.push_back(out.detach());
        return results;
    };
    const auto first = run();
    for (int round = 0; round < 5; ++round) {
        const auto again = run();
        for (std::size_t i = 0; i < first.size(); ++i) EXPECT_TRUE(same_bits(again[i], first[i])) << i;
    }
    at::set_num_threads(1);
}

TEST(ResidualBlock, LeavesTorchsThreadsUnchanged) {
    at::set_num_threads(2);
    const Block block({4, 8, 8, 6, 1});
    scalar_of(block()).backward();
    EXPECT_EQ(at::get_num_threads(), 2);
    std::atomic<int> calls = 0;
    in_parallel(2, 1, [&](std::int64_t, std::int64_t) { ++calls; });
    EXPECT_EQ(calls, 2);
    at::set_num_threads(1);
}

TEST(ResidualBlock, RunsInAThreadOfSomebodyElse) {
    at::manual_seed(3);
    const Block block({3, 8, 16, 6, 2});
    const at::NoGradGuard no_grad;
    const at::Tensor expected = block();
    at::set_num_threads(4);
    in_parallel(4, 1, [&](std::int64_t, std::int64_t) {
        const at::NoGradGuard none;
        EXPECT_LE(relative_difference(block(), expected), 1e-6);  // other parts, other kernels of oneDNN
    });
    at::set_num_threads(1);
}

TEST(ResidualBlock, HasThePeakThatItExpectsHoweverThreadsMeet) {
    install_budget_allocator();
    at::set_num_threads(2);
    for (const Shape& shape : {Shape{8, 16, 16, 28, 1}, Shape{8, 16, 32, 28, 2}, Shape{8, 64, 64, 7, 1}}) {
        SCOPED_TRACE(shape.name());
        const Block block(shape);
        std::vector<std::int64_t> peaks;
        for (int round = 0; round < 20; ++round) {
            for (const at::Tensor& one : block.all()) one.mutable_grad() = at::Tensor();
            reset_peak_memory();
            const std::int64_t before = memory_use().live_bytes;
            block().sum().backward();
            peaks.push_back(memory_use().peak_bytes - before);
        }
        for (const std::int64_t peak : peaks) EXPECT_EQ(peak, peaks[0]);
    }
    at::set_num_threads(1);
}

TEST(ResidualBlock, KeepsTheConvolutionsAndTheResultForBackward) {
    install_budget_allocator();
    for (const auto& [shape, images] : {std::pair{Shape{8, 16, 16, 28, 1}, 3}, {Shape{8, 16, 32, 28, 2}, 4}}) {
        const Block block(shape);
        const std::int64_t before = memory_use().live_bytes;
        const at::Tensor out = block();
        const std::int64_t kept = memory_use().live_bytes - before;
        const auto image = static_cast<std::int64_t>(out.nbytes());
        EXPECT_GE(kept, images * image);
        EXPECT_LT(kept, images * image + image / 8);  // the norms' statistics
    }
}

TEST(ResidualBlock, CanBeDifferentiatedTwice) {
    at::manual_seed(4);
    const Block block({2, 8, 8, 4, 1}), exact = block.to(at::kDouble);
    const auto twice = [](const Block& of, const at::Tensor& out) {
        at::Tensor norm = at::zeros({}, out.options());
        for (const at::Tensor& one : torch::autograd::grad({scalar_of(out)}, of.all(), {}, std::nullopt, true)) {
            norm = norm + one.square().sum();
        }
        return torch::autograd::grad({norm}, of.all(), {}, std::nullopt, false, /*allow_unused=*/true);
    };
    const auto ours = twice(block, block()), expected = twice(exact, exact.by_operators());
    for (std::size_t i = 0; i < ours.size(); ++i) {
        ASSERT_EQ(ours[i].defined(), expected[i].defined()) << i;
        if (ours[i].defined()) {
            EXPECT_LE(relative_difference(ours[i], expected[i]), 1e-4) << i;
        }
    }
}

TEST(ResidualBlock, GivesNothingToWhatIsFrozen) {
    at::manual_seed(5);
    for (std::size_t frozen = 0; frozen < 10; ++frozen) {
        const Block block({3, 8, 16, 6, 2}), all = block.to(at::kFloat);
        block.all()[frozen].requires_grad_(false);
        scalar_of(block()).backward();
        scalar_of(all()).backward();
        for (std::size_t i = 0; i < 10; ++i) {
            ASSERT_EQ(block.all()[i].grad().defined(), i != frozen);
            if (i != frozen) {
                EXPECT_LE(relative_difference(block.all()[i].grad(), all.all()[i].grad()), 1e-6);
            }
        }
    }
}

TEST(ResidualBlock, UsesTorchsOperatorsForOtherLayoutsAndTypes) {
    at::manual_seed(6);
    const Block block({2, 8, 8, 6, 1}), exact = block.to(at::kDouble);
    EXPECT_TRUE(same_bits(exact(), exact.by_operators()));
    const at::Tensor out = residual_block(block.x.detach().contiguous(), block.named(), block.options);
    EXPECT_FALSE(is_fast(out));
    EXPECT_LE(relative_difference(out, block()), tolerance);
    // Of one channel it cannot be said which layout it is.
    const Block grey({3, 1, 8, 6, 2}), exact_grey = grey.to(at::kDouble);
    EXPECT_FALSE(is_fast(grey()));
    EXPECT_LE(relative_difference(grey(), exact_grey()), tolerance);
}

TEST(ResidualBlock, RefusesMismatchedInputs) {
    Block block({2, 8, 16, 6, 2});
    block.weights.resize(6);  // without its projection
    EXPECT_ANY_THROW(block());
    Block groups({2, 8, 8, 6, 1});
    groups.options.groups = 3;
    EXPECT_ANY_THROW(groups());
}

TEST(ResidualBlock, RefusesABackwardAfterAWeightOrTheResultWasChanged) {
    const Block block({2, 8, 8, 6, 1});
    const at::Tensor first = block(), second = block();
    {
        const at::NoGradGuard no_grad;
        first.add_(1);
    }
    EXPECT_THROW(first.sum().backward(), c10::Error);
    {
        const at::NoGradGuard no_grad;
        block.weights[3].add_(1);
    }
    EXPECT_THROW(second.sum().backward(), c10::Error);
}

TEST(ResidualBlock, OfNanIsNanInThatSampleAlone) {
    Block block({4, 8, 8, 6, 1});
    at::set_num_threads(2);
    const at::NoGradGuard no_grad;
    block.x[2][3][1][1] = std::nanf("");
    const at::Tensor nan = block().isnan();
    for (const int sample : {0, 1, 3}) EXPECT_FALSE(nan[sample].any().item<bool>());
    EXPECT_TRUE(nan[2].all().item<bool>());
    at::set_num_threads(1);
}

}  // namespace
