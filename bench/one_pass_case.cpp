// What docs/decisions/one-pass-optimizer.md says about time: prints its tables.
//   one_pass_case optimizer   an AdamW step and the gradients' norm, against the rate of a copy
//   one_pass_case loss        forward and backward of the loss of GPT-2's vocabulary and of a small one, 2 threads
#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <ATen/core/grad_mode.h>
#include <fmt/format.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <functional>
#include <string>
#include <vector>

#include "microbatch/memory/budget_allocator.h"
#include "microbatch/models/gpt.h"
#include "microbatch/nn/cross_entropy.h"
#include "microbatch/nn/linear_cross_entropy.h"
#include "microbatch/optim/adamw.h"
#include "microbatch/optim/clipping.h"

namespace {

using namespace microbatch;

double seconds_of(const std::function<void()>& work) {
    const auto started = std::chrono::steady_clock::now();
    work();
    return std::chrono::duration<double>(std::chrono::steady_clock::now() - started).count();
}

// Each in turn, several times, the first of which does not count; the medians.
std::vector<double> medians(const std::vector<std::function<void()>>& works, int rounds) {
    std::vector<std::vector<double>> seconds(works.size());
    for (int round = 0; round <= rounds; ++round) {
        for (std::size_t i = 0; i < works.size(); ++i) {
            const double taken = seconds_of(works[i]);
            if (round > 0) seconds[i].push_back(taken);
        }
    }
    std::vector<double> result;
    for (auto& each : seconds) {
        std::sort(each.begin(), each.end());
        result.push_back(each[each.size() / 2]);
    }
    return result;
}

void print_optimizer(const std::string& preset, int rounds) {
    const at::NoGradGuard no_grad;
    const Parameters parameters = parameters_of(Gpt(gpt_preset(preset)));
    std::vector<at::Tensor> p, g, m, v, steps;
    for (const Parameter& parameter : parameters) {
        p.push_back(parameter.tensor);
        parameter.tensor.mutable_grad() = at::randn_like(parameter.tensor);
        g.push_back(parameter.tensor.grad());
        m.push_back(at::zeros_like(parameter.tensor));
        v.push_back(at::zeros_like(parameter.tensor));
        steps.push_back(at::zeros({}));
    }
    double count = 0;
    for (const at::Tensor& each : p) count += static_cast<double>(each.numel());
    const double divisor = 1.0001;
    const at::Tensor one = at::ones({}), scale = at::empty({});
    const at::Tensor source = at::ones({std::int64_t{128} << 20}), target = at::empty_like(source);
    const auto fused = [&](const std::optional<at::Tensor>& by) {
        at::_foreach_add_(steps, one);
        at::_fused_adamw_(p, g, m, v, {}, steps, 1e-4, 0.9, 0.999, 0.1, 1e-8, false, false, by);
    };
    AdamW ours(split_by_decay(parameters, 0.1), {.learning_rate = 1e-4});
    double norm = 0.0;
    const std::vector<double> seconds =
        medians({[&] { target.copy_(source); },
                 [&] {
                     at::_foreach_div_(g, divisor);
                     fused(std::nullopt);
                 },
                 [&] { fused(scale.fill_(divisor)); }, [&] { ours.step(divisor); }, [&] { norm += joint_norm(g); }},
                rounds);
    const double copied = 8.0 * (128 << 20) / seconds[0];
    const auto row = [&](const char* name, double bytes, double taken) {
        fmt::print("| {} | {:.1f}M | {} | {} | {:.2f} | {:.1f} | {:.2f} |\n", preset, count / 1e6,
                   at::get_num_threads(), name, 1e3 * taken, bytes / taken / 1e9, bytes / taken / copied);
    };
    row("copy of 512 MiB", 8.0 * (128 << 20), seconds[0]);
    row("division, then torch's fused kernel", 28 * count, seconds[1]);
    row("torch's fused kernel with grad_scale", 28 * count, seconds[2]);
    row("ours, one pass", 28 * count, seconds[3]);
    row("norm of the gradients", 4 * count, seconds[4]);
}

void print_loss(std::int64_t rows, std::int64_t width, std::int64_t vocabulary, int rounds) {
    const at::Tensor hidden = at::randn({rows, width}).requires_grad_();
    const at::Tensor weight = (at::randn({vocabulary, width}) * 0.02).requires_grad_();
    const at::Tensor targets = at::randint(vocabulary, {rows}, at::kLong);
    const auto with_gradients = [&](const std::function<at::Tensor()>& loss) {
        return [&hidden, &weight, loss] {
            hidden.mutable_grad() = weight.mutable_grad() = at::Tensor();
            loss().backward();
        };
    };
    std::vector<std::string> names = {"at::linear and cross_entropy_sum"};
    std::vector<std::function<void()>> works = {
        with_gradients([&] { return cross_entropy_sum(at::linear(hidden, weight), targets); })};
    for (const std::int64_t mebibytes : {8, 16, 32, 64, 128}) {
        names.push_back(fmt::format("linear_cross_entropy_sum, {} MiB", mebibytes));
        works.push_back(
            with_gradients([=] { return linear_cross_entropy_sum(hidden, weight, targets, -100, mebibytes << 20); }));
    }
    names.emplace_back("linear_cross_entropy_sum, 32 MiB, no gradient");
    works.emplace_back([&] {
        const at::NoGradGuard no_grad;
        linear_cross_entropy_sum(hidden, weight, targets);
    });
    const std::vector<double> seconds = medians(works, rounds);
    for (std::size_t i = 0; i < works.size(); ++i) {
        const double products = i + 1 == works.size() ? 1 : 3;
        const double operations = products * 2 * static_cast<double>(rows * width * vocabulary);
        fmt::print("| {} | {} | {} | {} | {:.2f} | {:.0f} | {:.2f} |\n", rows, width, vocabulary, names[i],
                   1e3 * seconds[i], operations / seconds[i] / 1e9, seconds[i] / seconds[0]);
    }
}

void print_small_loss(std::int64_t rows, std::int64_t classes) {
    const at::Tensor logits = at::randn({rows, classes}).requires_grad_();
    const at::Tensor targets = at::randint(classes, {rows}, at::kLong);
    const std::vector<double> seconds = medians({[&] {
                                                    logits.mutable_grad() = at::Tensor();
                                                    cross_entropy_sum(logits, targets).backward();
                                                }},
                                                201);
    fmt::print("| {} | | {} | cross_entropy_sum alone | {:.3f} | | |\n", rows, classes, 1e3 * seconds[0]);
}

}  // namespace

int main(int argument_count, char** argument_values) {
    install_budget_allocator();
    const std::string what = argument_count == 2 ? argument_values[1] : "";
    if (what == "optimizer") {
        fmt::print("| model | parameters | threads | what | ms | GB/s needed | of a copy's |\n");
        fmt::print("| --- | ---: | ---: | --- | ---: | ---: | ---: |\n");
        for (const int threads : {2, 1}) {
            at::set_num_threads(threads);
            for (const char* preset : {"gpt-tiny", "gpt-small", "gpt2"}) print_optimizer(preset, 15);
        }
        return 0;
    }
    if (what == "loss") {
        at::set_num_threads(2);
        fmt::print("| rows | width | vocabulary | what | ms | GFLOP/s needed | of the first |\n");
        fmt::print("| ---: | ---: | ---: | --- | ---: | ---: | ---: |\n");
        print_loss(1024, 768, 50257, 7);
        for (const std::int64_t rows : {512, 1024}) print_small_loss(rows, 256);
        return 0;
    }
    fmt::print(stderr, "usage: see the head of bench/one_pass_case.cpp\n");
    return 2;
}
