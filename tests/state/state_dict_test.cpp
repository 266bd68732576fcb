#include "microbatch/state/state_dict.h"

#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <functional>
#include <limits>
#include <stdexcept>
#include <string>
#include <vector>

#include "microbatch/io/state_json.h"
#include "support/errors.h"
#include "support/gradients.h"
#include "support/one_thread.h"

namespace microbatch {
namespace {

using namespace test;

constexpr double nan = std::numeric_limits<double>::quiet_NaN();
constexpr double infinity = std::numeric_limits<double>::infinity();
constexpr std::int64_t largest = std::numeric_limits<std::int64_t>::max();

/// One value of every kind.
StateDict full_state() {
    StateDict state;
    const StateWriter writer(state);
    writer.section("model").put("fc.weight", at::arange(6, at::kFloat).view({2, 3}));
    writer.section("model").put("fc.bias", at::ones({2}, at::kDouble));
    writer.section("optimizer").section("fc.weight").put("0", at::zeros({2, 3}));
    const StateWriter data = writer.section("data");
    data.put("healthy", true);
    data.put("steps", 7);
    data.put("seed", std::numeric_limits<std::uint64_t>::max());
    data.put("rate", 0.1);
    data.put("name", "text");
    data.put("flags", std::vector<std::int64_t>{1, 0, 1});
    data.put("losses", std::vector<double>{2.5, -0.0});
    return state;
}

std::vector<std::string> names(const StateDict& state) {
    std::vector<std::string> result;
    for (const auto& [name, tensor] : state.tensors()) result.push_back(name);
    for (const auto& [name, scalar] : state.scalars()) result.push_back(name);
    return result;
}

template <class Call>
void expect_refused(const std::vector<std::string>& words, Call&& call) {
    expect_error(ErrorKind::bad_data, words, call);
}

TEST(StateDict, GivesBackWhatWasPutUnderItsName) {
    const StateDict state = full_state();
    const StateReader data = StateReader(state).section("data");
    EXPECT_TRUE(data.flag("healthy"));
    EXPECT_EQ(data.count("steps"), 7);
    EXPECT_EQ(data.seed("seed"), std::numeric_limits<std::uint64_t>::max());
    EXPECT_EQ(data.number("rate"), 0.1);
    EXPECT_EQ(data.word("name"), "text");
    EXPECT_EQ(data.counts("flags"), (std::vector<std::int64_t>{1, 0, 1}));
    EXPECT_EQ(data.numbers("losses"), (std::vector<double>{2.5, -0.0}));
    EXPECT_TRUE(std::signbit(data.numbers("losses")[1]));
    EXPECT_EQ(StateReader(state).section("optimizer").section("fc.weight").tensor("0").shape().sizes(),
              (at::IntArrayRef{2, 3}));
}

TEST(StateDict, ANameIsTakenOnce) {
    StateDict state = full_state();
    const std::vector<std::string> before = names(state);
    expect_usage_error({"model/fc.bias"}, [&] { state.put("model/fc.bias", StoredTensor(at::zeros({5}))); });
    expect_usage_error({"data/steps"}, [&] { state.put("data/steps", std::int64_t{8}); });
    expect_usage_error({"data/steps"}, [&] { StateWriter(state).section("data").put("steps", 8); });
    EXPECT_EQ(names(state), before);
    EXPECT_EQ(StateReader(state).section("data").count("steps"), 7);
    state.set("data/steps", std::int64_t{8});
    EXPECT_EQ(names(state), before);
    EXPECT_EQ(StateReader(state).section("data").count("steps"), 8);
    EXPECT_EQ(state.tensors().at("model/fc.bias").get().numel(), 2);
}

TEST(StateDict, ASectionIsWhatItsNamesBeginWith) {
    StateDict state = full_state();
    state.put("modelling", true);
    EXPECT_TRUE(state.has("model/"));
    EXPECT_TRUE(state.has("optimizer/fc.weight/"));
    EXPECT_FALSE(state.has("batch/"));
    EXPECT_FALSE(StateDict().has(""));
    EXPECT_EQ(state.bytes("model/"), 6 * 4 + 2 * 8);
    EXPECT_EQ(state.bytes(), 6 * 4 + 2 * 8 + 6 * 4);
    state.erase("model/");
    EXPECT_FALSE(state.has("model/"));
    EXPECT_TRUE(state.has("modelling"));
    EXPECT_TRUE(state.has("optimizer/"));
    state.erase("");
    EXPECT_TRUE(names(state).empty());
}

TEST(StateDict, MovesASectionOverAnExistingOne) {
    StateDict state = full_state();
    state.put("best/fc.bias", StoredTensor(at::zeros({9})));
    state.put("best/kept", true);
    state.move("model/", "best/");
    EXPECT_FALSE(state.has("model/"));
    EXPECT_EQ(state.tensors().at("best/fc.bias").get().numel(), 2);
    EXPECT_EQ(state.tensors().at("best/fc.weight").get().numel(), 6);
    EXPECT_TRUE(state.has("best/kept"));
    state.move("nothing/", "best/");
    EXPECT_TRUE(state.has("best/fc.bias"));
    // Into itself, and back.
    const std::vector<std::string> before = names(state);
    state.move("best/", "best/of/all/");
    EXPECT_TRUE(state.has("best/of/all/fc.bias"));
    state.move("best/of/all/", "best/");
    EXPECT_EQ(names(state), before);
}

TEST(StateDict, MergesAnotherUnderASection) {
    StateDict state = full_state();
    state.merge("copy/", full_state());
    EXPECT_EQ(names(state).size(), 2 * names(full_state()).size());
    EXPECT_EQ(StateReader(state).section("copy").section("data").count("steps"), 7);
    expect_usage_error({"copy/model/fc.bias"}, [&] { state.merge("copy/", full_state()); });
}

TEST(StateDict, SharesTensorsUntilItOwnsThem) {
    const at::Tensor shared = at::ones({3}), other = at::ones({2});
    StateDict state;
    StateWriter(state).section("model").put("shared", shared);
    StateWriter(state).section("rng").put("other", other);
    EXPECT_TRUE(state.tensors().at("model/shared").get().is_alias_of(shared));
    state.own("model/");
    shared.fill_(5);
    other.fill_(5);
    EXPECT_TRUE(at::equal(state.tensors().at("model/shared").get(), at::ones({3})));
    EXPECT_TRUE(at::equal(state.tensors().at("rng/other").get(), at::full({2}, 5.0F)));
    state.own();
    other.fill_(6);
    EXPECT_TRUE(at::equal(state.tensors().at("rng/other").get(), at::full({2}, 5.0F)));
}

TEST(StateDict, OwnsATrainedTensorWithoutItsGraph) {
    const at::Tensor parameter = at::ones({3}).requires_grad_();
    StateDict state;
    StateWriter(state).put("parameter", parameter);
    EXPECT_FALSE(state.tensors().at("parameter").get().requires_grad());
    state.own();
    EXPECT_FALSE(state.tensors().at("parameter").get().requires_grad());
}

/// A tensor elsewhere, that is counted when it is read.
StoredTensor elsewhere(const at::Tensor& value, int& reads) {
    return {at::empty_like(value, at::TensorOptions(at::kMeta)), [value, &reads] {
                ++reads;
                return value.clone();
            }};
}

TEST(StateDict, ReadsWhatIsElsewhereWhenItIsAskedFor) {
    int reads = 0;
    StateDict state;
    state.put("far/one", elsewhere(at::ones({4}), reads));
    state.put("near/two", StoredTensor(at::zeros({4})));
    EXPECT_TRUE(state.reads_files());
    EXPECT_TRUE(state.reads_files("far/"));
    EXPECT_FALSE(state.reads_files("near/"));
    EXPECT_EQ(state.bytes("far/"), 16);
    StateDict copy = state;
    EXPECT_EQ(reads, 0);
    copy.require_readable();
    EXPECT_EQ(reads, 1);
    copy.own();
    EXPECT_EQ(reads, 2);  // read, and not copied again
    EXPECT_FALSE(copy.reads_files());
    EXPECT_TRUE(at::equal(copy.tensors().at("far/one").get(), at::ones({4})));
    EXPECT_EQ(reads, 2);
    EXPECT_TRUE(state.reads_files());
}

TEST(StateDict, AReadThatFailsLeavesItUnchanged) {
    const at::Tensor live = at::ones({2});
    StateDict state;
    state.put("a", StoredTensor(live));
    state.put("b", StoredTensor(at::empty({2}, at::kMeta), []() -> at::Tensor { throw std::runtime_error("gone"); }));
    EXPECT_THROW(state.own(), std::runtime_error);
    EXPECT_TRUE(state.tensors().at("a").get().is_alias_of(live));
    EXPECT_TRUE(state.reads_files());
    EXPECT_THROW(state.require_readable(), std::runtime_error);
}

TEST(StateReader, NamesWhatIsMissing) {
    const StateDict state = full_state();
    const StateReader data = StateReader(state).section("data");
    expect_refused({"data/epoch", "missing"}, [&] { data.count("epoch"); });
    expect_refused({"data/epoch", "missing"}, [&] { data.flag("epoch"); });
    expect_refused({"data/epoch", "missing"}, [&] { data.seed("epoch"); });
    expect_refused({"data/epoch", "missing"}, [&] { data.number("epoch"); });
    expect_refused({"data/epoch", "missing"}, [&] { data.word("epoch"); });
    expect_refused({"data/epoch", "missing"}, [&] { data.counts("epoch"); });
    expect_refused({"data/epoch", "missing"}, [&] { data.numbers("epoch"); });
    expect_refused({"data/epoch", "missing"}, [&] { data.tensor("epoch"); });
    expect_refused({"model/fc.bias", "missing"}, [&] { StateReader(state).section("model").count("fc.bias"); });
    expect_refused({"data/steps", "missing"}, [&] { data.tensor("steps"); });
    EXPECT_FALSE(data.has("epoch"));
    EXPECT_TRUE(data.has("steps"));
    EXPECT_TRUE(data.exists());
    EXPECT_FALSE(StateReader(state).section("batch").exists());
}

TEST(StateReader, RefusesAValueOfAnotherType) {
    const StateDict state = full_state();
    const StateReader data = StateReader(state).section("data");
    const std::vector<std::string> all{"healthy", "steps", "seed", "rate", "name", "flags", "losses"};
    const auto only = [&](const std::vector<std::string>& good, const std::function<void(const std::string&)>& read) {
        for (const std::string& name : all) {
            if (std::find(good.begin(), good.end(), name) != good.end()) {
                EXPECT_NO_THROW(read(name)) << name;
            } else {
                expect_refused({"data/" + name}, [&] { read(name); });
            }
        }
    };
    only({"healthy"}, [&](const std::string& name) { data.flag(name); });
    only({"steps"}, [&](const std::string& name) { data.count(name); });
    only({"seed", "steps"}, [&](const std::string& name) { data.seed(name); });
    only({"rate", "steps"}, [&](const std::string& name) { data.number(name); });
    only({"rate", "steps"}, [&](const std::string& name) { data.positive(name); });
    only({"name"}, [&](const std::string& name) { data.word(name); });
    only({"flags"}, [&](const std::string& name) { data.counts(name); });
    only({"losses", "flags"}, [&](const std::string& name) { data.numbers(name); });
}

TEST(StateReader, RefusesANumberThatIsOutOfRange) {
    StateDict state;
    const StateWriter writer(state);
    writer.put("below", -1);
    writer.put("largest", largest);
    writer.put("list", std::vector<std::int64_t>{3, -2});
    for (const double value : {nan, infinity, -infinity, -1e-300}) writer.put(std::to_string(value), value);
    const StateReader reader(state);
    expect_refused({"below", "-1"}, [&] { reader.count("below"); });
    EXPECT_EQ(reader.count("below", -1), -1);
    expect_refused({"below", "-1"}, [&] { reader.seed("below"); });
    EXPECT_EQ(reader.count("largest"), largest);
    expect_refused({"largest", "1000"}, [&] { reader.count("largest", 0, 1000); });
    expect_refused({"list", "-2"}, [&] { reader.counts("list"); });
    for (const double value : {nan, infinity, -infinity, -1e-300}) {
        EXPECT_EQ(std::bit_cast<std::uint64_t>(reader.number(std::to_string(value))),
                  std::bit_cast<std::uint64_t>(value));
        expect_refused({std::to_string(value)}, [&] { reader.positive(std::to_string(value)); });
    }
}

TEST(StateReader, ReadsASectionByItself) {
    const StateDict state = full_state();
    const StateReader model = StateReader(state).section("model");
    const auto tensors = model.tensors();
    ASSERT_EQ(tensors.size(), 2u);
    EXPECT_EQ(tensors[0].first, "fc.bias");
    EXPECT_EQ(tensors[1].first, "fc.weight");
    StateDict copy = model.copy();
    EXPECT_EQ(names(copy), (std::vector<std::string>{"fc.bias", "fc.weight"}));
    EXPECT_TRUE(copy.tensors().at("fc.bias").get().is_alias_of(state.tensors().at("model/fc.bias").get()));  // shared
    EXPECT_EQ(StateReader(state).section("data").copy().scalars().size(), 7u);
    expect_refused({"model/", "not mine"}, [&] { model.refuse("", "not mine"); });
}

/// As through a checkpoint's state.json.
StateDict through_json(const StateDict& state) {
    StateDict result;
    read_scalars(scalars_to_json(state), "state.json", result);
    return result;
}

TEST(StateJson, GivesBackEveryScalarBitForBit) {
    StateDict state = full_state();
    const StateWriter writer = StateWriter(state).section("more");
    const std::vector<double> doubles{0.1, -0.0,     5e-324,   1.7976931348623157e308, 1.0, -3.0, 1e15, 123e300,
                                      nan, infinity, -infinity};
    for (std::size_t i = 0; i < doubles.size(); ++i) writer.put(std::to_string(i), doubles[i]);
    writer.put("doubles", doubles);
    writer.put("whole doubles", std::vector<double>{1.0, 2.0});
    writer.put("no doubles", std::vector<double>{});
    writer.put("no counts", std::vector<std::int64_t>{});
    writer.put("largest", largest);
    writer.put("least", std::numeric_limits<std::int64_t>::min());
    writer.put("word", "\"quoted\"\n\u00e9");
    const StateDict back = through_json(state);
    const StateReader read = StateReader(back).section("more"), data = StateReader(back).section("data");
    EXPECT_EQ(back.scalars().size(), state.scalars().size());
    const auto bits = [](double value) { return std::bit_cast<std::uint64_t>(value); };
    const std::vector<double> list = read.numbers("doubles");
    ASSERT_EQ(list.size(), doubles.size());
    for (std::size_t i = 0; i < doubles.size(); ++i) {
        EXPECT_EQ(bits(read.number(std::to_string(i))), bits(doubles[i])) << doubles[i];
        EXPECT_EQ(bits(list[i]), bits(doubles[i])) << doubles[i];
    }
    EXPECT_EQ(read.numbers("whole doubles"), (std::vector<double>{1.0, 2.0}));
    EXPECT_TRUE(read.numbers("no doubles").empty());
    EXPECT_TRUE(read.counts("no counts").empty());
    EXPECT_EQ(read.count("largest"), largest);
    EXPECT_EQ(read.count("least", std::numeric_limits<std::int64_t>::min()), std::numeric_limits<std::int64_t>::min());
    EXPECT_EQ(read.word("word"), "\"quoted\"\n\u00e9");
    EXPECT_EQ(data.seed("seed"), std::numeric_limits<std::uint64_t>::max());
    EXPECT_TRUE(data.flag("healthy"));
    EXPECT_EQ(data.counts("flags"), (std::vector<std::int64_t>{1, 0, 1}));
    EXPECT_EQ(scalars_to_json(back), scalars_to_json(state));
}

TEST(StateJson, RefusesAnInvalidState) {
    const std::vector<std::string> texts{"",
                                         "{",
                                         "[]",
                                         "7",
                                         "{\"a\":null}",
                                         "{\"a\":{}}",
                                         "{\"a\":[null]}",
                                         "{\"a\":[[1]]}",
                                         "{\"a\":[true]}",
                                         "{\"a\":[18446744073709551615]}",
                                         "{\"a\":[\"word\"]}",
                                         "{\"a\":1} and more"};
    for (const std::string& text : texts) {
        StateDict state;
        expect_refused({"state.json"}, [&] { read_scalars(text, "state.json", state); });
    }
}

TEST(StateJson, ARefusedReadOfAnUnexpectedTypeNamesTheValue) {
    StateDict state;
    read_scalars(R"({"run/steps": 1.5, "run/rate": "fast", "run/flags": [1, 2.5], "run/seed": -1})", "state.json",
                 state);
    const StateReader run = StateReader(state).section("run");
    expect_refused({"run/steps", "whole number"}, [&] { run.count("steps"); });
    expect_refused({"run/rate", "number"}, [&] { run.number("rate"); });
    expect_refused({"run/flags", "whole numbers"}, [&] { run.counts("flags"); });
    expect_refused({"run/seed", "-1"}, [&] { run.seed("seed"); });
}

}  // namespace
}  // namespace microbatch
