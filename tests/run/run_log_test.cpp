#include "microbatch/run/run_log.h"

#include <gtest/gtest.h>

#include <bit>
#include <cmath>
#include <filesystem>
#include <limits>
#include <locale>
#include <nlohmann/json.hpp>
#include <random>
#include <sstream>
#include <string>
#include <vector>

#include "microbatch/run/trainer.h"
#include "support/errors.h"
#include "support/full_disk.h"
#include "support/temp_folder.h"

namespace microbatch {
namespace {

using Json = nlohmann::ordered_json;
using test::expect_usage_error;
using test::read_file;
using test::TempFolder;

constexpr double nan = std::numeric_limits<double>::quiet_NaN();
constexpr double infinity = std::numeric_limits<double>::infinity();
constexpr std::int64_t largest = std::numeric_limits<std::int64_t>::max();

/// Every line of the folder's log, which must end in a line end, as an object.
std::vector<Json> lines(const std::filesystem::path& folder) {
    const std::string all = read_file(folder / "metrics.jsonl");
    EXPECT_TRUE(all.empty() || all.back() == '\n');
    std::vector<Json> objects;
    std::istringstream in(all);
    for (std::string line; std::getline(in, line);) objects.push_back(Json::parse(line));
    return objects;
}

TrainerReport some_report() {
    TrainerReport report;
    report.step = {.loss = 2.5,
                   .weight = 640.0,
                   .gradient_norm = 0.75,
                   .learning_rate = 0.001,
                   .micro_batches = 5,
                   .plan = {.micro_batch = 2, .recompute = true},
                   .out_of_memory = 3,
                   .applied = true};
    report.progress = {.steps = 7, .samples = 70, .tokens = 4480};
    report.samples = 10;
    report.seconds = 0.125;
    return report;
}

TEST(RunLog, WritesTheseKeysInThisOrder) {
    const TempFolder folder;
    RunLog log(folder.path());
    TrainerReport report = some_report();
    report.step.update_seconds = 0.0625;
    report.step.noise = NoiseMeasure{.variance = 3.5, .squared_gradient = -0.5};
    report.noise_batch = 12.5;
    report.rolled_back_to = 4;
    log.write(record_of(report, {.peak_bytes = 1000, .predicted_peak_bytes = 1010, .predicted_step_seconds = 0.25}));
    // By hand, from some_report().
    const Json expected = {{"step", 7},
                           {"samples", 70},
                           {"tokens", 4480},
                           {"batch", 10},
                           {"loss", 2.5},
                           {"weight", 640.0},
                           {"learning_rate", 0.001},
                           {"gradient_norm", 0.75},
                           {"micro_batch", 2},
                           {"micro_batches", 5},
                           {"recompute", true},
                           {"out_of_memory", 3},
                           {"step_seconds", 0.125},
                           {"update_seconds", 0.0625},
                           {"predicted_step_seconds", 0.25},
                           {"peak_bytes", 1000},
                           {"predicted_peak_bytes", 1010},
                           {"applied", true},
                           {"reason", ""},
                           {"rolled_back_to", 4},
                           {"gradient_variance", 3.5},
                           {"squared_gradient", -0.5},
                           {"noise_batch", 12.5}};
    ASSERT_EQ(lines(folder.path()).size(), 1u);
    EXPECT_EQ(lines(folder.path())[0].dump(), expected.dump());
}

TEST(RunLog, WritesNullWhereNothingWasPredictedOrMeasured) {
    const TempFolder folder;
    RunLog log(folder.path());
    log.write(record_of(some_report(), {}));
    for (const char* key : {"rolled_back_to", "gradient_variance", "squared_gradient", "noise_batch"}) {
        EXPECT_TRUE(lines(folder.path()).at(0).at(key).is_null());
    }
    EXPECT_TRUE(lines(folder.path()).at(0).at("predicted_peak_bytes").is_null());
    EXPECT_TRUE(lines(folder.path()).at(0).at("predicted_step_seconds").is_null());
}

TEST(RunLog, WritesNumbersThatAreNotFiniteAsStrings) {
    const TempFolder folder;
    RunLog log(folder.path());
    for (const double bad : {nan, -nan, infinity, -infinity}) {
        TrainerReport report = some_report();
        report.step.loss = report.step.gradient_norm = report.step.learning_rate = report.step.weight = bad;
        report.step.applied = false;
        report.step.reason = "loss is not finite";
        log.write(record_of(report, {}));
    }
    const auto found = lines(folder.path());
    ASSERT_EQ(found.size(), 4u);
    const std::vector<std::string> expected = {"nan", "nan", "inf", "-inf"};
    for (std::size_t i = 0; i < 4; ++i) {
        for (const char* key : {"loss", "gradient_norm", "learning_rate", "weight"}) {
            EXPECT_EQ(found[i].at(key), expected[i]) << key;
        }
        EXPECT_EQ(found[i].at("applied"), false);
        EXPECT_EQ(found[i].at("reason"), "loss is not finite");
    }
}

/// A double of random bits: all exponents, denormals too.
double any_finite(std::mt19937_64& random) {
    double value = nan;
    while (!std::isfinite(value)) value = std::bit_cast<double>(random());
    return value;
}

TEST(RunLog, EveryDoubleReadsBackWithTheSameBits) {
    const TempFolder folder;
    RunLog log(folder.path());
    std::mt19937_64 random(1);
    std::vector<std::vector<double>> written = {{0.1, 1.0 / 3, 5e-324, std::numeric_limits<double>::max(), -0.0},
                                                {1e23, 2.0, 4503599627370497.5, 9007199254740993.0, 0.0}};
    while (written.size() < 300) {
        written.emplace_back();
        for (int i = 0; i < 5; ++i) written.back().push_back(any_finite(random));
    }
    for (const auto& v : written) {
        TrainerReport report = some_report();
        report.step.loss = v[0];
        report.step.weight = v[1];
        report.step.learning_rate = v[2];
        report.step.gradient_norm = v[3];
        report.seconds = v[4];
        log.write(record_of(report, {}));
    }
    const auto found = lines(folder.path());
    ASSERT_EQ(found.size(), written.size());
    for (std::size_t i = 0; i < written.size(); ++i) {
        const char* const keys[] = {"loss", "weight", "learning_rate", "gradient_norm", "step_seconds"};
        for (std::size_t k = 0; k < 5; ++k) {
            ASSERT_TRUE(found[i].at(keys[k]).is_number());
            EXPECT_EQ(std::bit_cast<std::uint64_t>(found[i].at(keys[k]).get<double>()),
                      std::bit_cast<std::uint64_t>(written[i][k]))
                << keys[k] << ' ' << written[i][k];
        }
    }
}

TEST(RunLog, KeepsTheLargestCountsToTheLastDigit) {
    const TempFolder folder;
    RunLog log(folder.path());
    TrainerReport report = some_report();
    report.progress = {.steps = largest, .samples = largest - 1, .tokens = largest - 2};
    report.step.micro_batches = largest - 3;
    report.step.plan.micro_batch = largest;
    log.write(record_of(report, {.peak_bytes = largest - 1, .predicted_peak_bytes = largest - 2}));
    const Json line = lines(folder.path()).at(0);
    EXPECT_EQ(line.at("step").get<std::int64_t>(), largest);
    EXPECT_EQ(line.at("samples").get<std::int64_t>(), largest - 1);
    EXPECT_EQ(line.at("tokens").get<std::int64_t>(), largest - 2);
    EXPECT_EQ(line.at("micro_batches").get<std::int64_t>(), largest - 3);
    EXPECT_EQ(line.at("micro_batch").get<std::int64_t>(), largest);
    EXPECT_EQ(line.at("peak_bytes").get<std::int64_t>(), largest - 1);
    EXPECT_EQ(line.at("predicted_peak_bytes").get<std::int64_t>(), largest - 2);
}

TEST(RunLog, EachLineIsReadableRightAfterWrite) {
    const TempFolder folder;
    RunLog log(folder.path());
    EXPECT_EQ(read_file(folder.path() / "metrics.jsonl"), "");
    for (std::size_t i = 1; i <= 20; ++i) {
        log.write(record_of(some_report(), {}));
        EXPECT_EQ(lines(folder.path()).size(), i);
    }
}

TEST(RunLog, AReasonWithQuotesAndLineEndsStaysOneLine) {
    const TempFolder folder;
    RunLog log(folder.path());
    const std::string reason = "the \"guard\"\nsaid\\no\t\x01 é";
    TrainerReport report = some_report();
    report.step.reason = reason;
    log.write(record_of(report, {}));
    ASSERT_EQ(lines(folder.path()).size(), 1u);
    EXPECT_EQ(lines(folder.path())[0].at("reason").get<std::string>(), reason);
}

TEST(RunLog, AReasonThatIsNotUtf8IsNoReasonToStop) {
    const TempFolder folder;
    RunLog log(folder.path());
    TrainerReport report = some_report();
    report.step.reason = "caf\xe9";
    EXPECT_NO_THROW(log.write(record_of(report, {})));
    EXPECT_EQ(lines(folder.path()).size(), 1u);
}

/// 1.234.567,5 as in German, without asking for an installed locale.
struct Commas : std::numpunct<char> {
    char do_decimal_point() const override { return ','; }
    char do_thousands_sep() const override { return '.'; }
    std::string do_grouping() const override { return "\3"; }
};

TEST(RunLog, DoesNotFollowTheLocaleOfTheProgram) {
    const TempFolder folder;
    const std::locale before = std::locale::global(std::locale(std::locale::classic(), new Commas));
    RunLog log(folder.path());
    TrainerReport report = some_report();
    report.progress.samples = 1'234'567;
    log.write(record_of(report, {}));
    std::locale::global(before);
    EXPECT_EQ(lines(folder.path()).at(0).at("samples"), 1'234'567);
    EXPECT_EQ(lines(folder.path()).at(0).at("loss"), 2.5);
}

TEST(RunLog, MakesTheFoldersThatAreMissing) {
    const TempFolder folder;
    const auto nested = folder.path() / "a" / "b c" / "run";
    RunLog log(nested);
    log.write(record_of(some_report(), {}));
    EXPECT_EQ(lines(nested).size(), 1u);
}

TEST(RunLog, RefusesAFolderThatCannotBeCreated) {
    const TempFolder folder;
    const auto file = folder.write("in_the_way", "text");
    expect_usage_error({file.string()}, [&] { RunLog{file}; });
    expect_usage_error({(file / "run").string()}, [&] { RunLog{file / "run"}; });
    EXPECT_EQ(read_file(file), "text");
}

TEST(RunLog, RefusesTheLogOfAnotherRunAndLeavesItAlone) {
    const TempFolder folder;
    const auto file = folder.write("metrics.jsonl", "{\"step\":1}\n");
    expect_usage_error({file.string()}, [&] { RunLog{folder.path()}; });
    EXPECT_EQ(read_file(file), "{\"step\":1}\n");
}

TEST(RunLog, RefusesAnythingElseWithTheNameOfTheLog) {
    const TempFolder folder, other;
    std::filesystem::create_directory(folder.path() / "metrics.jsonl");
    expect_usage_error({"metrics.jsonl"}, [&] { RunLog{folder.path()}; });
    std::filesystem::create_symlink("/dev/full", other.path() / "metrics.jsonl");
    expect_usage_error({"metrics.jsonl"}, [&] { RunLog{other.path()}; });
}

TEST(RunLog, SaysWhichFileCouldNotBeWrittenOnAFullDiskAndWritesTheLinesWhenItCan) {
    const TempFolder folder;
    RunLog log(folder.path());
    EXPECT_EQ(log.write(record_of(some_report(), {})), "");
    const std::string first = read_file(folder.path() / "metrics.jsonl");
    {
        const test::FullDisk disk(first.size() + 10);
        for (int i = 0; i < 3; ++i) {
            const std::string why = log.write(record_of(some_report(), {}));
            EXPECT_NE(why.find((folder.path() / "metrics.jsonl").string()), std::string::npos) << why;
            EXPECT_EQ(read_file(folder.path() / "metrics.jsonl"), first);  // and no half of a line
        }
        EXPECT_NE(log.flush(), "");
        EXPECT_EQ(log.lines(), 4);
    }
    EXPECT_EQ(log.write(record_of(some_report(), {})), "");
    EXPECT_EQ(lines(folder.path()).size(), 5u);
    EXPECT_EQ(log.lines(), 5);
    EXPECT_EQ(log.flush(), "");
}

}  // namespace
}  // namespace microbatch
