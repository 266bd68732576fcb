// What docs/decisions/one-pass-optimizer.md says about time: prints its tables.
//   one_pass_case optimizer   an AdamW step and the gradients' norm, against the rate of a copy
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

#include "microbatch/models/gpt.h"
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

}  // namespace

int main(int argument_count, char** argument_values) {
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
    fmt::print(stderr, "usage: see the head of bench/one_pass_case.cpp\n");
    return 2;
}
