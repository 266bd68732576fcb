// The cost of each part of a step, and of the same part in torch, with Google Benchmark. `bench/speed micro` runs all
// of it and makes the table. On as many threads as OMP_NUM_THREADS says:
//   micro --benchmark_filter='^(copy|adamw|sgd|norm)'   the optimizers' step beside a copy of memory
//   micro --benchmark_filter='^linear/'                 the linear layers of a block, forward and backward
//   micro --benchmark_filter='^loss/|^cross_entropy/'   the losses, forward and backward
//   micro --benchmark_filter='^allocator/'              to allocate and to free
// A name is WHAT/MODEL/ROWS/HOW or as much of it as there is; the allocator's has bytes instead of a model.
#include <ATen/Functions.h>
#include <ATen/core/Reduction.h>
#include <ATen/core/grad_mode.h>
#include <benchmark/benchmark.h>
#include <c10/core/CPUAllocator.h>
#include <fmt/format.h>
#include <torch/csrc/autograd/autograd.h>

#include <functional>
#include <map>
#include <optional>
#include <string>
#include <vector>

#include "microbatch/autograd/in_place_gradients.h"
#include "microbatch/core/units.h"
#include "microbatch/memory/budget_allocator.h"
#include "microbatch/models/gpt.h"
#include "microbatch/ops/cross_entropy.h"
#include "microbatch/ops/linear_cross_entropy.h"
#include "microbatch/optim/adamw.h"
#include "microbatch/optim/clipping.h"
#include "microbatch/optim/sgd.h"

namespace {

using namespace microbatch;
using benchmark::State;

constexpr const char* presets[] = {"gpt-tiny", "gpt-small", "gpt2"};

benchmark::internal::Benchmark* add(const std::string& name, const std::function<void(State&)>& run) {
    return benchmark::RegisterBenchmark(name.c_str(), run)->UseRealTime();
}

// ---- memory and optimizers

constexpr std::int64_t copied_bytes = std::int64_t{512} << 20;

void copy() {
    static const at::Tensor from = at::ones({copied_bytes / 4}), to = at::zeros({copied_bytes / 4});
    to.copy_(from);
}

void add_copy() {
    const auto run = [](State& state) {
        for (auto _ : state) copy();
        state.SetBytesProcessed(state.iterations() * 2 * copied_bytes);  // read and written
    };
    add("copy", run)->Iterations(3);
}

// A model's parameters with gradients, our optimizers of them, and what torch's kernels ask for.
struct Training {
    explicit Training(const std::string& preset) : parameters(parameters_of(Gpt(gpt_preset(preset)))) {
        const at::NoGradGuard no_grad;
        for (const Parameter& parameter : parameters) {
            parameter.tensor.mutable_grad() = at::randn_like(parameter.tensor);
            p.push_back(parameter.tensor);
            g.push_back(parameter.tensor.grad());
            m.push_back(at::zeros_like(parameter.tensor));
            v.push_back(at::zeros_like(parameter.tensor));
            steps.push_back(at::zeros({}));
            count += parameter.tensor.numel();
        }
    }

    void torch_adamw(const std::optional<at::Tensor>& divided_by) {
        at::_foreach_add_(steps, one);
        at::_fused_adamw_(p, g, m, v, {}, steps, 1e-4, 0.9, 0.999, 0.1, 1e-8, false, false, divided_by);
    }

    void torch_sgd() { at::_fused_sgd_(p, g, m, 0.0, 0.9, 1e-4, 0.0, false, false, false); }

    Parameters parameters;
    std::vector<at::Tensor> p, g, m, v, steps;  // m is SGD's momentum, too
    std::int64_t count = 0;
    at::Tensor one = at::ones({}), scale = at::empty({});
    AdamW adamw{split_by_decay(parameters, 0.1), {.learning_rate = 1e-4}};
    Sgd sgd{{{parameters}}, {.learning_rate = 1e-4, .momentum = 0.9}};
};

// Kept for all repetitions: to make GPT-2 takes longer than to measure it.
Training& training(const std::string& preset) {
    static std::map<std::string, Training> made;
    return made.try_emplace(preset, preset).first->second;
}

// So near 1 that gradients which are divided again and again stay what they are like.
constexpr double divisor = 1.0001;

// A copy far larger than most caches before each run leaves little in them, as a step's backward pass does.
void add_pass(const std::string& what, const std::string& preset, const std::string& how, std::int64_t bytes_a_number,
              void (*pass)(Training&)) {
    const auto run = [=](State& state) {
        const at::NoGradGuard no_grad;
        Training& model = training(preset);
        pass(model);  // makes the state
        for (auto _ : state) {
            state.PauseTiming();
            copy();
            state.ResumeTiming();
            pass(model);
        }
        state.SetBytesProcessed(state.iterations() * bytes_a_number * model.count);
    };
    add(fmt::format("{}/{}/{}", what, preset, how), run)->Iterations(3);
}

// AdamW reads parameter, gradient and two moments and writes all but the gradient; SGD has one moment.
void add_optimizers(const std::string& preset) {
    add_pass("adamw", preset, "ours", 28, [](Training& model) { model.adamw.step(divisor); });
    add_pass("adamw", preset, "division", 28, [](Training& model) {
        at::_foreach_div_(model.g, divisor);
        model.torch_adamw(std::nullopt);
    });
    add_pass("adamw", preset, "grad_scale", 28, [](Training& model) { model.torch_adamw(model.scale.fill_(divisor)); });
    add_pass("sgd", preset, "ours", 20, [](Training& model) { model.sgd.step(divisor); });
    add_pass("sgd", preset, "division", 20, [](Training& model) {
        at::_foreach_div_(model.g, divisor);
        model.torch_sgd();
    });
    add_pass("norm", preset, "ours", 4, [](Training& model) { benchmark::DoNotOptimize(joint_norm(model.g)); });
}

// ---- linear layers

struct Layer {
    Layer(std::int64_t rows, std::int64_t inputs, std::int64_t outputs)
        : input(at::randn({rows, inputs}).requires_grad_()),
          weight((at::randn({outputs, inputs}) * 0.02).requires_grad_()),
          bias(at::zeros({outputs}).requires_grad_()),
          output_gradient(at::randn({rows, outputs})) {
        weight.mutable_grad() = at::zeros({outputs, inputs});
        bias.mutable_grad() = at::zeros({outputs});
    }

    at::Tensor input, weight, bias, output_gradient;
};

std::vector<Layer> layers_of_block(std::int64_t rows, std::int64_t width) {
    return {{rows, width, 3 * width}, {rows, width, width}, {rows, width, 4 * width}, {rows, 4 * width, width}};
}

void forward_and_backward(std::vector<Layer>& layers) {
    std::vector<at::Tensor> outputs, gradients;
    for (Layer& layer : layers) {
        layer.input.mutable_grad() = at::Tensor();  // of activations: created again in every micro-batch, never summed
        outputs.push_back(at::linear(layer.input, layer.weight, layer.bias));
        gradients.push_back(layer.output_gradient);
    }
    torch::autograd::backward(outputs, gradients);
}

void add_linear(const std::string& preset, std::int64_t rows, bool in_place) {
    const auto run = [=](State& state) {
        std::vector<Layer> layers = layers_of_block(rows, gpt_preset(preset).width);
        std::optional<InPlaceGradients> scope;
        if (in_place) scope.emplace();
        for (auto _ : state) forward_and_backward(layers);
    };
    add(fmt::format("linear/{}/{}/{}", preset, rows, in_place ? "ours" : "autograd"), run);
}

// ---- losses

using Loss = std::function<at::Tensor(const at::Tensor& hidden, const at::Tensor& weight, const at::Tensor& targets)>;

void add_loss(const std::string& preset, std::int64_t rows, const std::string& how, const Loss& loss) {
    const auto run = [=](State& state) {
        const GptConfig config = gpt_preset(preset);
        const at::Tensor hidden = at::randn({rows, config.width}).requires_grad_();
        const at::Tensor weight = (at::randn({config.vocabulary, config.width}) * 0.02).requires_grad_();
        const at::Tensor targets = at::randint(config.vocabulary, {rows}, at::kLong);
        for (auto _ : state) {
            hidden.mutable_grad() = weight.mutable_grad() = at::Tensor();
            loss(hidden, weight, targets).backward();
        }
    };
    add(fmt::format("loss/{}/{}/{}", preset, rows, how), run);
}

void add_losses(const std::string& preset, std::int64_t rows, const std::vector<std::int64_t>& chunk_mebibytes) {
    add_loss(preset, rows, "plain", [](const at::Tensor& hidden, const at::Tensor& weight, const at::Tensor& targets) {
        return cross_entropy_sum(at::linear(hidden, weight), targets);
    });
    for (const std::int64_t mebibytes : chunk_mebibytes) {
        add_loss(preset, rows, fmt::format("ours, {} MiB", mebibytes),
                 [=](const at::Tensor& hidden, const at::Tensor& weight, const at::Tensor& targets) {
                     return linear_cross_entropy_sum(hidden, weight, targets, -100, mebibytes << 20);
                 });
    }
}

void add_cross_entropy(std::int64_t rows, const std::string& how,
                       at::Tensor (*loss)(const at::Tensor& logits, const at::Tensor& targets)) {
    const auto run = [=](State& state) {
        const std::int64_t classes = gpt_preset("gpt-tiny").vocabulary;
        const at::Tensor logits = at::randn({rows, classes}).requires_grad_();
        const at::Tensor targets = at::randint(classes, {rows}, at::kLong);
        for (auto _ : state) {
            logits.mutable_grad() = at::Tensor();
            loss(logits, targets).backward();
        }
    };
    add(fmt::format("cross_entropy/gpt-tiny/{}/{}", rows, how), run);
}

void add_cross_entropies(std::int64_t rows) {
    add_cross_entropy(rows, "ours", [](const at::Tensor& logits, const at::Tensor& targets) {
        return cross_entropy_sum(logits, targets);
    });
    add_cross_entropy(rows, "torch", [](const at::Tensor& logits, const at::Tensor& targets) {
        return at::cross_entropy_loss(logits, targets, {}, at::Reduction::Sum);
    });
}

// ---- the allocator

void add_allocator(std::int64_t bytes, const std::string& how, c10::Allocator* allocator) {
    const auto run = [=](State& state) {
        for (auto _ : state) {
            const c10::DataPtr memory = allocator->allocate(static_cast<std::size_t>(bytes));
            benchmark::DoNotOptimize(memory.get());
        }
    };
    add(fmt::format("allocator/{}/{}", format_bytes(bytes), how), run);
}

void add_all() {
    add_copy();
    for (const char* preset : presets) add_optimizers(preset);
    for (const char* preset : presets) {
        for (const std::int64_t rows : {16, 128, 1024}) {
            for (const bool in_place : {true, false}) add_linear(preset, rows, in_place);
        }
    }
    add_losses("gpt-tiny", 512, {32});
    add_losses("gpt2", 1024, {16, 32, 64, 128});
    for (const std::int64_t rows : {512, 1024}) add_cross_entropies(rows);
    for (std::int64_t bytes = 64; bytes <= std::int64_t{16} << 20; bytes *= 8) {
        add_allocator(bytes, "ours", c10::GetCPUAllocator());
        add_allocator(bytes, "torch", c10::GetDefaultCPUAllocator());
    }
}

}  // namespace

int main(int argument_count, char** argument_values) {
    install_budget_allocator();
    benchmark::Initialize(&argument_count, argument_values);
    if (benchmark::ReportUnrecognizedArguments(argument_count, argument_values)) return 2;
    add_all();
    benchmark::RunSpecifiedBenchmarks();
    return 0;
}
