// Everything that a forward pass may change except gradients, saved and restored bit for bit.
#include "microbatch/model/forward_state.h"

#include <ATen/ATen.h>
#include <gtest/gtest.h>
#include <torch/nn/modules/batchnorm.h>
#include <torch/nn/modules/container/sequential.h>
#include <torch/nn/modules/dropout.h>
#include <torch/nn/modules/linear.h>

#include <algorithm>
#include <cstring>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "microbatch/models/gpt.h"
#include "support/errors.h"
#include "support/gradients.h"
#include "support/one_thread.h"
#include "support/states.h"

namespace microbatch {
namespace {

using namespace test;

at::Tensor generator_now() {
    return at::globalContext().defaultGenerator(at::kCPU).get_state();
}

/// With everything that a forward pass changes: statistics, a cache that grows, random numbers.
struct NetImpl : torch::nn::Module {
    at::Tensor forward(const at::Tensor& x) {
        if (cache.size(0) < x.size(0)) cache.resize_({x.size(0)}).fill_(static_cast<double>(x.size(0)));
        return dropout->forward(norm->forward(linear->forward(x)));
    }
    torch::nn::Linear linear = register_module("linear", torch::nn::Linear(3, 4));
    torch::nn::BatchNorm1d norm = register_module("norm", torch::nn::BatchNorm1d(4));
    torch::nn::Dropout dropout = register_module("dropout", torch::nn::Dropout(0.5));
    at::Tensor cache = register_buffer("cache", at::zeros({1}));
};
TORCH_MODULE(Net);

/// Buffers, flags and the generator, copied.
struct Seen {
    Named buffers;
    std::vector<std::int64_t> flags;
    at::Tensor generator;

    explicit Seen(const Model& model)
        : buffers(values_of(model.buffers())), flags(model.training_flags()), generator(generator_now()) {}
};

void expect_seen(const Seen& left, const Seen& right) {
    expect_same_bits(left.buffers, right.buffers);
    EXPECT_EQ(left.flags, right.flags);
    EXPECT_TRUE(same_bits(left.generator, right.generator));
}

void disturb(Net& net, std::int64_t samples) {
    net->forward(at::randn({samples, 3}));
    net->eval();
    net->dropout->train();
}

TEST(ForwardState, IsRestoredBitForBit) {
    Net net;
    net->linear->eval();
    const auto model = make_model(*net);
    for (const std::int64_t samples : {2, 5, 9}) {  // the cache grows
        const Seen before(*model);
        const StateDict state = forward_state(*model);
        disturb(net, samples);
        ASSERT_NE(model->training_flags(), before.flags);
        restore_forward_state(*model, state, /*generators=*/true);
        expect_seen(Seen(*model), before);
    }
}

TEST(ForwardState, CanLeaveTheGeneratorsWhereTheyAre) {
    Net net;
    const auto model = make_model(*net);
    const Seen before(*model);
    const StateDict state = forward_state(*model);
    disturb(net, 5);
    const at::Tensor drawn = generator_now();
    restore_forward_state(*model, state, /*generators=*/false);
    EXPECT_TRUE(same_bits(generator_now(), drawn));
    EXPECT_FALSE(same_bits(generator_now(), before.generator));
    expect_same_bits(Seen(*model).buffers, before.buffers);
    EXPECT_EQ(model->training_flags(), before.flags);
}

TEST(ForwardState, IsACopyThatLaterPassesDoNotChange) {
    Net net;
    const auto model = make_model(*net);
    const Seen before(*model);
    const StateDict state = forward_state(*model);
    for (int pass = 0; pass < 3; ++pass) disturb(net, 4 + pass);
    restore_forward_state(*model, state, true);
    for (int pass = 0; pass < 3; ++pass) disturb(net, 4 + pass);
    restore_forward_state(*model, state, true);
    expect_seen(Seen(*model), before);
}

TEST(ForwardState, IsRestoredAtTheEndOfAScopeWhateverEndsIt) {
    Net net;
    const auto model = make_model(*net);
    const Seen before(*model);
    try {
        const ForwardStateScope scope(*model);
        disturb(net, 5);
        throw std::runtime_error("the loss function fails");
    } catch (const std::runtime_error&) {
    }
    expect_seen(Seen(*model), before);
}

TEST(ForwardState, ABufferThatAForwardPassRegistersIsLeft) {
    Net net;
    const auto model = make_model(*net);
    const Seen before(*model);
    const StateDict state = forward_state(*model);
    disturb(net, 5);
    net->register_buffer("late", at::full({2}, 3.0));
    restore_forward_state(*model, state, true);
    EXPECT_TRUE(at::equal(net->named_buffers()["late"], at::full({2}, 3.0)));
    EXPECT_TRUE(same_bits(net->cache, at::zeros({1})));
    EXPECT_TRUE(same_bits(generator_now(), before.generator));
}

TEST(ForwardState, OfBareTensorsIsTheGenerators) {
    const auto model = make_model(Parameters{{"a", at::ones({2}).requires_grad_()}});
    const at::Tensor before = generator_now();
    const StateDict state = forward_state(*model);
    EXPECT_FALSE(state.has("model/"));
    EXPECT_TRUE(state.has("rng/cpu"));
    at::randn({3});
    restore_forward_state(*model, state, true);
    EXPECT_TRUE(same_bits(generator_now(), before));
}

TEST(ForwardState, OfAnotherModelIsRefusedAndChangesNothing) {
    Net net;
    const auto model = make_model(*net);
    disturb(net, 3);
    const Seen before(*model);
    const auto refused = [&](const std::vector<std::string>& words, const StateDict& state) {
        expect_error(ErrorKind::bad_data, words, [&] { prepare_forward_state(*model, StateReader(state)); });
        expect_seen(Seen(*model), before);
    };
    const StateDict good = forward_state(*model);
    refused({"norm.running_mean", "missing"}, without(good, "model/norm.running_mean"));
    refused({"training_flags", "missing"}, without(good, "training_flags"));
    refused({"rng/cpu", "missing"}, without(good, "rng/cpu"));
    refused({"other"}, with(good, "model/other", at::zeros({1})));
    refused({"norm.running_var", "Double"}, with(good, "model/norm.running_var", at::zeros({4}, at::kDouble)));
    const std::vector<std::vector<std::int64_t>> wrong{{}, {1, 1, 1}, {1, 1, 1, 1, 1}, {1, 1, -1, 1}};
    for (const std::vector<std::int64_t>& flags : wrong) {
        refused({"training_flags"}, with(good, "training_flags", StateScalar(flags)));
    }
    // What is good changes nothing before its commit, either.
    const Commit commit = prepare_forward_state(*model, StateReader(good));
    expect_seen(Seen(*model), before);
    disturb(net, 7);
    commit();
    expect_seen(Seen(*model), before);
}

/// The generator's state with so many bytes at an offset replaced.
template <class Value>
at::Tensor with_bytes(const at::Tensor& state, std::size_t offset, Value value) {
    at::Tensor changed = state.clone();
    std::memcpy(static_cast<char*>(changed.mutable_data_ptr()) + offset, &value, sizeof(value));
    return changed;
}

TEST(Generators, AnInvalidStateIsRefusedAndTheGeneratorIsUnchanged) {
    const auto model = make_model(Parameters{{"a", at::ones({2})}});
    at::manual_seed(5);
    at::randn({7});
    const at::Tensor good = generator_now();
    // The layout is the seed, then how many numbers are left before the next twist, and where the next one is.
    const std::vector<at::Tensor> states{at::Tensor(good.narrow(0, 0, good.numel() - 1)),
                                         at::zeros({8}, at::kByte),
                                         at::zeros({0}, at::kByte),
                                         at::zeros_like(good),
                                         at::full_like(good, 255),
                                         good.to(at::kChar),
                                         good.view({-1, 8}),
                                         with_bytes<std::int32_t>(good, 8, -1),
                                         with_bytes<std::int32_t>(good, 8, 1'000'000),
                                         with_bytes<std::uint64_t>(good, 16, 625),
                                         with_bytes<std::uint64_t>(good, 16, ~std::uint64_t{0})};
    for (std::size_t i = 0; i < states.size(); ++i) {
        StateDict state;
        state.put("rng/cpu", StoredTensor(states[i]));
        expect_error(ErrorKind::bad_data, {"rng/cpu", "generator"},
                     [&] { prepare_generators(*model, StateReader(state).section("rng")); });
        EXPECT_TRUE(same_bits(generator_now(), good)) << i;
    }
}

TEST(Generators, AreDrawnFromAgainWhereTheyWere) {
    const auto model = make_model(Parameters{{"a", at::ones({2})}});
    for (const int drawn : {0, 1, 100, 624, 1000}) {
        at::manual_seed(9);
        for (int i = 0; i < drawn; ++i) at::rand({1});
        StateDict state;
        save_generators(*model, StateWriter(state));
        const at::Tensor wanted = at::randn({20});
        at::rand({50});
        const Commit commit = prepare_generators(*model, StateReader(state));
        EXPECT_FALSE(same_bits(at::randn({20}), wanted));  // not before the commit
        commit();
        EXPECT_TRUE(same_bits(at::randn({20}), wanted));
    }
}

TEST(NnModule, HasTheFlagsAndBuffersOfEverySubmoduleAndTheModelItself) {
    Net net;
    const auto model = make_model(*net);
    EXPECT_EQ(model->training_flags(), (std::vector<std::int64_t>{1, 1, 1, 1}));
    net->norm->eval();
    const std::vector<std::int64_t> flags = model->training_flags();
    EXPECT_EQ(std::count(flags.begin(), flags.end(), 0), 1);
    net->eval();
    model->set_training_flags(flags);
    EXPECT_EQ(model->training_flags(), flags);
    EXPECT_FALSE(net->norm->is_training());
    EXPECT_TRUE(net->is_training());
    EXPECT_EQ(model->buffers().size(), 4u);
    EXPECT_EQ(model->parameters().size(), 4u);
    EXPECT_FALSE(model->offers_checkpointing());
}

TEST(NnModule, SwitchesTheRecomputeOfAModelThatOffersIt) {
    Gpt gpt(GptConfig{.layers = 1, .heads = 1, .width = 8, .length = 4, .vocabulary = 8});
    const auto model = make_model(*gpt);
    ASSERT_TRUE(model->offers_checkpointing());
    for (const bool on : {true, false}) {
        model->set_checkpointing(on);
        EXPECT_EQ(gpt->recomputes(), on);
    }
}

TEST(AnyModel, AcceptsAModuleAHolderASharedPointerBareTensorsOrYourOwnModel) {
    struct Own final : Model {
        Parameters parameters() const override { return {{"own", at::ones({1})}}; }
    };
    const auto names = [](const AnyModel& model) {
        std::string all;
        for (const Parameter& one : model.get()->parameters()) all += one.name + " ";
        return all;
    };
    torch::nn::LinearImpl on_the_stack(2, 2);
    const torch::nn::Linear holder(2, 2);
    const auto pointer = std::make_shared<torch::nn::LinearImpl>(2, 2);
    const at::Tensor a = at::ones({1});
    EXPECT_EQ(names(on_the_stack), "weight bias ");
    EXPECT_EQ(names(holder), "weight bias ");
    EXPECT_EQ(names(pointer), "weight bias ");
    EXPECT_EQ(names(Parameters{{"a", a}, {"again", a}}), "a ");
    EXPECT_EQ(names(std::make_shared<Own>()), "own ");
}

}  // namespace
}  // namespace microbatch
