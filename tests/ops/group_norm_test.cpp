// Group norm with what follows it, in one operation, against torch's operators in double.
#include "microbatch/ops/group_norm.h"

#include <ATen/Parallel.h>
#include <gtest/gtest.h>
#include <torch/csrc/autograd/autograd.h>
#include <torch/csrc/autograd/function.h>

#include <cmath>
#include <limits>
#include <string>
#include <vector>

#include "microbatch/ops/kernels/kernels.h"
#include "support/gradients.h"
#include "support/one_thread.h"

namespace {

using namespace microbatch;
using test::relative_difference;
using test::same_bits;

constexpr double epsilon = 1e-5;
constexpr auto channels_last = at::MemoryFormat::ChannelsLast;

struct Shape {
    std::int64_t samples, channels, height, width, groups;

    std::string name() const {
        return std::to_string(samples) + " x " + std::to_string(channels) + " x " + std::to_string(height) + " x " +
               std::to_string(width) + " in " + std::to_string(groups) + " groups";
    }
};

// Channels below, at and above every width of vectors, chunks that overlap, one pixel, odd numbers of pixels.
const std::vector<Shape> shapes = {{1, 1, 1, 2, 1},   {2, 3, 4, 4, 3},   {3, 8, 5, 7, 2},
                                   {2, 12, 3, 3, 4},  {2, 16, 9, 9, 8},  {1, 20, 1, 3, 5},
                                   {5, 24, 6, 5, 24}, {2, 40, 3, 2, 10}, {9, 64, 7, 7, 8}};

struct Inputs {
    at::Tensor x, scale, shift, added;
    std::int64_t groups;

    explicit Inputs(const Shape& shape) : groups(shape.groups) {
        const auto image = [&] {
            return (at::randn({shape.samples, shape.channels, shape.height, shape.width}) + 0.3)
                .contiguous(channels_last);
        };
        x = image().requires_grad_();
        added = image().requires_grad_();
        scale = (at::randn({shape.channels}) * 0.3 + 1).requires_grad_();
        shift = (at::randn({shape.channels}) * 0.3).requires_grad_();
    }

    Inputs to(at::ScalarType type) const {
        Inputs result = *this;
        for (at::Tensor* one : {&result.x, &result.scale, &result.shift, &result.added}) {
            *one = one->detach().to(type).requires_grad_();
        }
        return result;
    }

    NormTail tail(bool adds, bool relu) const { return {.added = adds ? added : at::Tensor(), .relu = relu}; }
    at::Tensor operator()(bool adds, bool relu) const {
        return group_norm(x, groups, scale, shift, epsilon, tail(adds, relu));
    }
    at::Tensor by_operators(bool adds, bool relu) const {
        return group_norm_by_operators(x, groups, scale, shift, epsilon, tail(adds, relu));
    }
    std::vector<at::Tensor> all(bool adds) const {
        std::vector<at::Tensor> result{x, scale, shift};
        if (adds) result.push_back(added);
        return result;
    }
};

/// What is differentiated: no direction of the result is special.
at::Tensor scalar_of(const at::Tensor& out) {
    return (out * at::arange(out.numel(), out.options()).view(out.sizes()).sin()).sum();
}

bool is_fast(const at::Tensor& out) {
    return out.grad_fn()->name().find("FusedGroupNorm") != std::string::npos;
}

// Sums of up to some hundred numbers about 1 in fp32, 6e-8 times the root of their number; groups of few numbers that
// lie close together multiply by an inverse deviation of up to 100.
constexpr double tolerance = 1e-5;

template <class Test>
void for_all_tails(const Test& test) {
    for (const bool adds : {false, true}) {
        for (const bool relu : {false, true}) {
            SCOPED_TRACE(std::string(adds ? "added" : "alone") + (relu ? ", ReLU" : ""));
            test(adds, relu);
        }
    }
}

TEST(GroupNorm, HasTheValueAndEveryGradientOfTorchsOperatorsInDouble) {
    at::manual_seed(1);
    for (const Shape& shape : shapes) {
        SCOPED_TRACE(shape.name());
        for_all_tails([&](bool adds, bool relu) {
            const Inputs inputs(shape), exact = inputs.to(at::kDouble);
            const at::Tensor out = inputs(adds, relu), expected = exact.by_operators(adds, relu);
            ASSERT_TRUE(is_fast(out));
            EXPECT_TRUE(out.is_contiguous(channels_last));
            EXPECT_LE(relative_difference(out, expected), tolerance);
            scalar_of(out).backward();
            scalar_of(expected).backward();
            const auto ours = inputs.all(adds), theirs = exact.all(adds);
            for (std::size_t i = 0; i < ours.size(); ++i) {
                // Of two numbers a group the gradient of x is 0 but for rounding.
                const double scale = shape.channels * shape.height * shape.width / shape.groups <= 2 ? 1.0 : 0.0;
                const double difference = (ours[i].grad().to(at::kDouble) - theirs[i].grad()).norm().item<double>();
                EXPECT_LE(difference, tolerance * (theirs[i].grad().norm().item<double>() + scale)) << i;
            }
        });
    }
}

TEST(GroupNorm, IsTheSameForEveryKindOfVectors) {
    at::manual_seed(2);
    for (const Shape& shape : shapes) {
        SCOPED_TRACE(shape.name());
        const Inputs inputs(shape), exact = inputs.to(at::kDouble);
        const at::NoGradGuard no_grad;
        const at::Tensor expected = exact.by_operators(true, true);
        for (const Kernels* table : all_kernels()) {
            at::Tensor y = at::empty_like(inputs.x), again = at::empty_like(inputs.x);
            at::Tensor statistics = at::empty({shape.samples, 2, shape.groups});
            at::Tensor scratch = at::empty({table->group_norm_scratch(shape.channels)});
            GroupNormImages norm{.samples = shape.samples,
                                 .pixels = shape.height * shape.width,
                                 .channels = shape.channels,
                                 .groups = shape.groups,
                                 .epsilon = static_cast<float>(epsilon),
                                 .x = inputs.x.const_data_ptr<float>(),
                                 .scale = inputs.scale.const_data_ptr<float>(),
                                 .shift = inputs.shift.const_data_ptr<float>(),
                                 .added = inputs.added.const_data_ptr<float>(),
                                 .relu = true,
                                 .y = y.mutable_data_ptr<float>(),
                                 .statistics = statistics.mutable_data_ptr<float>()};
            table->group_norm_images(norm, scratch.mutable_data_ptr<float>());
            EXPECT_LE(relative_difference(y, expected), tolerance) << table->name;
            norm.y = again.mutable_data_ptr<float>();
            table->group_norm_images_again(norm, scratch.mutable_data_ptr<float>());
            EXPECT_TRUE(same_bits(again, y)) << table->name;
        }
    }
}

TEST(GroupNorm, HasTheSameValuesOnTwoThreads) {
    at::manual_seed(3);
    const Inputs inputs({7, 16, 20, 20, 8});
    const auto run = [&](int threads) {
        at::set_num_threads(threads);
        const at::Tensor out = inputs(true, true);
        auto results = torch::autograd::grad({scalar_of(out)}, inputs.all(true));
        results.push_back(out.detach());
        at::set_num_threads(1);
        return results;
    };
    const auto one = run(1), two = run(2), again = run(2);
    for (std::size_t i = 0; i < one.size(); ++i) {
        EXPECT_LE(relative_difference(two[i], one[i]), 1e-6) << i;
        EXPECT_TRUE(same_bits(two[i], again[i])) << i;
    }
}

TEST(GroupNorm, CanBeDifferentiatedTwice) {
    at::manual_seed(4);
    for_all_tails([&](bool adds, bool relu) {
        const Inputs inputs({2, 6, 3, 4, 3}), exact = inputs.to(at::kDouble);
        // The gradient of the squared norm of the gradient.
        const auto twice = [&](const Inputs& of, const at::Tensor& out) {
            at::Tensor norm = at::zeros({}, out.options());
            for (const at::Tensor& one :
                 torch::autograd::grad({scalar_of(out)}, of.all(adds), {}, std::nullopt, true)) {
                norm = norm + one.square().sum();
            }
            return torch::autograd::grad({norm}, {of.x, of.scale}, {}, std::nullopt, false, /*allow_unused=*/true);
        };
        const auto ours = twice(inputs, inputs(adds, relu)), expected = twice(exact, exact.by_operators(adds, relu));
        for (std::size_t i = 0; i < ours.size(); ++i) EXPECT_LE(relative_difference(ours[i], expected[i]), 1e-4) << i;
    });
}

TEST(GroupNorm, GivesNothingToWhatIsFrozen) {
    at::manual_seed(5);
    for (std::size_t frozen = 0; frozen < 4; ++frozen) {
        const Inputs inputs({2, 8, 3, 3, 2}), all = inputs.to(at::kFloat);
        inputs.all(true)[frozen].requires_grad_(false);
        scalar_of(inputs(true, true)).backward();
        scalar_of(all(true, true)).backward();
        for (std::size_t i = 0; i < 4; ++i) {
            ASSERT_EQ(inputs.all(true)[i].grad().defined(), i != frozen);
            if (i != frozen) {
                EXPECT_TRUE(same_bits(inputs.all(true)[i].grad(), all.all(true)[i].grad()));
            }
        }
    }
}

TEST(GroupNorm, UsesTorchsOperatorsForOtherLayoutsAndTypes) {
    at::manual_seed(6);
    const Inputs inputs({2, 8, 3, 5, 2}), exact = inputs.to(at::kDouble);
    EXPECT_TRUE(same_bits(exact(true, true), exact.by_operators(true, true)));
    const at::Tensor rows = inputs.x.detach().contiguous();
    const at::Tensor out = group_norm(rows, 2, inputs.scale, inputs.shift, epsilon);
    EXPECT_FALSE(is_fast(out));
    EXPECT_LE(relative_difference(out, inputs(false, false)), 1e-6);
    // What is added may lie in memory as it likes.
    const at::Tensor mixed =
        group_norm(inputs.x, 2, inputs.scale, inputs.shift, epsilon, {.added = rows, .relu = true});
    EXPECT_TRUE(is_fast(mixed));
    EXPECT_TRUE(same_bits(mixed, group_norm(inputs.x, 2, inputs.scale, inputs.shift, epsilon,
                                            {.added = inputs.x.detach(), .relu = true})));
    // A gradient that is expanded, too.
    const auto expanded = torch::autograd::grad({inputs(true, true).sum()}, inputs.all(true));
    const at::Tensor result = inputs(true, true);
    const auto dense = torch::autograd::grad({result}, inputs.all(true), {at::ones_like(result)});
    for (std::size_t i = 0; i < dense.size(); ++i) EXPECT_TRUE(same_bits(expanded[i], dense[i])) << i;
}

TEST(GroupNorm, RefusesGroupsThatDoNotDivideTheChannels) {
    const Inputs inputs({2, 8, 3, 5, 2});
    EXPECT_ANY_THROW(group_norm(inputs.x, 3, inputs.scale, inputs.shift, epsilon));
    EXPECT_ANY_THROW(group_norm(inputs.x, 2, inputs.scale.detach().narrow(0, 0, 4), inputs.shift, epsilon));
}

TEST(GroupNorm, OfNanIsNanInThatGroupAlone) {
    const Inputs inputs({2, 8, 3, 5, 2});
    const at::NoGradGuard no_grad;
    for (const float bad : {std::nanf(""), std::numeric_limits<float>::infinity()}) {
        at::Tensor x = inputs.x.detach().clone();
        x[1][5][2][3] = bad;
        const at::Tensor nan = group_norm(x, 2, inputs.scale, inputs.shift, epsilon, {.relu = true}).isnan();
        EXPECT_FALSE(nan[0].any().item<bool>());
        EXPECT_FALSE(nan[1].narrow(0, 0, 4).any().item<bool>());
        EXPECT_TRUE(nan[1].narrow(0, 4, 4).all().item<bool>());
    }
}

TEST(GroupNorm, OfEqualNumbersIsTheShift) {
    const Inputs inputs({2, 8, 3, 5, 2});
    const at::Tensor out = group_norm(at::full_like(inputs.x, 3), 2, inputs.scale, inputs.shift, epsilon);
    // The mean of equal numbers is off by a rounding of 3, times an inverse deviation of 316.
    EXPECT_LE((out - inputs.shift.view({1, 8, 1, 1})).abs().max().item<double>(), 3 * 1.2e-7 * 316 * 2);
}

}  // namespace
