// The batch may change during a run, and the rate with it.
#include <ATen/ATen.h>

#include <cmath>

#include "microbatch/optim/adamw.h"
#include "microbatch/run/trainer.h"
#include "support/errors.h"
#include "support/models.h"

namespace microbatch {
namespace {

using namespace test;

struct Training {
    std::shared_ptr<TanhMlp> model = make_mlp(1);
    Parameters parameters = parameters_of(model);
    AdamW optimizer{{{.parameters = parameters}}, {.learning_rate = 0.01}};
    Accumulator accumulator{parameters, optimizer, {.plan = {3}}};
    TensorDataset dataset{regression_batch(23, 1)};
    Trainer trainer;

    explicit Training(TrainerOptions options)
        : trainer(accumulator, dataset, weighted_squares(model), std::move(options)) {}
};

TEST(BatchGrowth, EveryStepHasTheBatchOfItsStage) {
    Training run(
        {.batches = parse_batch_schedule("4 at 0, 8 at 10 samples, 3 at 29 samples"), .length = {36, Unit::samples}});
    std::vector<std::int64_t> sizes, micro_batches;
    while (!run.trainer.done()) {
        const TrainerReport report = run.trainer.step();
        sizes.push_back(report.samples);
        EXPECT_EQ(report.step.plan.micro_batch, 3);
    }
    EXPECT_EQ(sizes, (std::vector<std::int64_t>{4, 4, 4, 8, 8, 8}));
    EXPECT_EQ(run.trainer.progress(), (Progress{6, 36, 36}));
}

TEST(BatchGrowth, TheRateFollowsByTheRule) {
    const Schedule schedule{.shape = ScheduleShape::constant, .peak = 0.02};
    for (const auto& [rule, factor] :
         {std::pair{RateRule::sqrt, 2.0}, {RateRule::linear, 4.0}, {RateRule::none, 1.0}}) {
        Training run({.batches = parse_batch_schedule("2 at 0, 8 at 2 steps"),
                      .rate_rule = rule,
                      .length = {4, Unit::steps},
                      .schedule = schedule});
        EXPECT_DOUBLE_EQ(run.trainer.step().step.learning_rate, 0.02);
        EXPECT_DOUBLE_EQ(run.trainer.step().step.learning_rate, 0.02);
        EXPECT_DOUBLE_EQ(run.trainer.step().step.learning_rate, 0.02 * factor);
    }
}

TEST(BatchGrowth, SeesawKeepsTheWarmupAndEndsWhereTheScheduleEnds) {
    const Schedule schedule{
        .shape = ScheduleShape::cosine, .peak = 0.02, .warmup = {16, Unit::samples}, .length = {400, Unit::samples}};
    Training run({.batches = seesaw(schedule, 4, 16),
                  .rate_rule = RateRule::sqrt,
                  .length = {400, Unit::samples},
                  .schedule = schedule});
    double rate = 0.0;
    std::int64_t batch = 0;
    while (!run.trainer.done()) {
        const std::int64_t before = run.trainer.progress().samples;
        const TrainerReport report = run.trainer.step();
        EXPECT_LE(report.step.learning_rate, 0.02 * 1.0001);
        if (before >= 16 && report.samples == batch) {
            EXPECT_LE(report.step.learning_rate, rate);
        }
        EXPECT_TRUE(report.samples >= batch || run.trainer.done());
        batch = report.samples;
        rate = report.step.learning_rate;
    }
    EXPECT_EQ(run.trainer.progress().samples, 400);
}

TEST(BatchGrowth, ASmallerBatchIsNotJudgedByTheNoiseOfALargerOne) {
    Training run({.batches = parse_batch_schedule("23 at 0, 1 at 60 steps"),
                  .length = {100, Unit::steps},
                  .guard = SpikeGuardOptions{.window = 32, .least = 20}});
    while (!run.trainer.done()) EXPECT_TRUE(run.trainer.step().step.applied);
}

TEST(BatchGrowth, RefusesInvalidOptions) {
    expect_usage_error({"stage"}, [] { Training({.batches = BatchSchedule{}, .length = {1, Unit::steps}}); });
    for (const RateRule rule : {RateRule::adam_sde, RateRule::beta2_time}) {
        expect_usage_error({std::string(to_string(rule)), "betas"}, [&] {
            Training({.rate_rule = rule, .length = {1, Unit::steps}});
        });
    }
}

}  // namespace
}  // namespace microbatch
