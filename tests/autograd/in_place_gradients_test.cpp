#include "microbatch/autograd/in_place_gradients.h"

#include <torch/nn/functional/embedding.h>
#include <torch/nn/modules/activation.h>
#include <torch/nn/modules/batchnorm.h>
#include <torch/nn/modules/conv.h>
#include <torch/nn/modules/embedding.h>
#include <torch/nn/modules/linear.h>
#include <torch/nn/modules/normalization.h>
#include <torch/nn/modules/rnn.h>
#include <torch/nn/modules/transformerlayer.h>

#include <functional>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "autograd/chain.h"
#include "autograd/in_place.h"
#include "microbatch/autograd/recompute.h"
#include "support/tensors.h"

namespace microbatch {
namespace {

using namespace test;

/// A layer and what goes into it: a micro-batch of so many samples.
struct Case {
    std::string name;
    std::shared_ptr<torch::nn::Module> module;
    std::function<at::Tensor(std::int64_t)> input;
    Forward forward;
};

template <class Holder>
Case layer(std::string name, Holder holder, std::function<at::Tensor(std::int64_t)> input) {
    return {std::move(name), holder.ptr(), std::move(input),
            [holder](const at::Tensor& x) mutable { return holder->forward(x); }};
}

template <class Holder>
Case recurrent(std::string name, Holder holder) {
    return {std::move(name), holder.ptr(),
            [](std::int64_t n) {
                return at::randn({5, n, 6});
            },
            [holder](const at::Tensor& x) mutable { return std::get<0>(holder->forward(x)); }};
}

std::function<at::Tensor(std::int64_t)> numbers(std::vector<std::int64_t> sample) {
    return [sample](std::int64_t n) {
        std::vector<std::int64_t> sizes{n};
        sizes.insert(sizes.end(), sample.begin(), sample.end());
        return at::randn(sizes);
    };
}

std::function<at::Tensor(std::int64_t)> indices(std::int64_t length) {
    return [length](std::int64_t n) { return at::randint(11, {n, length}, at::kLong); };
}

std::vector<Case> every_layer() {
    using namespace torch::nn;
    std::vector<Case> cases;
    cases.push_back(layer("Linear of rows", Linear(6, 7), numbers({6})));
    cases.push_back(layer("Linear of sequences", Linear(6, 7), numbers({5, 6})));
    cases.push_back(layer("Linear without bias", Linear(LinearOptions(6, 7).bias(false)), numbers({5, 6})));
    cases.push_back(layer("Linear of one output", Linear(6, 1), numbers({6})));
    Bilinear bilinear(6, 6, 7);
    cases.push_back({"Bilinear", bilinear.ptr(), numbers({6}),
                     [bilinear](const at::Tensor& x) mutable { return bilinear->forward(x, x.square()); }});
    cases.push_back(layer("Embedding", Embedding(11, 6), indices(5)));
    cases.push_back(layer("Embedding with padding", Embedding(EmbeddingOptions(11, 6).padding_idx(3)), indices(5)));
    cases.push_back(
        layer("Embedding scaled by count", Embedding(EmbeddingOptions(11, 6).scale_grad_by_freq(true)), indices(5)));
    cases.push_back(layer("Embedding of a norm", Embedding(EmbeddingOptions(11, 6).max_norm(1.0)), indices(5)));
    cases.push_back(layer("sparse Embedding", Embedding(EmbeddingOptions(11, 6).sparse(true)), indices(5)));
    EmbeddingBag bag(11, 6);
    cases.push_back(
        {"EmbeddingBag", bag.ptr(), indices(5), [bag](const at::Tensor& x) mutable { return bag->forward(x); }});
    cases.push_back(layer("Conv1d", Conv1d(6, 7, 3), numbers({6, 9})));
    cases.push_back(layer("Conv2d", Conv2d(6, 7, 3), numbers({6, 9, 9})));
    ConvTranspose2d transposed(ConvTranspose2dOptions(6, 7, 3));
    cases.push_back({"ConvTranspose2d", transposed.ptr(), numbers({6, 5, 5}),
                     [transposed](const at::Tensor& x) mutable { return transposed->forward(x); }});
    cases.push_back(layer("LayerNorm", LayerNorm(LayerNormOptions({6})), numbers({5, 6})));
    cases.push_back(layer("GroupNorm", GroupNorm(2, 6), numbers({6, 5})));
    cases.push_back(layer("BatchNorm1d", BatchNorm1d(6), numbers({6, 5})));
    cases.push_back(layer("PReLU", PReLU(PReLUOptions().num_parameters(6)), numbers({6, 5})));
    cases.push_back(recurrent("RNN", RNN(6, 7)));
    cases.push_back(recurrent("LSTM", LSTM(6, 7)));
    cases.push_back(recurrent("GRU", GRU(6, 7)));
    MultiheadAttention attention(6, 2);
    cases.push_back({"MultiheadAttention", attention.ptr(),
                     [](std::int64_t n) {
                         return at::randn({5, n, 6});
                     },
                     [attention](const at::Tensor& x) mutable { return std::get<0>(attention->forward(x, x, x)); }});
    cases.push_back(layer("TransformerEncoderLayer",
                          TransformerEncoderLayer(TransformerEncoderLayerOptions(6, 2).dim_feedforward(9).dropout(0.1)),
                          [](std::int64_t n) {
                              return at::randn({5, n, 6});
                          }));
    return cases;
}

/// Gradients and, as the last, the inputs' gradients, of micro-batches of 3, 3 and 2 samples.
Named accumulated(const Case& a, bool on, at::ScalarType type) {
    const Parameters parameters = parameters_of(*a.module);
    at::manual_seed(2);
    clear_gradients(parameters);
    Named result;
    for (const std::int64_t samples : {3, 3, 2}) {
        at::Tensor x = a.input(samples);
        if (x.is_floating_point()) x = x.to(type).requires_grad_();
        with_scope(on, [&] { a.forward(x).square().sum().backward(); });
        if (x.is_floating_point()) result.push_back({"input", x.grad()});
    }
    for (const Parameter& gradient : gradients_of(parameters)) {
        const bool sparse = gradient.tensor.is_sparse();
        result.push_back({gradient.name, sparse ? gradient.tensor.to_dense() : gradient.tensor});
    }
    return result;
}

TEST_F(InPlace, GradientsOfEveryLayerAreThoseOfAutograd) {
    // A sum of at most 15 products in another order, and what that is multiplied by: 20 roundings of 1.1e-16 or 6e-8.
    for (const auto& [type, tolerance] : {std::pair{at::kDouble, 2e-15}, {at::kFloat, 1.2e-6}}) {
        at::manual_seed(1);
        for (const Case& a : every_layer()) {
            SCOPED_TRACE(a.name);
            a.module->to(type);
            const Named plain = accumulated(a, false, type);
            ASSERT_GT(plain.size(), 0U);
            expect_agree(accumulated(a, true, type), plain, tolerance);
        }
    }
}

TEST_F(InPlace, AWeightThatHasAGradientNeedsNoMemoryForAnother) {
    const at::Tensor x = at::randn({4, side});
    torch::nn::Linear linear(side, side);
    torch::nn::Embedding embedding(side, side);
    torch::nn::Embedding padded(torch::nn::EmbeddingOptions(side, side).padding_idx(1));
    const at::Tensor rows = test::tensor_of({1, 5, 5, 2}, at::kLong);
    const std::vector<std::pair<std::string, std::function<at::Tensor()>>> uses = {
        {"linear", [&] { return at::linear(x, linear->weight, linear->bias); }},
        {"linear without bias", [&] { return at::linear(x, linear->weight); }},
        {"linear of sequences",
         [&] {
             return at::linear(x.view({2, 2, side}), linear->weight, linear->bias);
         }},
        {"matmul",
         [&] {
             return at::matmul(x.view({2, 2, side}), linear->weight);
         }},
        {"product", [&] { return x.mm(linear->weight); }},
        {"product with the transpose", [&] { return x.mm(linear->weight.transpose(0, 1)); }},
        {"embedding", [&] { return embedding->forward(rows); }},
        {"embedding with padding", [&] { return padded->forward(rows); }},
        {"embedding by int32", [&] { return embedding->forward(rows.to(at::kInt)); }},
    };
    for (const auto& [name, use] : uses) {
        EXPECT_FALSE(sums_in_place(use)) << name << ", the first time";
        EXPECT_TRUE(sums_in_place(use)) << name;
        EXPECT_TRUE(sums_in_place(use)) << name;
        const at::Tensor outside = use();
        EXPECT_GE(growth([&] { outside.sum().backward(); }), weight_bytes) << name;
        linear->zero_grad();
        embedding->zero_grad();
        padded->zero_grad();
    }
}

TEST_F(InPlace, AFirstGradientIsStoredAsComputed) {
    const at::Tensor weight = leaf({side, side});
    const at::Tensor y = with_scope(true, [&] { return at::linear(at::ones({4, side}), weight); });
    EXPECT_LT(growth([&] { y.sum().backward(); }), 2 * weight_bytes);  // not computed in another layout and copied
}

TEST_F(InPlace, AnEmbeddingsGradientHasTheBitsOfAutogradOnTopOfZeros) {
    // On top of other numbers rows that come more than once are added one by one, not their sum.
    const auto gradient = [](bool on) {
        at::manual_seed(3);
        const at::Tensor weight = leaf({11, 6});
        weight.mutable_grad() = at::zeros({11, 6});
        const at::Tensor rows = at::randint(11, {40}, at::kLong);
        with_scope(on, [&] { (at::embedding(weight, rows, 3) * at::randn({40, 6})).sum().backward(); });
        return weight.grad();
    };
    EXPECT_TRUE(same_bits(gradient(true), gradient(false)));
}

/// The gradients of two leaves [6, 6] after three backward passes of a function of them and of x [4, 6].
using OfTwo = std::function<at::Tensor(const at::Tensor&, const at::Tensor&, const at::Tensor&)>;
Named of_two_weights(bool on, const OfTwo& function) {
    at::manual_seed(4);
    const at::Tensor v = leaf({6, 6}, at::kDouble), w = leaf({6, 6}, at::kDouble), x = leaf({4, 6}, at::kDouble);
    for (int pass = 0; pass < 3; ++pass) with_scope(on, [&] { function(x, v, w).square().sum().backward(); });
    return {{"v", v.grad()}, {"w", w.grad()}, {"x", x.grad()}};
}

TEST_F(InPlace, AWeightMayBeUsedInAnyWayAndAnyNumberOfTimes) {
    const std::vector<std::pair<std::string, OfTwo>> uses = {
        {"twice", [](auto& x, auto& v, auto&) { return x.mm(v).tanh().mm(v); }},
        {"thrice, both ways round", [](auto& x, auto& v, auto&) { return x.mm(v).mm(v.t()).tanh().mm(v.mT()); }},
        {"on the left", [](auto& x, auto& v, auto&) { return v.mm(x.t()); }},
        {"on both sides", [](auto& x, auto& v, auto&) { return x.mm(v.mm(v)); }},
        {"two in one product", [](auto& x, auto& v, auto& w) { return x.mm(v.mm(w.t())); }},
        {"also as numbers", [](auto& x, auto& v, auto&) { return x.mm(v * 2).mm(v) + v.sum(); }},
        {"also as bias", [](auto& x, auto& v, auto& w) { return at::addmm(w.narrow(0, 0, 4), x, v).mm(w); }},
        {"scaled", [](auto& x, auto& v, auto& w) { return at::addmm(w[0], x, v, 0.5, 3); }},
        {"cut", [](auto& x, auto& v, auto&) { return at::linear(x, v.narrow(0, 1, 3)); }},
        {"as tied table and head",
         [](auto&, auto& v, auto& w) {
             return at::linear(at::embedding(v, test::tensor_of({1, 0, 5}, at::kLong)).mm(w).tanh(), v);
         }},
        {"after a transpose that is none", [](auto& x, auto& v, auto&) { return x.mm(v.transpose(1, 1)); }},
        {"by columns", [](auto& x, auto& v, auto&) { return x.narrow(0, 0, 4).t().contiguous().t().mm(v); }},
        {"of no rows", [](auto& x, auto& v, auto&) { return x.narrow(0, 0, 0).mm(v).sum() + x.mm(v).sum(); }},
    };
    for (const auto& [name, use] : uses) {
        SCOPED_TRACE(name);
        const Named plain = of_two_weights(false, use);
        expect_agree(of_two_weights(true, use), plain, 1e-14);  // 100 roundings of 1.1e-16, deeper than above
        for (std::size_t i = 0; i < plain.size(); ++i) {
            if (!plain[i].tensor.defined()) continue;
            EXPECT_EQ(of_two_weights(true, use)[i].tensor.strides(), plain[i].tensor.strides());
        }
    }
}

TEST_F(InPlace, TheGradientOfAnInputHasItsLayout) {
    const at::Tensor weight = weight_with_gradient(5, 3);
    for (const bool on : {false, true}) {
        const at::Tensor x = (at::randn({5, 4}).requires_grad_() * 1).t();
        std::vector<std::int64_t> strides;
        x.register_hook([&](const at::Tensor& gradient) { strides = gradient.strides().vec(); });
        with_scope(on, [&] { x.mm(weight).sum().backward(); });
        EXPECT_EQ(strides, (std::vector<std::int64_t>{1, 4})) << on;
    }
}

TEST_F(InPlace, ARetainedGraphCanGoBackAgain) {
    const at::Tensor weight = weight_with_gradient();
    const at::Tensor before = weight.grad().clone();
    const at::Tensor x = at::ones({2, side});
    const at::Tensor y = with_scope(true, [&] { return at::linear(x, weight).sum(); });
    y.backward({}, /*retain_graph=*/true);
    y.backward();
    EXPECT_LT(relative_difference(weight.grad() - before, at::full({side, side}, 4.0F)), 1e-6);
    EXPECT_THROW(y.backward(), c10::Error);
}

TEST_F(InPlace, RecomputedBlocksSumTheirGradientsInPlaceToo) {
    const auto block = std::make_shared<torch::nn::LinearImpl>(side, side);
    const auto forward = [&] {
        return recompute([&](const at::Tensor& x) { return block->forward(x); }, at::ones({4, side}), block);
    };
    EXPECT_FALSE(sums_in_place(forward));
    const InPlaceGradients scope;
    const at::Tensor y = forward();
    EXPECT_LT(growth([&] { y.sum().backward(); }), weight_bytes);
}

TEST_F(InPlace, RecomputedBlocksKeepTheirBits) {
    const auto train = [](bool on) {
        at::manual_seed(5);
        // Large enough for either library's product.
        const auto block = std::make_shared<torch::nn::LinearImpl>(512, 256);
        const auto run = [block](const at::Tensor& x) { return block->forward(x).tanh(); };
        const InPlaceGradients scope;
        for (int pass = 0; pass < 2; ++pass) {
            const at::Tensor x = at::randn({128, 512});
            (on ? recompute(run, x, block) : run(x)).square().sum().backward();
        }
        return traces(*block);
    };
    expect_same_bits(train(true), train(false));
}

TEST_F(InPlace, EveryThreadHasScopesOfItsOwn) {
    const at::Tensor x = at::ones({4, side});
    const at::Tensor mine = weight_with_gradient(), other = weight_with_gradient();
    auto scope = std::make_unique<InPlaceGradients>();
    std::thread([&] {
        const at::Tensor y = at::linear(x, other);
        EXPECT_GE(growth([&] { y.sum().backward(); }), weight_bytes);
        scope.reset();  // of the thread that made it
        EXPECT_TRUE(sums_in_place([&] { return at::linear(x, other); }));
    }).join();
    const at::Tensor y = at::linear(x, mine);
    EXPECT_GE(growth([&] { y.sum().backward(); }), weight_bytes);
}

TEST_F(InPlace, ThreadsMayAddToTheSameWeight) {
    const at::Tensor weight = at::zeros({128, 128}).requires_grad_();
    weight.mutable_grad() = at::zeros({128, 128});
    std::vector<std::thread> threads;
    for (int i = 0; i < 4; ++i) {
        threads.emplace_back([&] {
            for (int pass = 0; pass < 500; ++pass) {
                with_scope(pass % 2 == 0, [&] { at::linear(at::ones({1, 128}), weight).sum().backward(); });
            }
        });
    }
    for (std::thread& thread : threads) thread.join();
    EXPECT_TRUE(at::equal(weight.grad(), at::full({128, 128}, 2000.0F)));  // whole numbers: exact
}

TEST_F(InPlace, ScopesNestAndMove) {
    const at::Tensor weight = weight_with_gradient(), x = at::ones({4, side});
    const auto is_on = [&] {
        const at::Tensor y = at::linear(x, weight);
        return growth([&] { y.sum().backward(); }) < weight_bytes;
    };
    {
        InPlaceGradients outer;
        { const InPlaceGradients inner; }
        EXPECT_TRUE(is_on());
        {
            const InPlaceGradients moved = std::move(outer);
            EXPECT_TRUE(is_on());
        }
        EXPECT_FALSE(is_on());
    }
    EXPECT_FALSE(is_on());
}

TEST_F(InPlace, AnExceptionInTheMiddleLeavesAllInOrder) {
    const at::Tensor weight = weight_with_gradient(), x = at::randn({4, side}).requires_grad_();
    bool fail = true;
    const auto run = [&] {
        const at::Tensor hidden = at::linear(x, weight);
        hidden.register_hook([&](const at::Tensor& gradient) {
            if (fail) throw std::runtime_error("no luck");
            return gradient;
        });
        at::linear(hidden, weight).sum().backward();
    };
    const std::int64_t live = memory_use().live_bytes;
    EXPECT_THROW(with_scope(true, run), std::runtime_error);
    EXPECT_EQ(memory_use().live_bytes, live);
    fail = false;
    const auto gradient = [&](bool on) {
        weight.mutable_grad() = at::zeros({side, side});
        with_scope(on, run);
        return weight.grad();
    };
    // 256 products a number, twice.
    EXPECT_LT(relative_difference(gradient(true), gradient(false)), 1e-5);
}

}  // namespace
}  // namespace microbatch
