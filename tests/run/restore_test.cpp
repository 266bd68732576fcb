// A state that does not match this run is refused and changes nothing, or is harmless.
#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <functional>
#include <limits>
#include <set>

#include "support/errors.h"
#include "support/rich_run.h"
#include "support/states.h"

namespace microbatch {
namespace {

using namespace test;

using Counts = std::vector<std::int64_t>;
using Numbers = std::vector<double>;

constexpr std::int64_t largest = std::numeric_limits<std::int64_t>::max();
constexpr double nan_value = std::numeric_limits<double>::quiet_NaN();
constexpr double infinity = std::numeric_limits<double>::infinity();

/// A run after some steps, into which corrupted states are loaded.
class Victim {
public:
    explicit Victim(const std::string& optimizer = "adamw")
        : good(rich_state(optimizer)), run_(rich(optimizer)), twin_(rich(optimizer)) {
        run_.accumulator().caps().remember({{1000}, {}}, {.micro_batch = 1});
        twin_.accumulator().caps().remember({{1000}, {}}, {.micro_batch = 1});
        for (int i = 0; i < 3; ++i) {
            run_.step();
            at::manual_seed(7);  // the two share the generator
            twin_.step();
        }
        before_ = run_.taken_apart();
    }
    Victim(const Victim&) = delete;

    /// What cannot be seen from outside shows in the steps to come, up to a roll-back.
    ~Victim() {
        for (int i = 0; i < 5; ++i) {
            at::manual_seed(8 + i);
            const Seen seen = see_step(run_);
            at::manual_seed(8 + i);
            test::expect_same(seen, see_step(twin_));
        }
    }

    const StateDict& good;

    /// True if the state was refused and nothing has changed. If it was accepted, a step succeeds or reports why not.
    bool refuses(const StateDict& state, const std::vector<std::string>& parts = {}) {
        try {
            load(run_.trainer(), StateReader(state));
        } catch (const Error& error) {
            EXPECT_EQ(error.kind(), ErrorKind::bad_data) << error.what();
            for (const std::string& part : parts) {
                EXPECT_NE(std::string(error.what()).find(part), std::string::npos) << error.what();
            }
            test::expect_same(state_of(run_.trainer()), before_);
            expect_no_gradients(run_.job().parameters);
            return true;
        }
        try {
            run_.step();
        } catch (const Error& error) {
            EXPECT_EQ(error.kind(), ErrorKind::usage) << error.what();  // such as a count that would leave 64 bits
        }
        load(run_.trainer(), StateReader(before_));
        return false;
    }

    void expect_refused(const StateDict& state, const std::vector<std::string>& parts = {}) {
        EXPECT_TRUE(refuses(state, parts));
    }

    Training& run() { return run_; }

private:
    Training run_, twin_;
    StateDict before_;
};

/// Names of a map that begin with `section`.
template <class Map>
std::vector<std::string> names_in(const Map& map, const std::string& section) {
    std::vector<std::string> names;
    for (const auto& [name, value] : map) {
        if (name.starts_with(section)) names.push_back(name);
    }
    EXPECT_FALSE(names.empty()) << section;
    return names;
}

/// Each tensor of the section: missing, of other sizes, another dtype, another name; and one too many.
void damage_tensors(Victim& victim, const std::string& section) {
    for (const std::string& name : names_in(victim.good.tensors(), section)) {
        SCOPED_TRACE(name);
        const at::Tensor tensor = victim.good.tensors().at(name).get();
        // A parameter may have no gradient yet.
        EXPECT_TRUE(victim.refuses(without(victim.good, name)) || name.starts_with("batch/gradient/"));
        victim.expect_refused(with(victim.good, name, at::ones({3, 1, 2}, tensor.options())));
        victim.expect_refused(with(victim.good, name, tensor.to(at::kHalf)));
        victim.expect_refused(with(without(victim.good, name), name + "x", tensor));
    }
    victim.expect_refused(with(victim.good, section + "another", at::ones({2})));
}

bool is_optional(const std::string& name) {
    return name == "data/healthy" || name.ends_with("gate/bound_diverged");
}

bool may_be_number(const std::string& name, const StateScalar& value) {
    const auto* whole = std::get_if<std::int64_t>(&value);
    const auto* number = std::get_if<double>(&value);
    // The loss of half a batch may be anything.
    const bool any = name == "batch/loss_sum" || name == "batch/noise_weight" || name == "batch/noise_squares";
    if (whole == nullptr && number == nullptr) return any && value == StateScalar(std::string("nan"));
    const bool at_least_0 =
        name.starts_with("run/") || name == "noise/weight" || name == "batch/weight" || name == "batch/seconds";
    const double found = number != nullptr ? *number : static_cast<double>(*whole);
    return any || (std::isfinite(found) && (found >= 0.0 || !at_least_0));
}

/// True if a run's state may have this value instead of that one, judging by type and sign.
bool may_be(const std::string& name, const StateScalar& good, const StateScalar& value) {
    if (name == "data/healthy") return true;  // it is for the store alone
    if (std::holds_alternative<double>(good)) return may_be_number(name, value);
    if (std::holds_alternative<Numbers>(good) && std::holds_alternative<Counts>(value)) return true;
    if (const auto* count = std::get_if<std::int64_t>(&value)) {
        const bool wanted = std::holds_alternative<std::int64_t>(good) || std::holds_alternative<std::uint64_t>(good);
        return wanted && *count >= 0;
    }
    if (std::holds_alternative<std::uint64_t>(value)) return name == "data/seed";
    if (const auto* counts = std::get_if<Counts>(&value);
        counts != nullptr && !counts->empty() && counts->front() < 0) {
        return false;
    }
    return good.index() == value.index();
}

/// Each scalar of the section: missing, of every other kind, out of range.
void damage_scalars(Victim& victim, const std::string& section) {
    const std::vector<StateScalar> values{true,
                                          false,
                                          std::int64_t{-1},
                                          std::int64_t{0},
                                          std::int64_t{3},
                                          -largest,
                                          largest,
                                          std::numeric_limits<std::uint64_t>::max(),
                                          -1.0,
                                          1.5,
                                          1e300,
                                          nan_value,
                                          infinity,
                                          -infinity,
                                          std::string("word"),
                                          std::string("nan"),
                                          Counts{},
                                          Counts{-1},
                                          Counts{1, 0},
                                          Numbers{1.5},
                                          Numbers{nan_value}};
    for (const std::string& name : names_in(victim.good.scalars(), section)) {
        SCOPED_TRACE(name);
        EXPECT_TRUE(victim.refuses(without(victim.good, name)) || is_optional(name));
        const StateScalar& good = victim.good.scalars().at(name);
        for (std::size_t i = 0; i < values.size(); ++i) {
            SCOPED_TRACE(::testing::Message() << "value " << i);
            EXPECT_TRUE(victim.refuses(with(victim.good, name, values[i])) || may_be(name, good, values[i]));
        }
    }
}

TEST(Restore, AStateOfAnotherRunOfTheSameKindIsTaken) {
    Training run(rich());
    EXPECT_NO_THROW(load(run.trainer(), StateReader(rich_state())));
    EXPECT_TRUE(run.trainer().is_paused());
    expect_same(state_of(run.trainer()), rich_state());
}

TEST(Restore, ANameThatNobodyAsksForIsHarmless) {
    Victim victim;
    StateDict more = with(victim.good, "notes/mine", StateScalar("text"));
    EXPECT_FALSE(victim.refuses(with(more, "another/tensor", at::ones({2}))));
}

TEST(Restore, AMissingSectionIsRefusedUnlessTheRunDoesNotNeedIt) {
    Victim victim;
    for (const char* section :
         {"model/", "optimizer/", "data/", "rng/", "run/", "noise/", "caps/", "gate/", "recovery/", "batch/",
          "batch/before/", "batch/before/model/", "batch/before/rng/", "recovery/0/", "recovery/1/",
          "recovery/1/model/", "recovery/1/optimizer/", "recovery/1/gate/"}) {
        StateDict state = victim.good;
        state.erase(section);
        const std::set<std::string> optional{"gate/",      "recovery/",        "batch/",
                                             "optimizer/", "recovery/1/gate/", "recovery/1/optimizer/"};
        EXPECT_EQ(victim.refuses(state), !optional.contains(section)) << section;
    }
}

TEST(Restore, RefusesTensorsOfAnotherModel) {
    Victim victim;
    damage_tensors(victim, "model/");
    victim.expect_refused(without(victim.good, "model/2.bias"), {"2.bias", "is missing"});
    victim.expect_refused(with(victim.good, "model/other", at::ones({2})), {"no parameter other"});
}

TEST(Restore, RefusesTheTensorsOfAnotherOptimizer) {
    for (const char* optimizer : {"adamw", "sgd"}) {
        Victim victim(optimizer);
        damage_tensors(victim, "optimizer/");
        damage_scalars(victim, "optimizer/");
    }
    Victim victim;
    const auto refused = [&](const std::string& number, const at::Tensor& tensor) {
        victim.expect_refused(with(victim.good, "optimizer/0.weight/" + number, tensor));
    };
    for (const char* moment : {"0", "1"}) {  // of a weight of 2 x 3
        refused(moment, at::zeros({}));      // smaller than what an update writes
        refused(moment, at::zeros({3, 2}));
        refused(moment, at::zeros({2, 3}));  // laid out in another order
    }
    refused("2", at::zeros({2, 3}));  // the count of steps
    refused("2", at::zeros({}, at::kDouble));
    refused("2", at::zeros({}, at::kByte));
    victim.expect_refused(rich_state("sgd"));
    // All tensors of a parameter, as if it had made no step yet.
    StateDict state = victim.good;
    state.erase("optimizer/0.weight/");
    victim.expect_refused(state);
}

TEST(Restore, RefusesInvalidStatesOfTorchsOptimizers) {
    const StateDict& ours = rich_state("adamw");
    Victim victim("torch adamw");
    victim.expect_refused(ours);
    damage_tensors(victim, "optimizer/");
    damage_scalars(victim, "optimizer/");
    StateDict state = victim.good;
    state.erase("optimizer/0/");
    victim.expect_refused(state);
}

TEST(Restore, RefusesInvalidGenerators) {
    Victim victim;
    damage_tensors(victim, "rng/");
    const std::string name = "rng/cpu";
    const at::Tensor good = victim.good.tensors().at(name).get();
    victim.expect_refused(with(victim.good, name, at::full_like(good, 255)));
    // Whose next number is beyond the end of what it has: left of 624, position of the next.
    for (const auto& [left, next] : {std::pair<std::int32_t, std::int64_t>{624, 624}, {2, 624}, {624, 2}, {0, 1}}) {
        const at::Tensor twister = good.clone();
        auto* bytes = static_cast<char*>(twister.mutable_data_ptr());
        std::memcpy(bytes + 8, &left, sizeof(left));
        std::memcpy(bytes + 16, &next, sizeof(next));
        victim.expect_refused(with(victim.good, name, twister));
        victim.expect_refused(with(victim.good, "batch/before/" + name, twister));
    }
}

TEST(Restore, RefusesAnotherDataset) {
    Victim victim;
    damage_scalars(victim, "data/");
    victim.expect_refused(with(victim.good, "data/size", std::int64_t{22}), {"22 samples", "23"});
    victim.expect_refused(with(victim.good, "data/position", std::int64_t{23}));
}

TEST(Restore, RefusesInvalidNumbers) {
    Victim victim;
    for (const char* section : {"run/", "noise/", "gate/", "caps/"}) damage_scalars(victim, section);
    const auto refused = [&](const char* name, const StateScalar& value) {
        SCOPED_TRACE(name);
        victim.expect_refused(with(victim.good, name, value));
    };
    refused("noise/weight", 2.0);
    refused("gate/refused_in_a_row", largest);  // more than the number of steps
    refused("caps/caps", std::int64_t{2});
    refused("caps/0/micro_batch", std::int64_t{0});
    for (const char* list : {"gate/losses", "gate/gradient_norms"}) {
        Numbers numbers = std::get<Numbers>(victim.good.scalars().at(list));
        for (const double bad : {-infinity, nan_value, infinity}) {
            numbers.back() = bad;
            refused(list, numbers);
        }
        numbers.pop_back();
        refused(list, numbers);
    }
}

TEST(Restore, RefusesSnapshotsOfAnotherModel) {
    Victim victim;
    damage_tensors(victim, "recovery/0/model/");
    damage_tensors(victim, "recovery/1/optimizer/");
    damage_scalars(victim, "recovery/");
    for (const char* name : {"recovery/times", "recovery/rolled_back_at", "recovery/0/steps", "recovery/1/steps",
                             "recovery/0/gate/refused_in_a_row"}) {
        victim.expect_refused(with(victim.good, name, largest));  // still to come
    }
    StateDict three = with(victim.good, "recovery/points", std::int64_t{3});
    three.merge("recovery/2/", StateReader(victim.good).section("recovery").section("1").copy());
    victim.expect_refused(three);
}

TEST(Restore, RefusesAnInvalidPartialBatch) {
    Victim victim;
    for (const char* section : {"batch/gradient/", "batch/before/model/", "batch/before/rng/"}) {
        damage_tensors(victim, section);
    }
    damage_scalars(victim, "batch/");
    const auto refused = [&](const char* name, std::int64_t value) {
        SCOPED_TRACE(name);
        victim.expect_refused(with(victim.good, name, value));
    };
    for (const char* name : {"batch/samples", "batch/micro_batch", "batch/micro_batches"}) refused(name, 0);
    // More than there are samples, or micro-batches.
    for (const char* name : {"batch/micro_batches", "batch/noise_count", "batch/out_of_memory"}) refused(name, largest);
    victim.expect_refused(with(victim.good, "batch/before/training_flags", Counts{1}));
}

TEST(Restore, ABatchThatIsLeftHalfWayIsReplacedByTheStatesOwn) {
    const auto run = rich_run();
    const StateDict state = run->taken_apart();
    StateDict between = state;
    between.erase("batch/");
    load(run->trainer(), StateReader(between));
    EXPECT_FALSE(run->trainer().is_paused());
    load(run->trainer(), StateReader(state));
    EXPECT_TRUE(run->trainer().is_paused());
    expect_same(state_of(run->trainer()), state);
}

TEST(Restore, WhileABatchIsOpenIsAUsageError) {
    const auto run = rich_run();
    const StateDict before = run->taken_apart();
    run->accumulator().begin();
    expect_usage_error({"finish"}, [&] { load(run->trainer(), StateReader(rich_state())); });
    run->accumulator().discard({});
    expect_same(state_of(run->trainer()), before);
}

/// A model whose buffer may change its shape, and its trainer.
struct Growing {
    struct Model : torch::nn::Module {
        at::Tensor weight = register_parameter("weight", at::ones({2}));
        at::Tensor cache = register_buffer("cache", at::zeros({2}));
    };

    Model model;
    AdamW optimizer{{{.parameters = parameters_of(model)}}};
    Accumulator accumulator{model, optimizer, {.plan = {.micro_batch = 2}}};
    TensorDataset dataset{Batch{{at::ones({4, 2})}}};
    std::function<void()> in_loss = [] {};
    bool stops = false;
    Trainer trainer{accumulator,
                    dataset,
                    [this](const Batch& micro) -> WeightedLoss {
                        in_loss();
                        return {(micro.fields[0] * model.weight).sum(), static_cast<double>(micro.size())};
                    },
                    {.batch = 4, .length = {10, Unit::steps}, .stop = [this] { return stops; }}};
};

TEST(Restore, ABufferThatChangedItsShapeIsRefusedOnSaving) {
    Growing run;
    run.trainer.step();
    const StateDict good = state_of(run.trainer);
    run.model.cache.resize_({4});
    expect_usage_error({"buffer cache", "shape"}, [&] { state_of(run.trainer); });
    run.model.cache.resize_({2});
    expect_same(state_of(run.trainer), good);
    run.model.register_buffer("later", at::zeros({1}));
    expect_usage_error({"buffer later"}, [&] { state_of(run.trainer); });
    // Before the partial batch, it had another one.
    Growing paused;
    paused.model.cache.resize_({4});
    paused.in_loss = [&] { paused.model.cache.resize_({2}); };
    paused.stops = true;
    ASSERT_TRUE(paused.trainer.step().paused);
    expect_usage_error({"buffer cache", "shape"}, [&] { state_of(paused.trainer); });
}

}  // namespace
}  // namespace microbatch
