#pragma once

#include <gtest/gtest.h>

#include <bit>
#include <cstdint>

#include "microbatch/run/trainer_state.h"
#include "support/gradients.h"

namespace microbatch::test {

/// Names, shapes, how they lie in memory, and every bit.
inline void expect_same(const StoredTensors& left, const StoredTensors& right) {
    ASSERT_EQ(left.size(), right.size());
    for (std::size_t i = 0; i < left.size(); ++i) {
        EXPECT_EQ(left[i].name, right[i].name);
        const at::Tensor one = left[i].get(), other = right[i].get();
        EXPECT_TRUE(same_bits(one, other)) << left[i].name;
        for (const at::Tensor& shape : {left[i].shape, right[i].shape, one}) {
            EXPECT_EQ(shape.strides(), other.strides()) << left[i].name;
            EXPECT_EQ(shape.sizes(), other.sizes()) << left[i].name;
            EXPECT_EQ(shape.scalar_type(), other.scalar_type()) << left[i].name;
        }
    }
}

inline void expect_same(const OpenBatchState& left, const OpenBatchState& right) {
    const auto bits = [](double number) { return std::bit_cast<std::uint64_t>(number); };
    EXPECT_EQ(left.samples, right.samples);
    EXPECT_EQ(bits(left.so_far.loss_sum), bits(right.so_far.loss_sum));
    EXPECT_EQ(left.so_far.weight, right.so_far.weight);
    EXPECT_EQ(left.so_far.micro_batches, right.so_far.micro_batches);
    EXPECT_EQ(left.so_far.parts.count, right.so_far.parts.count);
    EXPECT_EQ(bits(left.so_far.parts.weight), bits(right.so_far.parts.weight));
    EXPECT_EQ(bits(left.so_far.parts.squares), bits(right.so_far.parts.squares));
    EXPECT_EQ(left.measure_parts, right.measure_parts);
    EXPECT_EQ(left.plan, right.plan);
    EXPECT_EQ(left.out_of_memory, right.out_of_memory);
    EXPECT_EQ(left.seconds, right.seconds);
    expect_same(left.gradients, right.gradients);
    expect_same(left.buffers, right.buffers);
    expect_same(left.generators, right.generators);
}

inline void expect_same(const RecoveryState& left, const RecoveryState& right) {
    EXPECT_EQ(left.times, right.times);
    EXPECT_EQ(left.gone_back_at, right.gone_back_at);
    EXPECT_EQ(left.in_files, right.in_files);
    EXPECT_EQ(left.failed, right.failed);
    ASSERT_EQ(left.points.size(), right.points.size());
    for (std::size_t i = 0; i < left.points.size(); ++i) {
        EXPECT_EQ(left.points[i].steps, right.points[i].steps);
        EXPECT_EQ(left.points[i].guard, right.points[i].guard);
        EXPECT_EQ(left.points[i].state_counts, right.points[i].state_counts);
        expect_same(left.points[i].tensors, right.points[i].tensors);
    }
}

/// Every field; numbers bit for bit.
inline void expect_same(const TrainerState& left, const TrainerState& right) {
    const auto bits = [](double number) { return std::bit_cast<std::uint64_t>(number); };
    EXPECT_EQ(left.progress, right.progress);
    EXPECT_EQ(left.sampler, right.sampler);
    EXPECT_EQ(left.dataset_size, right.dataset_size);
    EXPECT_EQ(bits(left.learning_rate), bits(right.learning_rate));
    EXPECT_EQ(bits(left.own_rate), bits(right.own_rate));
    EXPECT_EQ(left.last_batch, right.last_batch);
    EXPECT_EQ(left.shrunk_at, right.shrunk_at);
    EXPECT_EQ(left.guard, right.guard);
    EXPECT_EQ(bits(left.noise.weight), bits(right.noise.weight));
    EXPECT_EQ(bits(left.noise.sum.variance), bits(right.noise.sum.variance));
    EXPECT_EQ(bits(left.noise.sum.squared_gradient), bits(right.noise.sum.squared_gradient));
    ASSERT_EQ(left.limits.size(), right.limits.size());
    for (std::size_t i = 0; i < left.limits.size(); ++i) {
        EXPECT_EQ(left.limits[i].shape, right.limits[i].shape);
        EXPECT_EQ(left.limits[i].plan, right.limits[i].plan);
    }
    EXPECT_EQ(left.optimizer_counts, right.optimizer_counts);
    expect_same(left.parameters, right.parameters);
    expect_same(left.buffers, right.buffers);
    expect_same(left.optimizer, right.optimizer);
    expect_same(left.generators, right.generators);
    ASSERT_EQ(left.recovery.has_value(), right.recovery.has_value());
    if (left.recovery) expect_same(*left.recovery, *right.recovery);
    ASSERT_EQ(left.open.has_value(), right.open.has_value());
    if (left.open) expect_same(*left.open, *right.open);
}

}  // namespace microbatch::test
