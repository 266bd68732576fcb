// One process, one measurement, one line of JSON; `bench/speed` runs them all and makes the tables.
//   speed_case steps     MODEL BATCH MICRO_BATCH STEPS THREADS [recompute]   as the peers of bench/peers
//   speed_case plan      MODEL BATCH               what is chosen with plenty of memory
//   speed_case product   MODEL MICRO_BATCH         the matrix products of a micro-batch alone, for a gpt or llama
//   speed_case optimizer MODEL                     AdamW's step against a copy of memory
//   speed_case scaling   MODEL MICRO_BATCH ROUNDS  batches of 1 to 64 micro-batches, interleaved
// MODEL is a name of the command's models; resnet has group norm.
#include <ATen/Functions.h>
#include <ATen/Parallel.h>
#include <fmt/format.h>
#include <torch/nn/module.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <functional>
#include <memory>
#include <nlohmann/json.hpp>
#include <random>
#include <string>
#include <vector>

#include "microbatch/data/batch_source.h"
#include "microbatch/data/open.h"
#include "microbatch/data/sampler.h"
#include "microbatch/data/token_windows.h"
#include "microbatch/memory/budget_allocator.h"
#include "microbatch/models/gpt.h"
#include "microbatch/models/llama.h"
#include "microbatch/models/resnet.h"
#include "microbatch/ops/cross_entropy.h"
#include "microbatch/ops/linear_cross_entropy.h"
#include "microbatch/optim/adamw.h"
#include "microbatch/run/trainer.h"
#include "microbatch/step/probe.h"

namespace {

using namespace microbatch;
using Json = nlohmann::ordered_json;

constexpr int warm_up = 1;  // steps; as in bench/peers/task.py

struct Job {
    std::shared_ptr<torch::nn::Module> model;
    Parameters parameters;
    LossFunction loss;
    std::unique_ptr<Dataset> dataset;
    std::unique_ptr<Optimizer> optimizer;
    std::unique_ptr<Accumulator> accumulator;
};

// As many tokens of GPT-2's vocabulary as a short run needs: what they say does not change what a step takes.
template <class Config>
std::unique_ptr<Dataset> random_tokens(const Config& config) {
    auto tokens = std::make_shared<std::vector<std::uint16_t>>(std::size_t{1} << 18);
    std::mt19937 generator(1);
    std::uniform_int_distribution<int> token(0, static_cast<int>(config.vocabulary) - 1);
    for (auto& one : *tokens) one = static_cast<std::uint16_t>(token(generator));
    return std::make_unique<TokenWindows>(Tokens{std::span<const std::uint16_t>(*tokens), tokens}, config.length);
}

bool is_llama(const std::string& name) {
    return name.starts_with("llama");
}

template <class Holder, class Config>
void use_language_model(Job& job, const Config& config) {
    Holder model(config);
    job.model = model.ptr();
    job.loss = [model, wide = config.vocabulary >= 4096](const Batch& micro) mutable -> WeightedLoss {
        const at::Tensor &tokens = micro.fields[0], &targets = micro.fields[1];
        return {wide ? linear_cross_entropy_sum(model->hidden(tokens), model->head_weight(), targets)
                     : cross_entropy_sum(model->forward(tokens), targets),
                count_targets(targets)};
    };
    job.dataset =
        config.vocabulary == 256 ? open_data("/usr/share/games/fortunes", config.length).train : random_tokens(config);
}

void use_resnet(Job& job) {
    ResNet model(ResNetConfig{.norm = ImageNorm::group});
    job.model = model.ptr();
    job.loss = [model](const Batch& micro) mutable -> WeightedLoss {
        return {cross_entropy_sum(model->forward(micro.fields[0]), micro.fields[1]), static_cast<double>(micro.size())};
    };
    job.dataset = open_data("/usr/share/datasets/fashion-mnist", 1).train;
}

Job make_job(const std::string& name) {
    at::manual_seed(1);
    Job job;
    if (name == "resnet") {
        use_resnet(job);
    } else if (is_llama(name)) {
        use_language_model<Llama>(job, llama_preset(name));
    } else {
        use_language_model<Gpt>(job, gpt_preset(name));
    }
    job.parameters = parameters_of(*job.model);
    job.optimizer = std::make_unique<AdamW>(split_by_decay(job.parameters, 0.1),
                                            AdamWOptions{.learning_rate = name == "gpt2" ? 3e-4 : 1e-3});
    job.accumulator = std::make_unique<Accumulator>(job.model, *job.optimizer, AccumulatorOptions{.clip_norm = 1.0});
    return job;
}

double seconds_of(const std::function<void()>& work) {
    const auto started = std::chrono::steady_clock::now();
    work();
    return std::chrono::duration<double>(std::chrono::steady_clock::now() - started).count();
}

double median(std::vector<double> values) {
    std::sort(values.begin(), values.end());
    return values[values.size() / 2];
}

std::int64_t count(const Parameters& parameters) {
    std::int64_t total = 0;
    for (const Parameter& parameter : parameters) total += parameter.tensor.numel();
    return total;
}

Json measure_steps(const std::string& model, std::int64_t batch, const Plan& plan, std::int64_t steps) {
    const Job job = make_job(model);
    job.accumulator->set_plan(plan);
    Trainer trainer(*job.accumulator, *job.dataset, job.loss,
                    {.batch = batch, .length = {warm_up + steps, Unit::steps}, .seed = 1});
    std::vector<double> seconds, losses;
    while (!trainer.done()) {
        const TrainerReport report = trainer.step();
        seconds.push_back(report.seconds);
        losses.push_back(report.step.loss);
        if (!report.step.applied) return {{"error", "a step was not applied: " + std::string(report.step.reason)}};
    }
    return {{"step_seconds", std::vector<double>(seconds.begin() + warm_up, seconds.end())},
            {"first_loss", losses.front()},
            {"last_loss", losses.back()},
            {"parameters", count(job.parameters)}};
}

Json measure_plan(const std::string& model, std::int64_t samples) {
    const Job job = make_job(model);
    const PlanReport report = plan_batch(*job.accumulator, DatasetBatch::longest(*job.dataset, samples), job.loss,
                                         {.budget_bytes = std::int64_t{16} << 30});
    const Candidate& choice = report.choice();
    return {{"micro_batch", choice.plan.micro_batch},
            {"recompute", choice.plan.recompute},
            {"step_seconds", choice.step_seconds},
            {"why", report.why}};
}

// A matrix product that a micro-batch makes `times` times; of one under a causal mask only half is needed.
struct Product {
    std::function<void()> run;
    double times;
    double flop;
    std::vector<double> seconds = {};
};

// y = x W^T, dx = dy W, dW = dy^T x.
void add_linear(std::vector<Product>& products, std::int64_t rows, std::int64_t inputs, std::int64_t outputs,
                double times) {
    const double flop = 2.0 * static_cast<double>(rows) * static_cast<double>(inputs) * static_cast<double>(outputs);
    const at::Tensor x = at::randn({rows, inputs}), dx = at::empty_like(x);
    const at::Tensor weight = at::randn({outputs, inputs}), dweight = at::empty_like(weight);
    const at::Tensor dy = at::randn({rows, outputs}), y = at::empty_like(dy);
    const auto add = [&](at::Tensor out, const at::Tensor& left, const at::Tensor& right) {
        products.push_back({[=]() mutable { at::mm_out(out, left, right); }, times, flop});
    };
    add(y, x, weight.t());
    add(dx, dy, weight);
    add(dweight, dy.t(), x);
}

// s = q k^T, o = p v; dv = p^T do, dp = do v^T, dq = ds k, dk = ds^T q.
void add_attention(std::vector<Product>& products, std::int64_t heads, std::int64_t length, std::int64_t width,
                   double times) {
    const double flop = 2.0 * static_cast<double>(heads * width) * static_cast<double>(length * length);
    const at::Tensor tall = at::randn({heads, length, width}), tall_out = at::empty_like(tall);
    const at::Tensor square = at::randn({heads, length, length}), square_out = at::empty_like(square);
    const auto add = [&](at::Tensor out, const at::Tensor& left, const at::Tensor& right) {
        products.push_back({[=]() mutable { at::bmm_out(out, left, right); }, times / 2, flop});
    };
    for (int product = 0; product < 2; ++product) {
        add(square_out, tall, tall.transpose(1, 2));
        add(tall_out, square, tall);
        add(tall_out, square.transpose(1, 2), tall);
    }
}

std::vector<Product> products_of(const GptConfig& config, std::int64_t samples) {
    const std::int64_t rows = samples * config.length, width = config.width;
    const auto layers = static_cast<double>(config.layers);
    std::vector<Product> products;
    add_linear(products, rows, width, 3 * width, layers);
    add_attention(products, samples * config.heads, config.length, width / config.heads, layers);
    add_linear(products, rows, width, width, layers);
    add_linear(products, rows, width, 4 * width, layers);
    add_linear(products, rows, 4 * width, width, layers);
    add_linear(products, rows, width, config.vocabulary, 1);
    return products;
}

std::vector<Product> products_of(const LlamaConfig& config, std::int64_t samples) {
    const std::int64_t rows = samples * config.length, width = config.width, size = width / config.heads;
    const auto layers = static_cast<double>(config.layers);
    std::vector<Product> products;
    add_linear(products, rows, width, width, 2 * layers);                   // queries, projection
    add_linear(products, rows, width, config.kv_heads * size, 2 * layers);  // keys, values
    add_attention(products, samples * config.heads, config.length, size, layers);
    add_linear(products, rows, width, inner_width(config), 2 * layers);
    add_linear(products, rows, inner_width(config), width, layers);
    add_linear(products, rows, width, config.vocabulary, 1);
    return products;
}

// They take turns, so that each finds the caches as another one left them, as in a step. The first turn does not count.
Json measure_product(const std::string& model, std::int64_t micro_batch) {
    std::vector<Product> products =
        is_llama(model) ? products_of(llama_preset(model), micro_batch) : products_of(gpt_preset(model), micro_batch);
    for (Product& product : products) product.run();
    double spent = 0.0;
    for (int turn = 0; turn < 5 || spent < 2.0; ++turn) {
        for (Product& product : products) {
            product.seconds.push_back(seconds_of(product.run));
            spent += product.seconds.back();
        }
    }
    double seconds = 0.0, flop = 0.0;
    for (const Product& product : products) {
        seconds += product.times * median(product.seconds);
        flop += product.times * product.flop;
    }
    return {{"micro_batch", micro_batch}, {"seconds", seconds}, {"flop", flop}};
}

// The copy, far larger than the caches, leaves nothing of the parameters in them, as a step's backward pass does.
Json measure_optimizer(const std::string& model) {
    const Job job = make_job(model);
    for (const Parameter& parameter : job.parameters) {
        parameter.tensor.mutable_grad() = at::randn_like(parameter.tensor.detach());
    }
    constexpr std::int64_t copied = std::int64_t{512} << 20;
    const at::Tensor from = at::ones({copied / 4}), to = at::zeros({copied / 4});
    std::vector<double> steps, copies;
    for (int turn = -1; turn < 15; ++turn) {
        const double copy = seconds_of([&] { to.copy_(from); });
        const double step = seconds_of([&] { job.optimizer->step(); });
        if (turn < 0) continue;  // it makes the optimizer's state
        copies.push_back(copy);
        steps.push_back(step);
    }
    // Reads parameter, gradient and two moments, writes all but the gradient: 4 bytes each.
    const auto moved = static_cast<double>(28 * count(job.parameters));
    return {{"parameters", count(job.parameters)},
            {"seconds", median(steps)},
            {"bytes", moved},
            {"bytes_per_second", moved / median(steps)},
            {"copy_bytes_per_second", 2.0 * static_cast<double>(copied) / median(copies)}};
}

Json measure_scaling(const std::string& model, std::int64_t micro_batch, int rounds) {
    const Job job = make_job(model);
    job.accumulator->set_plan({.micro_batch = micro_batch});
    Sampler sampler(job.dataset->size(), 1);
    const auto step = [&](std::int64_t samples) {
        return seconds_of([&] { job.accumulator->step(DatasetBatch(*job.dataset, sampler.next(samples)), job.loss); });
    };
    const std::vector<std::int64_t> sizes = {1, 2, 4, 8, 16, 32, 64};
    std::vector<std::vector<double>> seconds(sizes.size());
    for (int turn = 0; turn <= warm_up; ++turn) step(2 * micro_batch);
    for (int round = 0; round < rounds; ++round) {
        for (std::size_t turn = 0; turn < sizes.size(); ++turn) {
            // Forwards and backwards: a machine that slows down then slows all sizes equally.
            const std::size_t i = round % 2 == 0 ? turn : sizes.size() - 1 - turn;
            // Small batches often enough to compare with a large one.
            const std::int64_t repeats = std::max<std::int64_t>(1, 8 / sizes[i]);
            for (std::int64_t repeat = 0; repeat < repeats; ++repeat) {
                const std::int64_t samples = sizes[i] * micro_batch;
                seconds[i].push_back(step(samples) / static_cast<double>(samples));
            }
        }
    }
    Json rows = Json::array();
    for (std::size_t i = 0; i < sizes.size(); ++i) {
        rows.push_back({{"micro_batches", sizes[i]},
                        {"sample_seconds", median(seconds[i])},
                        {"least", *std::min_element(seconds[i].begin(), seconds[i].end())},
                        {"most", *std::max_element(seconds[i].begin(), seconds[i].end())}});
    }
    return {{"model", model}, {"micro_batch", micro_batch}, {"rows", rows}};
}

Json measure(const std::vector<std::string>& words) {
    const auto number = [&words](std::size_t i) { return std::stoll(words[i]); };
    const std::string command = words.empty() ? "" : words[0];
    if (command == "steps" && (words.size() == 6 || (words.size() == 7 && words[6] == "recompute"))) {
        at::set_num_threads(static_cast<int>(number(5)));
        return measure_steps(words[1], number(2), {.micro_batch = number(3), .recompute = words.size() == 7},
                             number(4));
    }
    if (command == "plan" && words.size() == 3) return measure_plan(words[1], number(2));
    if (command == "product" && words.size() == 3) return measure_product(words[1], number(2));
    if (command == "optimizer" && words.size() == 2) return measure_optimizer(words[1]);
    if (command == "scaling" && words.size() == 4) {
        return measure_scaling(words[1], number(2), static_cast<int>(number(3)));
    }
    return {};
}

}  // namespace

int main(int argument_count, char** argument_values) {
    install_budget_allocator();
    const Json result = measure(std::vector<std::string>(argument_values + 1, argument_values + argument_count));
    if (result.empty()) {
        fmt::print(stderr, "usage: see the head of bench/speed_case.cpp\n");
        return 2;
    }
    fmt::print("{}\n", result.dump());
    return 0;
}
