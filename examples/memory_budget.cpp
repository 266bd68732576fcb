// Your own model within a memory budget, which is planned on the job itself and then enforced. Its blocks can be
// recomputed.
#include <torch/nn/modules/container/modulelist.h>
#include <torch/nn/modules/linear.h>

#include <cstdio>

#include "microbatch/microbatch.h"

struct DeepImpl : torch::nn::Module, microbatch::Recomputable {
    DeepImpl() {
        for (int i = 0; i < 8; ++i) blocks->push_back(torch::nn::Linear(64, 64));
    }
    at::Tensor forward(at::Tensor x) {
        for (const auto& block : *blocks) {
            auto linear = block;  // its activations are kept, or computed again in backward
            const auto run = [linear](const at::Tensor& in) {
                return in + at::gelu(linear->as<torch::nn::LinearImpl>()->forward(in));
            };
            x = recompute_ ? microbatch::recompute(run, x, linear) : run(x);
        }
        return head(x);
    }
    void set_recompute(bool on) override { recompute_ = on; }
    bool recomputes() const override { return recompute_; }

    torch::nn::ModuleList blocks = register_module("blocks", torch::nn::ModuleList());
    torch::nn::Linear head = register_module("head", torch::nn::Linear(64, 1));

private:
    bool recompute_ = false;
};
TORCH_MODULE(Deep);

int main() {
    microbatch::install_budget_allocator();
    at::manual_seed(7);
    const at::Tensor inputs = at::randn({512, 64});
    const microbatch::Batch batch{{inputs, inputs.square().mean(1, /*keepdim=*/true)}};

    Deep model;
    auto loss = [&model](const microbatch::Batch& micro) -> microbatch::WeightedLoss {
        return {(model(micro.fields[0]) - micro.fields[1]).square().sum(), static_cast<double>(micro.size())};
    };
    const auto parameters = microbatch::parameters_of(model);
    microbatch::AdamW optimizer(microbatch::split_by_decay(parameters, 0.01), {.learning_rate = 1e-3});
    microbatch::Accumulator accumulator(model, optimizer, {.clip_norm = 10.0});

    const std::int64_t budget = microbatch::parse_bytes("1200KiB");
    const auto report = microbatch::plan_batch(accumulator, batch, loss, {.budget_bytes = budget});
    const microbatch::Candidate& plan = report.choice();  // an error that explains, if nothing fits
    std::printf("micro-batch %ld%s: %s\n", static_cast<long>(plan.plan.micro_batch),
                plan.plan.recompute ? " with recompute" : "", report.why.c_str());
    accumulator.set_plan(plan.plan);
    microbatch::set_memory_budget(budget);  // from here on an allocation beyond it fails, and the step is made again

    microbatch::reset_peak_memory();
    const double first = accumulator.step(batch, loss).loss;
    double last = first;
    for (int step = 1; step < 60; ++step) last = accumulator.step(batch, loss).loss;
    const auto peak = microbatch::memory_use().peak_bytes;
    std::printf("loss %.4f, then %.4f; peak %ld bytes, predicted %ld\n", first, last, static_cast<long>(peak),
                static_cast<long>(plan.peak_bytes()));
    return peak <= budget && last < 0.5 * first ? 0 : 1;
}
