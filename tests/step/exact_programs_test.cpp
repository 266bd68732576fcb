// Random models: an exact batch leaves what plain torch leaves of it at once, or says why it cannot.
#include <ATen/ATen.h>
#include <gtest/gtest.h>
#include <torch/csrc/autograd/custom_function.h>

#include <cstdint>
#include <cstdlib>
#include <optional>
#include <random>
#include <string>
#include <vector>

#include "support/batch_norm.h"

namespace microbatch {
namespace {

using namespace test;
using torch::autograd::AutogradContext;
using torch::autograd::Function;
using torch::autograd::variable_list;
using torch::nn::BatchNorm1d;
using torch::nn::Module;

constexpr std::int64_t channels = 4;

/// The sine and cosine, with a gradient of its own.
struct Waves : Function<Waves> {
    static variable_list forward(AutogradContext* context, const at::Tensor& x) {
        context->save_for_backward({x});
        return {at::sin(x), at::cos(x)};
    }
    static variable_list backward(AutogradContext* context, variable_list gradients) {
        const at::Tensor x = context->get_saved_variables()[0];
        at::Tensor all = at::zeros_like(x);
        if (gradients[0].defined()) all = all + gradients[0] * at::cos(x);
        if (gradients[1].defined()) all = all - gradients[1] * at::sin(x);
        return {all};
    }
};

struct Layers {
    std::vector<torch::nn::Conv1d> convs;
    std::vector<BatchNorm1d> norms;
};

/// Some operators on a few values of one shape, drawn from a seed.
at::Tensor run_program(std::uint32_t seed, Layers& layers, const at::Tensor& x, std::string* text) {
    std::mt19937 random(seed);
    const auto below = [&](std::size_t most) { return static_cast<std::size_t>(random() % most); };
    std::vector<at::Tensor> values{layers.convs[0](x)};
    const std::size_t operators = 4 + below(16);
    std::string lines;
    for (std::size_t i = 0; i < operators; ++i) {
        const std::size_t one = values.size() - 1 - below(std::min<std::size_t>(values.size(), 3)),
                          other = below(values.size());
        at::Tensor a = values[one], b = values[other];
        const std::size_t kind = below(22);
        lines += "op " + std::to_string(kind) + " of " + std::to_string(one) + " and " + std::to_string(other) +
                 " makes " + std::to_string(values.size()) + "; ";
        const auto conv = [&] { return layers.convs[1 + below(layers.convs.size() - 1)]; };
        const auto norm = [&] { return layers.norms[below(layers.norms.size())]; };
        switch (kind) {
            case 0:
            case 1:
            case 2:
            case 3:
                values.push_back(norm()(a));
                break;
            case 4:
            case 5:
                values.push_back(conv()(a));
                break;
            case 6:
                values.push_back(norm()(conv()(a)).relu_());
                break;
            case 7:
                values.push_back(at::tanh(a));
                break;
            case 8:
                values.push_back(a + b);
                break;
            case 9:
                values.push_back(at::sin(a) * b);
                break;
            case 10:
                a.add_(b * 0.5);
                break;
            case 11:
                a.mul_(0.7);
                break;
            case 12:
                a.narrow(1, 1, 2).add_(at::cos(b).narrow(1, 0, 2));
                break;
            case 13:
                values.push_back(at::cat({a.narrow(1, 2, 2), b.narrow(1, 0, 2)}, 1));
                break;
            case 14:
                values.push_back(a.chunk(2, 1)[0].repeat({1, 2, 1}) * at::sigmoid(b));
                break;
            case 15:
                values.push_back(a.detach() * b);
                break;
            case 16:
                values.push_back(Waves::apply(a)[below(2)] + b);
                break;
            case 17: {
                const auto waves = Waves::apply(a);
                values.push_back(waves[0] + 0.5 * waves[1]);
                break;
            }
            case 18:
                values.push_back(a.transpose(1, 2).contiguous().transpose(1, 2));
                break;
            case 19:
                values.push_back(a.view_as(a));
                break;
            case 20: {
                const at::NoGradGuard no_grad;
                values.push_back(at::tanh(a));
                break;
            }
            default:
                values.push_back(Waves::apply(a.flatten(1))[0].view_as(a));
        }
    }
    if (text != nullptr) *text = lines;
    return values.back() + values[values.size() / 2];
}

Build program(std::uint32_t seed, std::string* text = nullptr) {
    return [seed, text](Module& module) -> Forward {
        Layers layers;
        for (int i = 0; i < 3; ++i) {
            layers.convs.push_back(add(module, "conv" + std::to_string(i), conv1d(channels, channels)));
            layers.norms.push_back(add(module, "norm" + std::to_string(i), BatchNorm1d(channels)));
        }
        return [seed, text, layers](const at::Tensor& x) mutable { return run_program(seed, layers, x, text); };
    };
}

/// Empty where torch itself refuses it.
std::optional<Left> native(std::uint32_t seed, const Batch& batch) {
    const Net net = make_net(program(seed));
    try {
        if (!loss_with(net)(batch).sum.requires_grad()) return std::nullopt;
        const Net fresh = make_net(program(seed));
        return left_at_once(fresh, batch, loss_with(fresh));
    } catch (const c10::Error&) {
        return std::nullopt;
    }
}

TEST(ExactPrograms, AreRightOrRefused) {
    const char* from = std::getenv("MICROBATCH_PROGRAMS_FROM");
    const char* count = std::getenv("MICROBATCH_PROGRAMS");
    const auto first = static_cast<std::uint32_t>(from == nullptr ? 0 : std::atoi(from));
    const auto last = first + static_cast<std::uint32_t>(count == nullptr ? 100 : std::atoi(count));
    const Batch batch = normed_batch({5, channels, 3});
    int right = 0, refused = 0;
    for (std::uint32_t seed = first; seed < last; ++seed) {
        const std::optional<Left> wanted = native(seed, batch);
        if (!wanted) continue;
        for (const bool recompute : {false, true}) {
            std::string text;
            const Net net = make_net(program(seed, &text));
            SCOPED_TRACE(::testing::Message() << "program " << seed << ", recompute " << recompute);
            const bool failed_before = ::testing::Test::HasFailure();
            try {
                const Left found =
                    left_by(net, batch, {.micro_batch = 2, .recompute = recompute, .batch_norm = BatchNorm::exact},
                            loss_with(net));
                expect_left(found, *wanted, 1e-10);  // a dozen layers, each of which may enlarge an error
                ++right;
            } catch (const Error& error) {
                EXPECT_EQ(error.kind(), ErrorKind::usage);
                EXPECT_NE(std::string(error.what()).find("deferred"), std::string::npos) << error.what();
                ++refused;
            } catch (const std::exception& error) {
                ADD_FAILURE() << std::string(error.what()).substr(0, 200);
            }
            if (::testing::Test::HasFailure() && !failed_before) ADD_FAILURE() << text;
        }
    }
    RecordProperty("right", right);
    RecordProperty("refused", refused);
    EXPECT_GT(right, 2 * refused);
}

}  // namespace
}  // namespace microbatch
