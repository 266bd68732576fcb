// The log of a resumed run has the lines of the steps that remain, and no others.
#include <gtest/gtest.h>
#include <sys/stat.h>

#include <algorithm>
#include <random>
#include <string>
#include <vector>

#include "microbatch/run/run_log.h"
#include "microbatch/run/trainer.h"
#include "support/errors.h"
#include "support/faulty_files.h"
#include "support/temp_folder.h"

namespace microbatch {
namespace {

using namespace test;
namespace fs = std::filesystem;

TrainerReport report_of(std::int64_t step, const std::string& reason = {}) {
    TrainerReport report;
    report.step = {
        .loss = 1.0 / static_cast<double>(step), .plan = {.micro_batch = 2}, .applied = true, .reason = reason};
    report.progress = {.steps = step, .samples = 7 * step, .tokens = 7 * step};
    report.seconds = 0.5;
    return report;
}

void write_step(RunLog& log, std::int64_t step, const std::string& reason = {}) {
    EXPECT_EQ(log.write(record_of(report_of(step, reason), {.peak_bytes = 1000})), "");
}

std::string log_of(const TempFolder& folder) {
    return read_file(folder.path() / "metrics.jsonl");
}

void write_log(const TempFolder& folder, const std::string& content) {
    folder.write("metrics.jsonl", content);
}

/// Of a run of so many steps.
std::string make_log(std::int64_t steps) {
    const TempFolder folder;
    RunLog log(folder.path());
    for (std::int64_t step = 1; step <= steps; ++step) write_step(log, step);
    return log_of(folder);
}

std::string first_lines(const std::string& log, std::int64_t count) {
    std::size_t end = 0;
    for (; count > 0; --count) end = log.find('\n', end) + 1;
    return log.substr(0, end);
}

TEST(RunLogResume, DropsTheLinesAfterTheCheckpointAndContinues) {
    const std::string whole = make_log(10);
    for (std::int64_t steps = 0; steps <= 10; ++steps) {
        const TempFolder folder;
        write_log(folder, whole);
        {
            RunLog log(folder.path(), steps);
            EXPECT_EQ(log.lines(), steps);
            EXPECT_EQ(log_of(folder), first_lines(whole, steps));
            for (std::int64_t step = steps + 1; step <= 10; ++step) write_step(log, step);
            EXPECT_EQ(log.lines(), 10);
        }
        EXPECT_EQ(log_of(folder), whole);
        EXPECT_EQ(read_run_log(folder.path()).steps.size(), 10U);
    }
}

TEST(RunLogResume, HalfALastLineGoesWhereverItEnds) {
    const std::string whole = make_log(4);
    const std::size_t third = first_lines(whole, 3).size();
    for (std::size_t size = third; size < whole.size(); ++size) {
        for (const std::int64_t steps : {3, 4, 100}) {
            const TempFolder folder;
            write_log(folder, whole.substr(0, size));
            RunLog log(folder.path(), steps);
            EXPECT_EQ(log.lines(), 3);
            EXPECT_EQ(log_of(folder), first_lines(whole, 3));
        }
    }
}

TEST(RunLogResume, AnInvalidLineIsDroppedAndThoseAfterItStay) {
    const std::string whole = make_log(6);
    const std::string second = first_lines(whole, 2), rest = whole.substr(first_lines(whole, 3).size());
    for (const std::string& line :
         {std::string(), std::string(300, '\0'), std::string("garbage"), std::string("{\"step\":3"),
          std::string("{\"step\":3}"), std::string("{\"step\":3,\"a\":\xff}"), std::string("{\"step\":3,\"a\":1}}"),
          std::string("{\"step\":33,\"a\":1}"), std::string("{\"step\":-3,\"a\":1}"),
          std::string("{\"step\":99999999999999999999,\"a\":1}"), std::string("{\"step\": 3,\"a\":1"),
          std::string("{\"step\":2,\"a\":1}")}) {
        const TempFolder folder;
        write_log(folder, second + line + "\n" + rest);
        for (int resumed = 0; resumed < 2; ++resumed) {  // and the next process finds no other
            RunLog log(folder.path(), 6);
            EXPECT_EQ(log.lines(), 5) << line;
            EXPECT_EQ(log_of(folder), second + rest);
        }
    }
}

TEST(RunLogResume, AnExtremelyLongTailIsDropped) {
    const std::string whole = make_log(3);
    for (const char fill : {'\0', 'x', '\n'}) {
        const TempFolder folder;
        write_log(folder, whole + std::string(3'000'000, fill));
        EXPECT_EQ(RunLog(folder.path(), 5).lines(), 3);
        EXPECT_EQ(log_of(folder), whole);
    }
}

TEST(RunLogResume, AnExtremelyLongLineDropsNoLineAfterIt) {
    const std::string whole = make_log(6), third = first_lines(whole, 3);
    for (const std::size_t size : {1'000'000, 1'048'576, 1'048'577, 2'097'152, 3'000'000}) {
        const TempFolder folder;
        write_log(folder, third + std::string(size, '\0') + "\n" + whole.substr(third.size()));
        EXPECT_EQ(RunLog(folder.path(), 6).lines(), 6);
        EXPECT_EQ(log_of(folder), whole);
    }
}

TEST(RunLogResume, WhereItCannotBeMendedItIsUnchanged) {
    const std::string whole = make_log(6), third = first_lines(whole, 3);
    const std::string damaged = third + "garbage\n" + whole.substr(third.size());
    for (const Fault fault : {Fault::error, Fault::half_error}) {
        for (int n = 1;; ++n) {
            SCOPED_TRACE(::testing::Message() << "operation " << n);
            const TempFolder folder, attic;
            write_log(folder, damaged);
            FaultyFiles files(attic.path(), n, fault);
            try {
                EXPECT_EQ(RunLog(folder.path(), 6, files).lines(), 6);
            } catch (const Error& error) {
                EXPECT_EQ(error.kind(), ErrorKind::not_written);
            }
            const std::string found = log_of(folder);
            EXPECT_TRUE(found == damaged || found == whole) << found;
            EXPECT_EQ(RunLog(folder.path(), 6).lines(), 6);
            EXPECT_EQ(log_of(folder), whole);
            if (files.operations() < n) {
                EXPECT_GT(n, 5);
                break;
            }
        }
    }
}

TEST(RunLogResume, MissingStepsAreReported) {
    const std::string whole = make_log(6);
    const TempFolder without_first, shorter, none;
    const std::string from_second = whole.substr(first_lines(whole, 1).size());
    write_log(without_first, from_second);
    EXPECT_EQ(RunLog(without_first.path(), 4).lines(), 3);
    EXPECT_EQ(log_of(without_first), first_lines(from_second, 3));
    write_log(shorter, first_lines(whole, 3));
    EXPECT_EQ(RunLog(shorter.path(), 4).lines(), 3);
    RunLog log(none.path() / "run", 4);  // no log at all
    EXPECT_EQ(log.lines(), 0);
    write_step(log, 5);
    EXPECT_EQ(log.lines(), 1);
    EXPECT_NE(read_file(none.path() / "run" / "metrics.jsonl").find("{\"step\":5,"), std::string::npos);
}

TEST(RunLogResume, ALongLogWithLinesOfAnyLengthIsTruncatedAtAStep) {
    const TempFolder folder;
    std::mt19937 random(1);
    std::vector<std::uint64_t> ends{0};
    {
        RunLog log(folder.path());
        for (std::int64_t step = 1; step <= 3000; ++step) {
            // 5 MB in all, with some lines longer than most.
            write_step(log, step, std::string(step % 100 == 0 ? random() % 200'000 : random() % 300, 'x'));
            ends.push_back(fs::file_size(log.path()));
        }
    }
    EXPECT_GT(ends.back(), 3'000'000U);
    for (std::size_t steps = 3000; steps > 0; steps -= std::min<std::size_t>(steps, 1 + random() % 300)) {
        EXPECT_EQ(RunLog(folder.path(), static_cast<std::int64_t>(steps)).lines(), static_cast<std::int64_t>(steps));
        EXPECT_EQ(fs::file_size(folder.path() / "metrics.jsonl"), ends[steps]);
    }
}

TEST(RunLogResume, RefusesAnythingElseWithTheNameOfTheLog) {
    const std::string whole = make_log(3);
    const TempFolder links, folders, pipes;
    const fs::path outside = links.write("outside", whole);
    fs::create_symlink(outside, links.path() / "metrics.jsonl");
    expect_usage_error({"metrics.jsonl"}, [&] { RunLog(links.path(), 1); });
    EXPECT_EQ(read_file(outside), whole);
    fs::create_directory(folders.path() / "metrics.jsonl");
    ASSERT_EQ(::mkfifo((pipes.path() / "metrics.jsonl").c_str(), 0600), 0);
    for (const TempFolder* folder : {&folders, &pipes}) {
        expect_usage_error({"metrics.jsonl"}, [&] { RunLog(folder->path(), 1); });
    }
}

}  // namespace
}  // namespace microbatch
