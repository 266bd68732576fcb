// The kernels that go over rows (layer norm, GELU with bias, sums), every variant against the same arithmetic in
// double.
#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "microbatch/ops/kernels/kernels.h"

namespace microbatch {
namespace {

constexpr float nan_value = std::numeric_limits<float>::quiet_NaN();
constexpr float epsilon = 1e-5F;

using Floats = std::vector<float>;

/// Rows of all lengths around the widths of the vectors, and what the kernels read and write, with a guard behind.
struct Rows {
    std::int64_t count, width;
    std::mt19937_64 random;

    Rows(std::int64_t count_, std::int64_t width_)
        : count(count_), width(width_), random(static_cast<std::uint64_t>(count * 1000 + width)) {}

    Floats draw(std::int64_t size) {
        std::normal_distribution<float> normal(0.3F, 1.0F);
        Floats result(static_cast<std::size_t>(size) + 1, guard);
        for (std::int64_t i = 0; i < size; ++i) result[static_cast<std::size_t>(i)] = normal(random);
        return result;
    }
    Floats matrix() { return draw(count * width); }
    Floats vector() { return draw(width); }
    std::size_t at(std::int64_t row, std::int64_t column) const {
        return static_cast<std::size_t>(row * width + column);
    }

    static constexpr float guard = 77.0F;
};

template <class Test>
void for_all_shapes(const Test& test) {
    for (const Kernels* table : all_kernels()) {
        for (const std::int64_t width : {1, 2, 3, 4, 7, 8, 15, 16, 17, 31, 33, 64, 128, 130}) {
            for (const std::int64_t count : {1, 2, 5}) {
                SCOPED_TRACE(std::string(table->name) + ", " + std::to_string(count) + " rows of " +
                             std::to_string(width));
                test(*table, Rows(count, width));
            }
        }
    }
}

double gelu_of(double x) {
    return 0.5 * x * (1 + std::tanh(std::sqrt(2 / M_PI) * (x + 0.044715 * x * x * x)));
}

double slope_of(double x) {
    const double step = 1e-5;
    return (gelu_of(x + step) - gelu_of(x - step)) / (2 * step);
}

struct Moments {
    double mean = 0, inverse = 0;

    Moments(const Floats& x, const Rows& rows, std::int64_t row) {
        double variance = 0;
        const auto width = static_cast<double>(rows.width);
        for (std::int64_t i = 0; i < rows.width; ++i) mean += double(x[rows.at(row, i)]) / width;
        for (std::int64_t i = 0; i < rows.width; ++i) variance += std::pow(x[rows.at(row, i)] - mean, 2) / width;
        inverse = 1 / std::sqrt(variance + double(epsilon));
    }
};

// Sums of up to 130 numbers about 1, in fp32: 6e-8 times the root of their number, times what is multiplied with them.
// A row of nearly equal numbers multiplies by an inverse deviation of up to 300.
double tolerance(const Rows& rows) {
    return rows.width < 8 ? 2e-3 : 1e-5;
}

TEST(RowKernels, LayerNormIsThatOfTheFormula) {
    for_all_shapes([](const Kernels& table, Rows rows) {
        const Floats x = rows.matrix(), scale = rows.vector(), shift = rows.vector();
        Floats y = rows.matrix(), means = rows.draw(rows.count), inverses = rows.draw(rows.count);
        table.norm_rows({.rows = rows.count,
                         .width = rows.width,
                         .epsilon = epsilon,
                         .x = x.data(),
                         .scale = scale.data(),
                         .shift = shift.data(),
                         .y = y.data(),
                         .means = means.data(),
                         .inverses = inverses.data()});
        for (std::int64_t row = 0; row < rows.count; ++row) {
            const Moments moments(x, rows, row);
            const auto r = static_cast<std::size_t>(row);
            EXPECT_NEAR(means[r], moments.mean, 1e-6);
            EXPECT_NEAR(inverses[r] / moments.inverse, 1, 1e-4);
            for (std::int64_t i = 0; i < rows.width; ++i) {
                const auto c = static_cast<std::size_t>(i);
                EXPECT_NEAR(y[rows.at(row, i)],
                            (x[rows.at(row, i)] - moments.mean) * moments.inverse * scale[c] + shift[c],
                            tolerance(rows));
            }
        }
        EXPECT_EQ(y.back(), Rows::guard);
        EXPECT_EQ(means.back(), Rows::guard);
    });
}

TEST(RowKernels, TheGradientOfLayerNormFollowsTheFormulaAndYIsRecomputed) {
    for_all_shapes([](const Kernels& table, Rows rows) {
        const Floats x = rows.matrix(), scale = rows.vector(), shift = rows.vector(), residual = rows.matrix();
        const Floats gradient = rows.matrix();
        Floats grad_x = gradient, y = rows.matrix(), means, inverses;
        for (std::int64_t row = 0; row < rows.count; ++row) {
            const Moments moments(x, rows, row);
            means.push_back(static_cast<float>(moments.mean));
            inverses.push_back(static_cast<float>(moments.inverse));
        }
        const Floats before = rows.vector();
        Floats grad_scale = before, grad_shift = before, grad_x_sums = before;
        table.norm_rows_backward({.rows = rows.count,
                                  .width = rows.width,
                                  .x = x.data(),
                                  .means = means.data(),
                                  .inverses = inverses.data(),
                                  .scale = scale.data(),
                                  .shift = shift.data(),
                                  .gradient = grad_x.data(),  // in place
                                  .residual = residual.data(),
                                  .grad_x = grad_x.data(),
                                  .y = y.data(),
                                  .grad_scale = grad_scale.data(),
                                  .grad_shift = grad_shift.data(),
                                  .grad_x_sums = grad_x_sums.data()});
        std::vector<double> scales(before.begin(), before.end()), shifts = scales, sums = scales;
        for (std::int64_t row = 0; row < rows.count; ++row) {
            const double mean = means[static_cast<std::size_t>(row)], inverse = inverses[static_cast<std::size_t>(row)];
            double mean_sum = 0, mean_product = 0;
            const auto normed = [&](std::int64_t i) { return (x[rows.at(row, i)] - mean) * inverse; };
            const auto scaled = [&](std::int64_t i) {
                return double(gradient[rows.at(row, i)]) * scale[static_cast<std::size_t>(i)];
            };
            for (std::int64_t i = 0; i < rows.width; ++i) {
                mean_sum += scaled(i) / static_cast<double>(rows.width);
                mean_product += scaled(i) * normed(i) / static_cast<double>(rows.width);
            }
            for (std::int64_t i = 0; i < rows.width; ++i) {
                const auto c = static_cast<std::size_t>(i);
                const double expected =
                    residual[rows.at(row, i)] + inverse * (scaled(i) - mean_sum - normed(i) * mean_product);
                // What nearly cancels is multiplied by the inverse deviation.
                EXPECT_NEAR(grad_x[rows.at(row, i)], expected, 3e-6 * (4 + inverse));
                EXPECT_NEAR(y[rows.at(row, i)], normed(i) * scale[c] + shift[c], tolerance(rows));
                scales[c] += gradient[rows.at(row, i)] * normed(i);
                shifts[c] += gradient[rows.at(row, i)];
                sums[c] += expected;
            }
        }
        for (std::size_t c = 0; c < static_cast<std::size_t>(rows.width); ++c) {
            EXPECT_NEAR(grad_scale[c], scales[c], tolerance(rows));
            EXPECT_NEAR(grad_shift[c], shifts[c], 1e-5);
            EXPECT_NEAR(grad_x_sums[c], sums[c], 2e-3);
        }
        EXPECT_EQ(grad_x.back(), Rows::guard);
        EXPECT_EQ(y.back(), Rows::guard);
        EXPECT_EQ(grad_scale.back(), Rows::guard);
        EXPECT_EQ(grad_shift.back(), Rows::guard);
        EXPECT_EQ(grad_x_sums.back(), Rows::guard);
    });
}

TEST(RowKernels, GeluAddsTheBiasFirstAndItsGradientSumsTheRows) {
    for_all_shapes([](const Kernels& table, Rows rows) {
        const Floats start = rows.matrix(), bias = rows.vector(), before = rows.vector(), incoming = rows.matrix();
        Floats x = start, y = rows.matrix(), again = rows.matrix(), gradient = incoming, sums = before;
        table.gelu_rows(rows.count, rows.width, bias.data(), x.data(), y.data());
        table.gelu_rows_backward(rows.count, rows.width, x.data(), gradient.data(), again.data(), sums.data());
        std::vector<double> expected(before.begin(), before.end());
        for (std::int64_t row = 0; row < rows.count; ++row) {
            for (std::int64_t i = 0; i < rows.width; ++i) {
                const std::size_t place = rows.at(row, i), c = static_cast<std::size_t>(i);
                EXPECT_EQ(x[place], start[place] + bias[c]);
                EXPECT_NEAR(y[place], gelu_of(x[place]), 1e-5);
                EXPECT_EQ(again[place], y[place]);
                EXPECT_NEAR(gradient[place], incoming[place] * slope_of(x[place]), 3e-5);
                expected[c] += gradient[place];
            }
        }
        for (std::size_t c = 0; c < bias.size() - 1; ++c) EXPECT_NEAR(sums[c], expected[c], 1e-5);
        for (const Floats* each : {&x, &y, &again, &gradient, &sums}) EXPECT_EQ(each->back(), Rows::guard);
    });
}

TEST(RowKernels, RowsAreAddedWithABiasAlsoInPlaceAndSummedByColumn) {
    for_all_shapes([](const Kernels& table, Rows rows) {
        const Floats x = rows.matrix(), added = rows.matrix(), bias = rows.vector(), before = rows.vector();
        Floats sum = added, sums = before;
        table.add_rows({.rows = rows.count,
                        .width = rows.width,
                        .x = x.data(),
                        .added = sum.data(),
                        .bias = bias.data(),
                        .sum = sum.data()});
        table.sum_columns(rows.count, rows.width, x.data(), sums.data());
        std::vector<double> expected(before.begin(), before.end());
        for (std::int64_t row = 0; row < rows.count; ++row) {
            for (std::int64_t i = 0; i < rows.width; ++i) {
                const std::size_t place = rows.at(row, i), c = static_cast<std::size_t>(i);
                EXPECT_EQ(sum[place], x[place] + (added[place] + bias[c]));
                expected[c] += x[place];
            }
        }
        for (std::size_t c = 0; c < bias.size() - 1; ++c) EXPECT_NEAR(sums[c], expected[c], 1e-5);
        EXPECT_EQ(sum.back(), Rows::guard);
        EXPECT_EQ(sums.back(), Rows::guard);
    });
}

TEST(RowKernels, NanInARowStaysInItAndReachesItsSums) {
    for (const Kernels* table : all_kernels()) {
        Rows rows(3, 20);
        Floats x = rows.matrix(), ones = rows.vector(), y = rows.matrix(), means(3), inverses(3), sums = rows.vector();
        x[rows.at(1, 18)] = nan_value;
        table->norm_rows({.rows = 3,
                          .width = 20,
                          .epsilon = epsilon,
                          .x = x.data(),
                          .scale = ones.data(),
                          .shift = ones.data(),
                          .y = y.data(),
                          .means = means.data(),
                          .inverses = inverses.data()});
        table->sum_columns(3, 20, x.data(), sums.data());
        for (std::int64_t i = 0; i < 20; ++i) {
            EXPECT_TRUE(std::isfinite(y[rows.at(0, i)]) && std::isfinite(y[rows.at(2, i)])) << table->name;
            EXPECT_TRUE(std::isnan(y[rows.at(1, i)])) << table->name;
            EXPECT_EQ(std::isnan(sums[static_cast<std::size_t>(i)]), i == 18) << table->name;
        }
        table->gelu_rows(3, 20, ones.data(), x.data(), y.data());
        EXPECT_TRUE(std::isnan(y[rows.at(1, 18)]) && std::isfinite(y[rows.at(1, 17)])) << table->name;
    }
}

TEST(RowKernels, RmsNormAndItsGradientAreThoseOfTheFormula) {
    for_all_shapes([](const Kernels& table, Rows rows) {
        const Floats x = rows.matrix(), scale = rows.vector(), gradient = rows.matrix(), residual = rows.matrix();
        Floats y = rows.matrix(), again = rows.matrix(), inverses = rows.draw(rows.count), grad_x = rows.matrix();
        const Floats before = rows.vector();
        Floats grad_scale = before;
        table.rms_norm_rows({.rows = rows.count,
                             .width = rows.width,
                             .epsilon = epsilon,
                             .x = x.data(),
                             .scale = scale.data(),
                             .y = y.data(),
                             .inverses = inverses.data()});
        table.rms_norm_rows_backward({.rows = rows.count,
                                      .width = rows.width,
                                      .x = x.data(),
                                      .inverses = inverses.data(),
                                      .scale = scale.data(),
                                      .gradient = gradient.data(),
                                      .residual = residual.data(),
                                      .grad_x = grad_x.data(),
                                      .y = again.data(),
                                      .grad_scale = grad_scale.data()});
        std::vector<double> sums(before.begin(), before.end());
        for (std::int64_t r = 0; r < rows.count; ++r) {
            double squares = 0, product = 0;
            const auto width = static_cast<double>(rows.width);
            for (std::int64_t i = 0; i < rows.width; ++i) squares += std::pow(double(x[rows.at(r, i)]), 2) / width;
            const double inverse = 1 / std::sqrt(squares + double(epsilon));
            const auto normed = [&](std::int64_t i) { return double(x[rows.at(r, i)]) * inverse; };
            const auto scaled = [&](std::int64_t i) {
                return double(gradient[rows.at(r, i)]) * double(scale[static_cast<std::size_t>(i)]);
            };
            for (std::int64_t i = 0; i < rows.width; ++i) product += scaled(i) * normed(i) / width;
            for (std::int64_t i = 0; i < rows.width; ++i) {
                const std::size_t at = rows.at(r, i), column = static_cast<std::size_t>(i);
                EXPECT_NEAR(y[at], normed(i) * double(scale[column]), tolerance(rows));
                EXPECT_EQ(again[at], y[at]);
                EXPECT_NEAR(grad_x[at], residual[at] + inverse * (scaled(i) - normed(i) * product),
                            tolerance(rows) * std::max(1.0, inverse));
                sums[column] += double(gradient[at]) * normed(i);
            }
        }
        for (std::size_t i = 0; i < sums.size(); ++i) EXPECT_NEAR(grad_scale[i], sums[i], tolerance(rows));
        EXPECT_EQ(y.back(), Rows::guard);
        EXPECT_EQ(grad_x.back(), Rows::guard);
    });
}

TEST(RowKernels, TheGateAndItsGradientAreThoseOfTheFormula) {
    for_all_shapes([](const Kernels& table, Rows rows) {
        const Floats gate = rows.matrix(), up = rows.matrix(), gradient = rows.matrix();
        Floats y = rows.matrix(), again = rows.matrix(), grad_gate = rows.matrix(), grad_up = gradient;
        const std::int64_t count = rows.count * rows.width;
        table.gated(gate.data(), up.data(), y.data(), count);
        table.gated_backward(gate.data(), up.data(), grad_up.data(), grad_gate.data(), grad_up.data(), again.data(),
                             count);
        for (std::size_t i = 0; i < static_cast<std::size_t>(count); ++i) {
            const double x = gate[i], s = 1 / (1 + std::exp(-x));
            // A rounding or two of numbers up to about 10.
            EXPECT_NEAR(y[i], x * s * up[i], 4e-6);
            EXPECT_EQ(again[i], y[i]);
            EXPECT_NEAR(grad_up[i], gradient[i] * x * s, 4e-6);
            EXPECT_NEAR(grad_gate[i], gradient[i] * up[i] * (s + x * s * (1 - s)), 8e-6);
        }
        EXPECT_EQ(y.back(), Rows::guard);
        EXPECT_EQ(grad_gate.back(), Rows::guard);
    });
}

TEST(RowKernels, TheGateOfAnyNumberIsItsLimitAndOfNanNan) {
    for (const Kernels* table : all_kernels()) {
        const float gate[] = {nan_value, 200.0F, -200.0F, 0.0F}, up[] = {1, 2, 3, 4};
        float y[4];
        table->gated(gate, up, y, 4);
        EXPECT_TRUE(std::isnan(y[0]));
        EXPECT_EQ(y[1], 400.0F);
        EXPECT_NEAR(y[2], 0.0F, 1e-30F);
        EXPECT_EQ(y[3], 0.0F);
    }
}

TEST(RowKernels, PositionsAreRotatedAndBackwardIsTheTranspose) {
    for (const Kernels* table : all_kernels()) {
        for (const std::int64_t size : {2, 6, 8, 16, 34, 64}) {
            constexpr std::int64_t count = 3, heads = 2;
            const std::int64_t row = heads * size + 3;
            Rows rows(count, row);
            const Floats before = rows.draw(count * row), cosines = rows.draw(count * size),
                         sines = rows.draw(count * size);
            Floats forward = before, back = before;
            RotateRows of{.rows = count,
                          .heads = heads,
                          .size = size,
                          .row = row,
                          .cosines = cosines.data(),
                          .sines = sines.data(),
                          .values = forward.data()};
            table->rotate_rows(of);
            of.values = back.data();
            table->rotate_rows_backward(of);
            for (std::int64_t r = 0; r < count; ++r) {
                for (std::int64_t i = heads * size; i < row; ++i)
                    EXPECT_EQ(forward[rows.at(r, i)], before[rows.at(r, i)]);
                for (std::int64_t i = 0; i < heads * size; ++i) {
                    const std::int64_t head = i / size * size, k = i % size, other = (k + size / 2) % size;
                    const auto x = [&](std::int64_t j) { return double(before[rows.at(r, head + j)]); };
                    const auto c = [&](std::int64_t j) {
                        return double(cosines[static_cast<std::size_t>(r * size + j)]);
                    };
                    const auto s = [&](std::int64_t j) {
                        return double(sines[static_cast<std::size_t>(r * size + j)]);
                    };
                    const double sign = k < size / 2 ? -1 : 1;
                    // One rounding of products of numbers up to about 10.
                    EXPECT_NEAR(forward[rows.at(r, i)], x(k) * c(k) + sign * x(other) * s(k), 5e-6);
                    EXPECT_NEAR(back[rows.at(r, i)], x(k) * c(k) - sign * x(other) * s(other), 5e-6);
                }
            }
        }
    }
}

}  // namespace
}  // namespace microbatch
