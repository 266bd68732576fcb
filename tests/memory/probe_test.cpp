#include "microbatch/memory/probe.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <random>
#include <set>
#include <stdexcept>
#include <string>
#include <vector>

#include "support/errors.h"

namespace microbatch {
namespace {

using test::error_message;
using test::expect_usage_error;

constexpr std::int64_t unlimited = std::numeric_limits<std::int64_t>::max();
const std::vector<std::int64_t> batches = {1, 2, 3, 7, 100, 1000};

/// A job of known memory and time, and the sizes that it was measured with.
struct Job {
    std::function<std::int64_t(std::int64_t)> peak = [](std::int64_t b) { return 1000 + 10 * b; };
    std::function<double(std::int64_t)> seconds = [](std::int64_t) { return 1.0; };
    double update_seconds = 0.5;
    std::vector<std::int64_t> asked = {};

    Probe probe(std::int64_t batch, std::int64_t budget) {
        asked.clear();
        return probe_micro_batches(batch, budget, [this](std::int64_t b) {
            asked.push_back(b);
            return Measurement{b, peak(b), seconds(b), update_seconds};
        });
    }
};

const Candidate& chosen(const Probe& probe) {
    return probe.candidates.at(probe.chosen);
}

/// What holds for every probe, whatever the job.
void expect_sound(const Job& job, const Probe& probe, std::int64_t batch, std::int64_t budget) {
    SCOPED_TRACE(::testing::Message() << "batch " << batch << ", budget " << budget);
    ASSERT_LT(probe.chosen, probe.candidates.size());
    ASSERT_TRUE(chosen(probe).measured.has_value());
    EXPECT_TRUE(chosen(probe).fits);
    EXPECT_LE(chosen(probe).measured->peak_bytes, budget);

    std::int64_t before = 0;
    std::set<std::int64_t> measured;
    for (const Candidate& candidate : probe.candidates) {
        EXPECT_LT(before, candidate.micro_batch);  // sorted, each once
        before = candidate.micro_batch;
        EXPECT_EQ(candidate.micro_batches, (batch + candidate.micro_batch - 1) / candidate.micro_batch);
        EXPECT_EQ(candidate.step_seconds > 0.0, candidate.measured.has_value());
        if (!candidate.measured) continue;
        measured.insert(candidate.micro_batch);
        EXPECT_EQ(candidate.measured->micro_batch, candidate.micro_batch);
        EXPECT_EQ(candidate.fits, candidate.measured->peak_bytes <= budget);
        if (!candidate.fits) continue;
        EXPECT_GE(candidate.step_seconds, chosen(probe).step_seconds * 0.98);  // none is much faster
    }
    EXPECT_EQ(before, batch);  // the native one, whether it fits or not

    EXPECT_EQ(measured, std::set<std::int64_t>(job.asked.begin(), job.asked.end()));
    EXPECT_EQ(measured.size(), job.asked.size()) << "a size was measured twice";
    EXPECT_GE(*measured.begin(), 1);
    EXPECT_LE(*measured.rbegin(), batch);
    // The powers of two up to the batch, the largest that fits, and no more.
    EXPECT_LE(job.asked.size(), std::log2(static_cast<double>(batch)) + 3);
}

TEST(Probe, TakesTheFastestNotTheLargest) {
    // Seconds per sample: least at 8.
    Job job{.seconds = [](std::int64_t b) { return static_cast<double>(b) * (1 + std::abs(std::log2(b / 8.0))); }};
    const Probe probe = job.probe(64, unlimited);
    expect_sound(job, probe, 64, unlimited);
    EXPECT_EQ(chosen(probe).micro_batch, 8);
    EXPECT_EQ(chosen(probe).micro_batches, 8);
    EXPECT_EQ(chosen(probe).step_seconds, 8 * 8.0 + 0.5);  // 8 micro-batches of 8 seconds and one update
    EXPECT_TRUE(std::count(job.asked.begin(), job.asked.end(), 16)) << "it cannot know that 8 is the fastest";
}

TEST(Probe, StopsWhereLargerSizesDoNotPay) {
    Job job{.seconds = [](std::int64_t b) { return std::pow(static_cast<double>(b), 1.5); }};
    const Probe probe = job.probe(1 << 20, unlimited);
    expect_sound(job, probe, 1 << 20, unlimited);
    EXPECT_EQ(chosen(probe).micro_batch, 1);
    EXPECT_LE(job.asked.size(), 4u);
}

TEST(Probe, TakesTheWholeBatchWhereLargerIsAlwaysFasterAndFits) {
    for (const std::int64_t batch : batches) {
        Job job;
        const Probe probe = job.probe(batch, unlimited);
        expect_sound(job, probe, batch, unlimited);
        EXPECT_EQ(chosen(probe).micro_batch, batch);
        EXPECT_EQ(chosen(probe).step_seconds, 1.5);
    }
}

TEST(Probe, UsesTheBudgetToTheByte) {
    for (const std::int64_t scale : {std::int64_t{1}, std::int64_t{12'345'677}}) {
        for (const std::int64_t fitting : {3, 5, 37, 64, 99, 100}) {
            // One second a micro-batch: the largest that fits is the fastest.
            Job job{.peak = [=](std::int64_t b) { return scale * (1000 + 10 * b); }};
            const std::int64_t budget = scale * (1000 + 10 * fitting);
            Probe probe = job.probe(100, budget);
            expect_sound(job, probe, 100, budget);
            EXPECT_TRUE(std::count(job.asked.begin(), job.asked.end(), fitting)) << fitting;
            EXPECT_EQ(std::count(job.asked.begin(), job.asked.end(), fitting + 1), 0) << fitting;

            probe = job.probe(100, budget - 1);
            expect_sound(job, probe, 100, budget - 1);
            EXPECT_EQ(*std::max_element(job.asked.begin(), job.asked.end()), fitting - 1);
        }
    }
}

TEST(Probe, NeverAsksForASizeThatIsPredictedNotToFit) {
    std::mt19937_64 random(1);
    for (int trial = 0; trial < 2000; ++trial) {
        const auto draw = [&](std::int64_t low, std::int64_t high) {
            return std::uniform_int_distribution<std::int64_t>(low, high)(random);
        };
        const std::int64_t fixed = draw(1, 1'000'000'000), each = draw(0, 10'000'000), batch = draw(1, 5000);
        const std::int64_t budget = fixed + each * draw(1, batch) + draw(0, each);
        const double ideal = std::exp(static_cast<double>(draw(0, 800)) / 100);  // micro-batch of least time per sample
        Job job{.peak = [=](std::int64_t b) { return fixed + each * b; },
                .seconds = [=](std::int64_t b) { return b * (1 + std::abs(std::log(b / ideal))); }};
        const Probe probe = job.probe(batch, budget);
        expect_sound(job, probe, batch, budget);
        for (const std::int64_t b : job.asked) {
            EXPECT_TRUE(b <= 2 || job.peak(b) <= budget) << b << ": " << job.peak(b) << " of " << budget;
        }
        for (const Candidate& candidate : probe.candidates) {
            if (candidate.micro_batch <= 2 || each == 0) continue;
            // Two points make an affine function exact; three roundings of fp64 may add a byte.
            EXPECT_NEAR(candidate.predicted_peak_bytes, job.peak(candidate.micro_batch), 1);
        }
    }
}

TEST(Probe, NeverTakesASizeWhoseMeasuredPeakIsOverTheBudget) {
    std::mt19937_64 random(2);
    std::uniform_int_distribution<std::int64_t> place(2, 200), height(0, 5000), noise(0, 300);
    int jumped = 0;
    for (int trial = 0; trial < 2000; ++trial) {
        // From `jump` on another kernel needs a workspace, which no line through 1 and 2 foretells.
        const std::int64_t jump = place(random), extra = height(random), salt = noise(random);
        Job job{.peak = [=](std::int64_t b) { return 1000 + 10 * b + (b >= jump ? extra : 0) + b * salt % 301; }};
        const std::int64_t budget = 1500 + place(random) * 10, batch = place(random);
        const Probe probe = job.probe(batch, budget);
        expect_sound(job, probe, batch, budget);
        for (const Candidate& c : probe.candidates) jumped += c.measured && !c.fits && c.micro_batch > 2 ? 1 : 0;
    }
    EXPECT_GT(jumped, 100) << "no job was harder than a line";
}

TEST(Probe, ListsTheWholeBatchThatDoesNotFit) {
    for (const std::int64_t batch : {3, 7, 100, 1000}) {
        Job job;
        const Probe probe = job.probe(batch, 1020);  // 2 fit
        expect_sound(job, probe, batch, 1020);
        EXPECT_EQ(chosen(probe).micro_batch, 2);
        const Candidate& native = probe.candidates.back();
        EXPECT_EQ(native.micro_batch, batch);
        EXPECT_EQ(native.micro_batches, 1);
        EXPECT_FALSE(native.fits);
        EXPECT_FALSE(native.measured.has_value());
        EXPECT_EQ(native.step_seconds, 0.0);
        EXPECT_EQ(native.predicted_peak_bytes, 1000 + 10 * batch);
    }
}

TEST(Probe, TakesOneWhereOneAloneFits) {
    for (const std::int64_t batch : batches) {
        Job job;
        const Probe probe = job.probe(batch, 1010);
        expect_sound(job, probe, batch, 1010);
        EXPECT_EQ(chosen(probe).micro_batch, 1);
    }
}

TEST(Probe, SaysHowMuchTheSmallestMicroBatchNeeds) {
    for (const std::int64_t batch : batches) {
        Job job{.peak = [](std::int64_t b) { return b * (std::int64_t{3} << 30); }};
        const std::string message =
            error_message(ErrorKind::does_not_fit, [&] { job.probe(batch, std::int64_t{2} << 30); });
        EXPECT_NE(message.find("needs 3 GiB"), std::string::npos) << message;
        EXPECT_NE(message.find("2 GiB"), std::string::npos) << message;
        EXPECT_EQ(job.asked, std::vector<std::int64_t>{1});  // a larger one is no use
    }
}

TEST(Probe, SaysHowMuchIsMissingWhereItIsLittle) {
    Job job{.peak = [](std::int64_t b) { return (std::int64_t{3} << 30) + (b << 20); }};
    const std::string message = error_message(ErrorKind::does_not_fit, [&] { job.probe(8, std::int64_t{3} << 30); });
    EXPECT_EQ(message.find("needs 3 GiB, the memory budget is 3 GiB"), std::string::npos) << message;
}

TEST(Probe, ATieOfTwoPercentGoesToTheSmallerMicroBatch) {
    for (const auto& [gain, expected] : {std::pair{0.01, 1}, {0.03, 2}}) {
        Job job{.seconds = [gain = gain](std::int64_t b) { return b == 2 ? 2 * (1 - gain) : 1.0; },
                .update_seconds = 0.0};
        EXPECT_EQ(chosen(job.probe(2, unlimited)).micro_batch, expected) << gain;
    }
    // A tie is one with the fastest, not with a neighbour: 1, 0.985 and 0.97 seconds a sample.
    Job job{.seconds = [](std::int64_t b) { return static_cast<double>(b) * (1 - 0.015 * std::log2(b)); },
            .update_seconds = 0.0};
    EXPECT_EQ(chosen(job.probe(4, unlimited)).micro_batch, 2);
}

TEST(Probe, DoublesForAsLongAsTheTimePerSampleFalls) {
    // 2.5 % a doubling, 14 % in six.
    Job job{.seconds = [](std::int64_t b) { return static_cast<double>(b) * std::pow(0.975, std::log2(b)); },
            .update_seconds = 0.0};
    EXPECT_EQ(chosen(job.probe(64, unlimited)).micro_batch, 64);
}

TEST(Probe, ABatchAtTheEndOfInt64IsCutLikeAnyOther) {
    Job job{.peak = [](std::int64_t) { return std::int64_t{1000}; }};
    const Probe probe = job.probe(unlimited, 2000);
    EXPECT_EQ(chosen(probe).micro_batch, unlimited);
    EXPECT_LE(job.asked.size(), 66u);
}

TEST(Probe, CountsTheUpdateOncePerStepWhateverTheCut) {
    // An update of 100 seconds makes 1 % of a difference: a tie, where without it 2 would be twice as fast.
    Job job{.update_seconds = 100.0};
    EXPECT_EQ(chosen(job.probe(2, unlimited)).micro_batch, 1);
    job.update_seconds = 0.0;
    EXPECT_EQ(chosen(job.probe(2, unlimited)).micro_batch, 2);
}

TEST(Probe, FitsTheMemoryModelToAllThatWasMeasured) {
    Job job;
    const Probe probe = job.probe(1000, 3000);
    EXPECT_NEAR(probe.memory.fixed_bytes, 1000, 1e-6);
    EXPECT_NEAR(probe.memory.bytes_per_sample, 10, 1e-9);
    std::vector<MemoryPoint> points;
    Job curved{.peak = [](std::int64_t b) { return 1000 + b * b; }};
    const Probe bent = curved.probe(64, unlimited);
    for (const std::int64_t b : curved.asked) points.push_back({b, curved.peak(b)});
    EXPECT_NEAR(bent.memory.bytes_per_sample, fit_memory(points).bytes_per_sample, 1e-9);
}

TEST(Probe, ACoarseClockThatReadsZeroStillEndsInAChoice) {
    Job job{.seconds = [](std::int64_t) { return 0.0; }, .update_seconds = 0.0};
    const Probe probe = job.probe(1000, 2000);
    ASSERT_TRUE(chosen(probe).measured.has_value());
    EXPECT_LE(chosen(probe).measured->peak_bytes, 2000);
    EXPECT_LE(job.asked.size(), 13u);
}

TEST(Probe, PassesOnWhatMeasureThrows) {
    for (const std::int64_t bad : {1, 2, 4}) {
        EXPECT_THROW(probe_micro_batches(64, unlimited,
                                         [&](std::int64_t b) {
                                             if (b == bad) throw std::domain_error("loss function");
                                             return Measurement{b, 1000 + b, 1.0, 0.0};
                                         }),
                     std::domain_error);
    }
}

TEST(Probe, RefusesAnEmptyBatchAndNoBudget) {
    Job job;
    expect_usage_error({"batch", "0"}, [&] { job.probe(0, 1000); });
    expect_usage_error({"batch", "-3"}, [&] { job.probe(-3, 1000); });
    expect_usage_error({"budget", "0"}, [&] { job.probe(10, 0); });
    expect_usage_error({"budget", "-5"}, [&] { job.probe(10, -5); });
    EXPECT_TRUE(job.asked.empty());
}

}  // namespace
}  // namespace microbatch
