// Every kernel variant that this processor supports against the same arithmetic in double, for all sizes.
#include "microbatch/ops/kernels/kernels.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <numbers>
#include <random>
#include <string>
#include <vector>

namespace microbatch {
namespace {

constexpr float nan_value = std::numeric_limits<float>::quiet_NaN();
constexpr float infinity = std::numeric_limits<float>::infinity();

double gelu_of(double x) {
    const double u = std::sqrt(2 / std::numbers::pi) * (x + 0.044715 * x * x * x);
    return 0.5 * x * (1 + std::tanh(u));
}

double slope_of(double x) {
    const double k = std::sqrt(2 / std::numbers::pi);
    const double t = std::tanh(k * (x + 0.044715 * x * x * x));
    return 0.5 * (1 + t) + 0.5 * x * (1 - t * t) * k * (1 + 3 * 0.044715 * x * x);
}

/// A head in memory of its own, its rows wider than it, with gaps that must stay as they are.
struct Sample {
    std::int64_t tokens, size, row, out_row;
    std::int64_t keys = tokens;
    bool causal = true;
    std::vector<float> inputs, out, gradient, grad_inputs, log_sums;

    Sample(std::int64_t tokens_, std::int64_t size_, std::mt19937_64& random, float deviation = 1.0F)
        : tokens(tokens_), size(size_), row(3 * size_ + 2), out_row(size_ + 1) {
        std::normal_distribution<float> normal(0, deviation);
        inputs.resize(count(row));
        gradient.resize(count(out_row));
        for (float& x : inputs) x = normal(random);
        for (float& x : gradient) x = normal(random);
        out.assign(count(out_row), gap);
        grad_inputs.assign(count(row), gap);
        log_sums.resize(count(1));
    }

    AttentionHead head() {
        return {.tokens = tokens,
                .keys = keys,
                .size = size,
                .causal = causal,
                .scale = scale(),
                .row = row,
                .kv_row = row,
                .out_row = out_row,
                .q = inputs.data(),
                .k = inputs.data() + size,
                .v = inputs.data() + 2 * size,
                .out = out.data(),
                .log_sums = log_sums.data(),
                .gradient = gradient.data(),
                .grad_q = grad_inputs.data(),
                .grad_k = grad_inputs.data() + size,
                .grad_v = grad_inputs.data() + 2 * size};
    }

    // Scratch holds anything: nothing may be read that was not written.
    void run(const Kernels& table) {
        std::vector<float> scratch(static_cast<std::size_t>(table.attention_forward_scratch(tokens, size)), nan_value);
        table.attention_forward(head(), scratch.data());
        scratch.assign(static_cast<std::size_t>(table.attention_backward_scratch(tokens, size)), nan_value);
        table.attention_backward(head(), scratch.data());
    }

    float scale() const { return 1.0F / std::sqrt(static_cast<float>(size)); }
    std::size_t count(std::int64_t width) const { return static_cast<std::size_t>(tokens * width); }

    static constexpr float gap = 12345.0F;
};

/// What a sample should give, in double.
struct Expected {
    std::vector<double> out, grad_inputs;

    explicit Expected(const Sample& s) : out(s.count(s.out_row), Sample::gap), grad_inputs(s.count(s.row), 0.0) {
        for (std::int64_t i = 0; i < s.tokens; ++i) add_query(s, i);
        for (std::int64_t i = 0; i < s.tokens; ++i) {
            for (std::int64_t k = 3 * s.size; k < s.row; ++k) grad_inputs[at(i, s.row, k)] = Sample::gap;
        }
    }

private:
    static std::size_t at(std::int64_t i, std::int64_t row, std::int64_t k) {
        return static_cast<std::size_t>(i * row + k);
    }

    void add_query(const Sample& s, std::int64_t i) {
        const auto q = [&](std::int64_t token, std::int64_t k) { return double(s.inputs[at(token, s.row, k)]); };
        const auto g = [&](std::int64_t k) { return double(s.gradient[at(i, s.out_row, k)]); };
        std::vector<double> p;
        const std::int64_t end = s.causal ? std::min(s.keys, i + 1) : s.keys;
        for (std::int64_t j = 0; j < end; ++j) {
            double score = 0;
            for (std::int64_t k = 0; k < s.size; ++k) score += q(i, k) * q(j, s.size + k);
            p.push_back(score * s.scale());
        }
        const double largest = *std::max_element(p.begin(), p.end());
        double sum = 0, dot = 0;
        for (double& x : p) sum += x = std::exp(x - largest);
        for (std::int64_t k = 0; k < s.size; ++k) {
            double mixed = 0;
            for (std::int64_t j = 0; j < end; ++j) mixed += p[at(0, 0, j)] / sum * q(j, 2 * s.size + k);
            out[at(i, s.out_row, k)] = mixed;
            dot += mixed * g(k);
        }
        for (std::int64_t j = 0; j < end; ++j) {
            const double share = p[at(0, 0, j)] / sum;
            double of_share = 0;
            for (std::int64_t k = 0; k < s.size; ++k) of_share += g(k) * q(j, 2 * s.size + k);
            const double of_score = share * (of_share - dot) * s.scale();
            for (std::int64_t k = 0; k < s.size; ++k) {
                grad_inputs[at(i, s.row, k)] += of_score * q(j, s.size + k);
                grad_inputs[at(j, s.row, s.size + k)] += of_score * q(i, k);
                grad_inputs[at(j, s.row, 2 * s.size + k)] += share * g(k);
            }
        }
    }
};

void expect_near(const std::vector<float>& ours, const std::vector<double>& expected, double tolerance,
                 const std::string& what) {
    ASSERT_EQ(ours.size(), expected.size());
    double worst = 0;
    for (std::size_t i = 0; i < ours.size(); ++i) {
        const double error = std::abs(ours[i] - expected[i]);
        if (!(error <= worst)) worst = error;  // NaN, too
    }
    EXPECT_LE(worst, tolerance) << what;
}

TEST(Kernels, TheLastOfAllIsTheOneThatIsUsed) {
    EXPECT_EQ(all_kernels().back(), &kernels());
    EXPECT_STREQ(all_kernels().front()->name, "generic");
}

TEST(Kernels, GeluAndItsSlopeAreThoseOfTheFormula) {
    for (const Kernels* table : all_kernels()) {
        for (float x = -12; x < 12; x += 0.0137F) {
            float y = 0, slope = 0;
            const float two = 2;
            table->gelu(&x, &y, 1);
            table->gelu_backward(&x, &two, &slope, 1);
            // Two units in the last place of the exponential, a rounding or two more, and the argument's rounding,
            // which the exponential of it multiplies by at most 12.
            EXPECT_NEAR(y, gelu_of(x), 2e-6 * std::max(1.0, std::abs(gelu_of(x)))) << table->name << " " << x;
            EXPECT_NEAR(slope, 2 * slope_of(x), 8e-6) << table->name << " " << x;
        }
    }
}

TEST(Kernels, GeluOfEveryLengthWritesThatManyElements) {
    std::mt19937_64 random(1);
    for (const Kernels* table : all_kernels()) {
        for (std::int64_t count = 0; count < 70; ++count) {
            std::vector<float> x(static_cast<std::size_t>(count)), y(x.size() + 1, 7.0F), slope(x.size() + 1, 7.0F);
            for (float& one : x) one = std::normal_distribution<float>()(random);
            table->gelu(x.data(), y.data(), count);
            table->gelu_backward(x.data(), x.data(), slope.data(), count);
            for (std::size_t i = 0; i < x.size(); ++i) {
                EXPECT_NEAR(y[i], gelu_of(x[i]), 4e-6);
                EXPECT_NEAR(slope[i], x[i] * slope_of(x[i]), 2e-5);
            }
            EXPECT_EQ(y.back(), 7.0F);
            EXPECT_EQ(slope.back(), 7.0F);
        }
    }
}

TEST(Kernels, GeluOfNanIsNanAndOfInfinityItsLimit) {
    for (const Kernels* table : all_kernels()) {
        const float x[] = {nan_value, infinity, 3e38F, -3e38F, 0.0F, -0.0F, 1e-40F};
        float y[7], slope[7];
        const float ones[7] = {1, 1, 1, 1, 1, 1, 1};
        table->gelu(x, y, 7);
        table->gelu_backward(x, ones, slope, 7);
        EXPECT_TRUE(std::isnan(y[0]) && std::isnan(slope[0]));
        EXPECT_EQ(y[1], infinity);
        EXPECT_EQ(y[2], 3e38F);
        EXPECT_NEAR(y[3], 0.0F, 1.0F);  // -3e38 times the smallest sigmoid there is
        EXPECT_EQ(y[4], 0.0F);
        EXPECT_EQ(slope[4], 0.5F);
        EXPECT_EQ(y[6], 0.5F * 1e-40F);
    }
}

TEST(Kernels, AttentionAndItsGradientAreThoseOfTheFormulaForEverySize) {
    std::mt19937_64 random(2);
    for (const Kernels* table : all_kernels()) {
        for (const std::int64_t tokens : {1, 2, 5, 6, 7, 16, 31, 64, 65, 97, 255, 257, 300}) {
            for (const std::int64_t size : {1, 3, 16, 17, 32, 64, 80}) {
                Sample sample(tokens, size, random);
                sample.run(*table);
                const Expected expected(sample);
                const std::string what =
                    std::string(table->name) + " " + std::to_string(tokens) + " x " + std::to_string(size);
                // Sums of up to 300 products of numbers about 1, weighted to a sum of 1: fp32's 6e-8 times the square
                // root of their number, and the exponential's two units in the last place, some times over.
                expect_near(sample.out, expected.out, 4e-6, what);
                expect_near(sample.grad_inputs, expected.grad_inputs, 2e-5, what);
            }
        }
    }
}

TEST(Kernels, AttentionOfFewerKeysAndOfAllQueriesToAllKeysIsThatOfTheFormula) {
    std::mt19937_64 random(12);
    for (const Kernels* table : all_kernels()) {
        for (const bool causal : {true, false}) {
            for (const std::int64_t tokens : {1, 5, 7, 31, 65, 97, 300}) {
                for (const std::int64_t keys : {std::int64_t{1}, tokens / 2 + 1, tokens - 1, tokens}) {
                    if (keys < 1) continue;
                    Sample sample(tokens, 17, random);
                    sample.causal = causal;
                    sample.keys = keys;
                    sample.run(*table);
                    const Expected expected(sample);
                    const std::string what = std::string(table->name) + (causal ? " causal " : " all ") +
                                             std::to_string(tokens) + ", keys " + std::to_string(keys);
                    expect_near(sample.out, expected.out, 4e-6, what);  // as above
                    // The gradient of a key is a sum over all queries: larger numbers, if there are few keys.
                    expect_near(sample.grad_inputs, expected.grad_inputs, 1e-4, what);
                }
            }
        }
    }
}

TEST(Kernels, AttentionAddsToTheGradientsOfSharedKeys) {
    std::mt19937_64 random(13);
    for (const Kernels* table : all_kernels()) {
        Sample sample(20, 16, random);
        sample.run(*table);
        const std::vector<float> once = sample.grad_inputs;
        AttentionHead head = sample.head();
        head.add_to_keys = true;
        std::vector<float> scratch(static_cast<std::size_t>(table->attention_backward_scratch(20, 16)), nan_value);
        table->attention_backward(head, scratch.data());
        for (std::size_t i = 0; i < once.size(); ++i) {
            const auto column = static_cast<std::int64_t>(i) % sample.row;
            EXPECT_EQ(sample.grad_inputs[i], column >= 16 && column < 48 ? 2 * once[i] : once[i]) << i;
        }
    }
}

TEST(Kernels, AttentionOfLargeScoresPicksTheLargest) {
    std::mt19937_64 random(3);
    for (const Kernels* table : all_kernels()) {
        Sample sample(70, 16, random, 30.0F);  // scores of some thousands
        sample.run(*table);
        const Expected expected(sample);
        expect_near(sample.out, expected.out, 0.2, table->name);  // a score of 4000 is known to 2e-4, e^it to as much
        for (const float x : sample.grad_inputs) EXPECT_TRUE(std::isfinite(x));
    }
}

// A tile of six queries goes over the keys of its last: 0 times NaN is NaN.
TEST(Kernels, NanInATokenReachesThatTokenAndNoneBeforeItsTile) {
    std::mt19937_64 random(4);
    for (const Kernels* table : all_kernels()) {
        for (const float bad : {nan_value, infinity}) {
            for (const std::int64_t part : {0, 1, 2}) {  // of q, k, v
                Sample sample(40, 8, random);
                sample.inputs[static_cast<std::size_t>(17 * sample.row + part * sample.size + 3)] = bad;
                sample.run(*table);
                for (std::int64_t i = 0; i < sample.tokens; ++i) {
                    bool finite = true;
                    for (std::int64_t k = 0; k < sample.size; ++k) {
                        finite = finite && std::isfinite(sample.out[static_cast<std::size_t>(i * sample.out_row + k)]);
                    }
                    if (i < 12) {
                        EXPECT_TRUE(finite) << i;
                    }
                    if (i == 17 && std::isnan(bad)) {
                        EXPECT_FALSE(finite) << table->name << part;
                    }
                }
            }
        }
    }
}

}  // namespace
}  // namespace microbatch
