// A state that is not one of this run's is refused, and changes nothing.
#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include <cstring>
#include <functional>
#include <limits>
#include <source_location>

#include "support/errors.h"
#include "support/rich_run.h"

namespace microbatch {
namespace {

using namespace test;

constexpr std::int64_t largest = std::numeric_limits<std::int64_t>::max();
constexpr double nan_value = std::numeric_limits<double>::quiet_NaN();
constexpr double infinity = std::numeric_limits<double>::infinity();

const TrainerState& good_state() {
    static const TrainerState state = rich_run()->taken_apart();
    return state;
}

/// Runs, some steps in, that are restored to what changes have made of a good state.
class Refused {
public:
    explicit Refused(std::string optimizer = "adamw") : optimizer_(std::move(optimizer)) {}

    void expect(const std::vector<std::string>& parts, const std::function<void(TrainerState&)>& change,
                const std::source_location& where = std::source_location::current()) const {
        const ::testing::ScopedTrace trace(where.file_name(), static_cast<int>(where.line()), "refused here");
        Training run(rich(optimizer_)), twin(rich(optimizer_));
        for (int i = 0; i < 3; ++i) {
            run.step();
            twin.step();
        }
        TrainerState state = good_state();
        change(state);
        const Named before = run.state();
        const double rate = run.optimizer().learning_rate();
        expect_error(ErrorKind::bad_data, parts, [&] { run.trainer().restore(state); });
        expect_same_bits(run.state(), before);
        expect_no_gradients(run.job().parameters);
        EXPECT_EQ(run.optimizer().learning_rate(), rate);
        EXPECT_FALSE(run.accumulator().is_paused());
        // What cannot be seen from outside shows in the steps to come, up to going back.
        for (int i = 0; i < 5; ++i) {
            const Seen seen = see_step(run);
            test::expect_same(seen, see_step(twin));
        }
    }

    /// Of a list of tensors: one missing, one too many, twice, of another shape, dtype or name.
    void expect_tensors(const std::function<StoredTensors&(TrainerState&)>& list_of, bool by_name = true,
                        const std::source_location& where = std::source_location::current()) const {
        const ::testing::ScopedTrace trace(where.file_name(), static_cast<int>(where.line()), "of this list");
        const auto change = [&](const std::function<void(StoredTensors&)>& call,
                                const std::source_location& line = std::source_location::current()) {
            expect(
                {}, [&](TrainerState& state) { call(list_of(state)); }, line);
        };
        change([](StoredTensors& list) { list.pop_back(); });
        change([](StoredTensors& list) { list.push_back(stored("another", at::ones({2}))); });
        change([](StoredTensors& list) {
            list.back() = stored(list.back().name, at::ones({3, 1, 2}, list.back().shape.scalar_type()));
        });
        change([](StoredTensors& list) {
            list.back() = stored(list.back().name, at::ones(list.back().shape.sizes(), at::kHalf));
        });
        if (!by_name) return;
        change([](StoredTensors& list) { list.back().name += "x"; });
        change([](StoredTensors& list) { list.push_back(list.front()); });
        change([](StoredTensors& list) { list.back() = list.front(); });
    }

private:
    std::string optimizer_;
};

TEST(Restore, AStateOfAnotherRunOfTheSameKindIsTaken) {
    Training run(rich());
    EXPECT_NO_THROW(run.trainer().restore(good_state()));
    EXPECT_TRUE(run.accumulator().is_paused());
}

TEST(Restore, RefusesTensorsOfAnotherModel) {
    const Refused refused;
    refused.expect_tensors([](TrainerState& state) -> StoredTensors& { return state.parameters; });
    refused.expect_tensors([](TrainerState& state) -> StoredTensors& { return state.buffers; });
    refused.expect({"2.bias", "is missing"}, [](TrainerState& state) {
        std::erase_if(state.parameters, [](const StoredTensor& one) { return one.name == "2.bias"; });
    });
    refused.expect({"no parameter other"}, [](TrainerState& state) { state.parameters[0].name = "other"; });
}

TEST(Restore, RefusesTheTensorsOfAnotherOptimizer) {
    const Refused refused;
    refused.expect_tensors([](TrainerState& state) -> StoredTensors& { return state.optimizer; }, false);
    refused.expect({}, [](TrainerState& state) { state.optimizer_counts[0] -= 1; });
    refused.expect({}, [](TrainerState& state) { state.optimizer_counts.back() = 1'000'000'000; });
    refused.expect({}, [](TrainerState& state) {
        state.optimizer_counts[0] = std::numeric_limits<std::size_t>::max();  // and the sum wraps around
        state.optimizer_counts[1] += 4;
    });
    refused.expect({}, [](TrainerState& state) {
        state.optimizer_counts.pop_back();
        state.optimizer.resize(state.optimizer.size() - 3);
    });
    refused.expect({}, [](TrainerState& state) { state.optimizer_counts.push_back(0); });
    refused.expect({}, [](TrainerState& state) { std::swap(state.optimizer.front(), state.optimizer.back()); });
    const auto change = [&](std::size_t i, const at::Tensor& tensor) {
        refused.expect({}, [&](TrainerState& state) { state.optimizer[i] = stored(state.optimizer[i].name, tensor); });
    };
    for (const std::size_t moment : {0U, 1U}) {  // of a weight of 2 x 3
        change(moment, at::zeros({}));           // smaller than what an update writes
        change(moment, at::zeros({3, 2}));
        change(moment, at::zeros({2, 3}));  // laid out in another order
    }
    change(2, at::zeros({2, 3}));  // the count of steps
    change(2, at::zeros({}, at::kDouble));
    change(2, at::zeros({}, at::kByte));
    const TrainerState sgd = rich_run(rich("sgd"))->taken_apart();
    refused.expect({}, [&](TrainerState& state) { state = sgd; });
}

TEST(Restore, RefusesWhatTorchCannotReadAsTheStateOfItsOptimizer) {
    const Refused refused("torch adamw");
    refused.expect({}, [](TrainerState&) {});
    const TrainerState good = rich_run(rich("torch adamw"))->taken_apart();
    refused.expect({}, [&](TrainerState& state) {
        state = good;
        StoredTensor& moment = state.optimizer[1];
        moment = stored(moment.name, moment.get().flatten().slice(0, 0, 1).clone());
    });
}

TEST(Restore, RefusesGeneratorsThatAreNone) {
    const Refused refused;
    refused.expect_tensors([](TrainerState& state) -> StoredTensors& { return state.generators; }, false);
    refused.expect({}, [](TrainerState& state) {
        state.generators[0] = stored("generator.0", at::full_like(state.generators[0].get(), 255));
    });
    // Whose next number is beyond the end of what it has: left of 624, position of the next.
    for (const auto& [left, next] : {std::pair<std::int32_t, std::int64_t>{624, 624}, {2, 624}, {624, 2}, {0, 1}}) {
        refused.expect({}, [left = left, next = next](TrainerState& state) {
            const at::Tensor twister = state.generators[0].get().clone();
            auto* bytes = static_cast<char*>(twister.mutable_data_ptr());
            std::memcpy(bytes + 8, &left, sizeof(left));
            std::memcpy(bytes + 16, &next, sizeof(next));
            state.generators[0] = stored("generator.0", twister);
        });
    }
}

TEST(Restore, RefusesAnotherDataset) {
    const Refused refused;
    refused.expect({"22 samples", "23"}, [](TrainerState& state) { state.dataset_size = 22; });
    refused.expect({}, [](TrainerState& state) { state.sampler.position = 23; });
    refused.expect({}, [](TrainerState& state) { state.sampler.position = -1; });
    refused.expect({}, [](TrainerState& state) { state.sampler.epoch = -1; });
}

TEST(Restore, RefusesNumbersThatNoRunHas) {
    const Refused refused;
    for (const std::int64_t bad : {std::int64_t{-1}, -largest}) {
        refused.expect({}, [bad](TrainerState& state) { state.progress.steps = bad; });
        refused.expect({}, [bad](TrainerState& state) { state.progress.samples = bad; });
        refused.expect({}, [bad](TrainerState& state) { state.progress.tokens = bad; });
        refused.expect({}, [bad](TrainerState& state) { state.last_batch = bad; });
        refused.expect({}, [bad](TrainerState& state) { state.shrunk_at = bad; });
        refused.expect({}, [bad](TrainerState& state) { state.guard->refused_in_a_row = bad; });
        refused.expect({}, [bad](TrainerState& state) { state.recovery->times = bad; });
        refused.expect({}, [bad](TrainerState& state) { state.recovery->gone_back_at = bad; });
        refused.expect({}, [bad](TrainerState& state) { state.recovery->points[0].steps = bad; });
    }
    for (const double bad : {-1.0, nan_value, infinity}) {
        refused.expect({}, [bad](TrainerState& state) { state.learning_rate = bad; });
        refused.expect({}, [bad](TrainerState& state) { state.own_rate = bad; });
        refused.expect({}, [bad](TrainerState& state) { state.noise.weight = bad < 0 ? 2.0 : bad; });
    }
    for (const double bad : {-infinity, nan_value, infinity}) {
        refused.expect({}, [bad](TrainerState& state) { state.noise.sum.variance = bad; });
        refused.expect({}, [bad](TrainerState& state) { state.noise.sum.squared_gradient = bad; });
        refused.expect({}, [bad](TrainerState& state) { state.guard->accepted.back().loss = bad; });
        refused.expect({}, [bad](TrainerState& state) { state.guard->accepted.back().gradient_norm = bad; });
        refused.expect({}, [bad](TrainerState& state) { state.guard->lowest_mean = bad; });
        refused.expect({}, [bad](TrainerState& state) { state.guard->scale = bad; });
        refused.expect({}, [bad](TrainerState& state) { state.recovery->points[0].guard.last_mean = bad; });
    }
}

TEST(Restore, RefusesSnapshotsOfAnotherModel) {
    const Refused refused;
    refused.expect_tensors([](TrainerState& state) -> StoredTensors& { return state.recovery->points[1].tensors; },
                           false);
    refused.expect({}, [](TrainerState& state) {
        for (int i = 0; i < 3; ++i) state.recovery->points.push_back(state.recovery->points[0]);
    });
    refused.expect({}, [](TrainerState& state) { state.recovery->points[1].state_counts[0] += 1; });
    refused.expect({}, [](TrainerState& state) {
        state.recovery->points[1].state_counts[0] = std::numeric_limits<std::size_t>::max();
    });
}

TEST(Restore, RefusesAnOpenBatchThatIsNone) {
    const Refused refused;
    refused.expect_tensors([](TrainerState& state) -> StoredTensors& { return state.open->buffers; }, false);
    refused.expect_tensors([](TrainerState& state) -> StoredTensors& { return state.open->generators; }, false);
    const auto gradients = [](TrainerState& state) -> StoredTensors& { return state.open->gradients; };
    refused.expect({}, [&](TrainerState& state) { gradients(state).push_back(stored("more", at::ones({2}))); });
    refused.expect({}, [&](TrainerState& state) { gradients(state).push_back(gradients(state)[0]); });
    refused.expect({}, [&](TrainerState& state) {
        gradients(state)[0] = stored(gradients(state)[0].name, at::ones({3, 1, 2}));
    });
    for (const std::int64_t bad : {std::int64_t{0}, std::int64_t{-1}, -largest}) {
        refused.expect({}, [bad](TrainerState& state) { state.open->samples = bad; });
        refused.expect({}, [bad](TrainerState& state) { state.open->plan.micro_batch = bad; });
        refused.expect({}, [bad](TrainerState& state) { state.open->so_far.micro_batches = bad; });
    }
    for (const std::int64_t bad : {std::int64_t{-1}, largest}) {  // more than there were micro-batches
        refused.expect({}, [bad](TrainerState& state) { state.open->so_far.parts.count = bad; });
    }
    refused.expect({}, [](TrainerState& state) { state.open->out_of_memory = -1; });
    for (const double bad : {-1.0, nan_value, infinity}) {
        refused.expect({}, [bad](TrainerState& state) { state.open->so_far.weight = bad; });
        refused.expect({}, [bad](TrainerState& state) { state.open->seconds = bad; });
    }
}

TEST(Restore, WhileABatchIsOpenIsAUsageError) {
    const auto run = rich_run();
    expect_usage_error({"finish"}, [&] { run->trainer().restore(good_state()); });
    EXPECT_TRUE(run->accumulator().is_paused());
}

}  // namespace
}  // namespace microbatch
