// A load in two phases: what is refused changes nothing.
#include "microbatch/state/stateful.h"

#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include <limits>
#include <stdexcept>
#include <string>
#include <vector>

#include "support/errors.h"
#include "support/gradients.h"
#include "support/one_thread.h"
#include "support/tensors.h"

namespace microbatch {
namespace {

using namespace test;

NamedTensors live_tensors() {
    return {{"weight", at::zeros({2, 3}).requires_grad_()},
            {"bias", at::zeros({3}, at::kDouble)},
            {"steps", at::zeros({}, at::kLong)}};
}

NamedTensors saved_tensors() {
    return {{"weight", at::arange(6, at::kFloat).view({2, 3})},
            {"bias", at::full({3}, 0.5, at::kDouble)},
            {"steps", at::full({}, 7, at::kLong)}};
}

StateDict state_with(const NamedTensors& tensors) {
    StateDict state;
    StateWriter(state).section("model").put(tensors);
    return state;
}

StateReader model_of(const StateDict& state) {
    return StateReader(state).section("model");
}

Named copies(const NamedTensors& tensors) {
    return values_of(tensors);
}

TEST(PrepareTensors, ChangesNothingBeforeTheCommit) {
    const NamedTensors live = live_tensors();
    const StateDict state = state_with(saved_tensors());
    const Commit commit = prepare_tensors(model_of(state), live, "parameter");
    expect_same_bits(copies(live), copies(live_tensors()));
    commit();
    expect_same_bits(copies(live), saved_tensors());
    EXPECT_TRUE(live[0].tensor.requires_grad());
    EXPECT_TRUE(live[0].tensor.is_leaf());
}

TEST(PrepareTensors, RefusesAMismatchAndNamesIt) {
    struct Case {
        NamedTensors saved;
        std::vector<std::string> words;
    };
    const NamedTensors good = saved_tensors();
    const auto with = [&](std::size_t i, const at::Tensor& tensor) {
        NamedTensors changed = good;
        changed[i].tensor = tensor;
        return changed;
    };
    NamedTensors missing = good, unknown = good, renamed = good;
    missing.erase(missing.begin() + 1);
    unknown.push_back({"head", at::zeros({1})});
    renamed[2].name = "Steps";
    const std::vector<Case> cases{
        {missing, {"parameter", "bias", "missing"}},
        {unknown, {"parameter", "head"}},
        {renamed, {"parameter", "Steps"}},
        {{}, {"missing"}},
        {with(0, at::zeros({3, 2})), {"weight", "[3, 2]", "[2, 3]"}},
        {with(0, at::zeros({6})), {"weight", "[6]", "[2, 3]"}},
        {with(2, at::zeros({1}, at::kLong)), {"steps", "[1]", "[]"}},
        {with(1, at::zeros({3})), {"bias", "Float", "Double"}},
    };
    for (const Case& one : cases) {
        const NamedTensors live = live_tensors();
        const StateDict state = state_with(one.saved);
        expect_error(ErrorKind::bad_data, one.words, [&] { prepare_tensors(model_of(state), live, "parameter"); });
        expect_same_bits(copies(live), copies(live_tensors()));
    }
}

TEST(PrepareTensors, AcceptsAPartIfAllowed) {
    const NamedTensors live = live_tensors();
    NamedTensors part = saved_tensors();
    part.erase(part.begin());
    const StateDict state = state_with(part);
    prepare_tensors(model_of(state), live, "gradient of", Fit::partial)();
    EXPECT_TRUE(same_bits(live[0].tensor.detach(), at::zeros({2, 3})));
    EXPECT_TRUE(same_bits(live[1].tensor, saved_tensors()[1].tensor));
    prepare_tensors(StateReader(StateDict()), live, "gradient of", Fit::partial)();
    part[0].tensor = at::zeros({4}, at::kDouble);
    const StateDict larger = state_with(part);
    expect_error(ErrorKind::bad_data, {"gradient of bias", "[4]"},
                 [&] { prepare_tensors(model_of(larger), live, "gradient of", Fit::partial); });
}

TEST(PrepareTensors, ResizesWhereThatIsAllowed) {
    for (const std::int64_t size : {0, 2, 50}) {
        const NamedTensors live{{"cache", at::zeros({4})}};
        const StateDict state = state_with({{"cache", at::ones({size})}});
        expect_error(ErrorKind::bad_data, {"cache"}, [&] { prepare_tensors(model_of(state), live, "buffer"); });
        prepare_tensors(model_of(state), live, "buffer", Fit::resize)();
        EXPECT_TRUE(at::equal(live[0].tensor, at::ones({size})));
    }
    const NamedTensors live{{"cache", at::zeros({4})}};
    const StateDict other = state_with({{"cache", at::ones({4}, at::kDouble)}});
    expect_error(ErrorKind::bad_data, {"cache", "Double"},
                 [&] { prepare_tensors(model_of(other), live, "buffer", Fit::resize); });
    const StateDict none = state_with({});
    expect_error(ErrorKind::bad_data, {"cache", "missing"},
                 [&] { prepare_tensors(model_of(none), live, "buffer", Fit::resize); });
}

TEST(PrepareTensors, KeepsEveryBitOfWhatIsNotANumber) {
    const at::Tensor odd = test::tensor_of({0x7fc00001, -0x3ffffe, 0x7f800000, 1}, at::kInt).view(at::kFloat);
    const NamedTensors live{{"odd", at::zeros({4})}};
    const StateDict state = state_with({{"odd", odd}});
    prepare_tensors(model_of(state), live, "parameter")();
    EXPECT_TRUE(same_bits(live[0].tensor, odd));
}

TEST(PrepareTensors, ReadsOneTensorAtATimeAndOnlyInTheCommit) {
    int reads = 0;
    std::vector<at::Tensor> given;
    StateDict state;
    for (const char* name : {"a", "b", "c"}) {
        const auto read = [&] {
            for (const at::Tensor& before : given) EXPECT_EQ(before.use_count(), 1);  // there is no other reference
            ++reads;
            given.push_back(at::ones({2}));
            return given.back();
        };
        state.put(name, StoredTensor(at::empty({2}, at::TensorOptions(at::kMeta)), read));
    }
    const NamedTensors live{{"a", at::zeros({2})}, {"b", at::zeros({2})}, {"c", at::zeros({2})}};
    const Commit commit = prepare_tensors(StateReader(state), live, "parameter");
    EXPECT_EQ(reads, 0);
    commit();
    EXPECT_EQ(reads, 3);
    for (const NamedTensor& one : live) EXPECT_TRUE(at::equal(one.tensor, at::ones({2})));
}

/// Two numbers that must not differ by more than one.
struct Pair final : Stateful {
    std::int64_t first = 1, second = 2;

    void save(const StateWriter& writer) const override {
        writer.put("first", first);
        writer.put("second", second);
    }
    Commit prepare(const StateReader& reader) override {
        const std::int64_t one = reader.count("first"), other = reader.count("second");
        if (one + 1 != other) reader.refuse("second", "it does not follow the first");
        return [this, one, other] {
            first = one;
            second = other;
        };
    }
};

TEST(Stateful, IsLoadedWithWhatWasSaved) {
    Pair pair, other;
    pair.first = 7;
    pair.second = 8;
    const StateDict state = state_of(pair);
    load(other, StateReader(state));
    EXPECT_EQ(other.first, 7);
    EXPECT_EQ(other.second, 8);
}

TEST(Stateful, IsUnchangedByARefusedState) {
    Pair pair;
    StateDict state = state_of(pair);
    state.erase("second");
    expect_error(ErrorKind::bad_data, {"second", "missing"}, [&] { load(pair, StateReader(state)); });
    state.put("second", std::int64_t{5});
    expect_error(ErrorKind::bad_data, {"second", "does not follow"}, [&] { load(pair, StateReader(state)); });
    EXPECT_EQ(pair.first, 1);
    EXPECT_EQ(pair.second, 2);
}

}  // namespace
}  // namespace microbatch
