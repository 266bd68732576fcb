#include "cli/commands/job.h"

#include <ATen/Context.h>
#include <ATen/Parallel.h>
#include <fmt/format.h>
#include <torch/nn/module.h>

#include <algorithm>

#include "cli/commands/process.h"
#include "cli/options/options.h"
#include "cli/options/refuse.h"
#include "cli/print/output.h"
#include "microbatch/core/units.h"
#include "microbatch/memory/budget_allocator.h"
#include "microbatch/memory/meter.h"
#include "microbatch/models/gpt.h"
#include "microbatch/models/llama.h"
#include "microbatch/models/mlp.h"
#include "microbatch/models/resnet.h"
#include "microbatch/ops/cross_entropy.h"
#include "microbatch/ops/linear_cross_entropy.h"
#include "microbatch/optim/adamw.h"
#include "microbatch/optim/sgd.h"
#include "microbatch/runtime/spin_throttle.h"

namespace microbatch::cli {
namespace {

bool is_gpt(const std::string& model) {
    return model.starts_with("gpt");
}

bool is_llama(const std::string& model) {
    return model.starts_with("llama");
}

bool reads_tokens(const std::string& model) {
    return is_gpt(model) || is_llama(model);
}

std::int64_t sample_length(const std::string& model, const Settings& settings) {
    return settings.length.value_or(is_llama(model) ? llama_preset(model).length : gpt_preset(model).length);
}

// Token files may hold fewer tokens than the preset's vocabulary; text needs exactly 256.
std::int64_t vocabulary_of(std::int64_t of_preset, std::int64_t of_data) {
    return of_preset > 256 ? std::max(of_preset, of_data) : of_data;
}

// The policies that leave no BatchNorm.
bool replaces_batch_norm(const std::string& policy) {
    return policy == "group" || policy == "rms";
}

// The sizes that every model of text has.
template <class Config>
void apply_sizes(const Settings& settings, Config& config) {
    config.layers = settings.layers.value_or(config.layers);
    config.heads = settings.heads.value_or(config.heads);
    config.width = settings.width.value_or(config.width);
    config.length = settings.length.value_or(config.length);
}

GptConfig gpt_config(const std::string& model, const Settings& settings, std::int64_t vocabulary) {
    GptConfig config = gpt_preset(model);
    apply_sizes(settings, config);
    config.dropout = settings.dropout.value_or(0.0);
    config.vocabulary = vocabulary_of(config.vocabulary, vocabulary);
    if (!settings.norm.empty()) config.norm = read_flag("--norm", [&] { return parse_gpt_norm(settings.norm); });
    return config;
}

LlamaConfig llama_config(const std::string& model, const Settings& settings, std::int64_t vocabulary) {
    LlamaConfig config = llama_preset(model);
    apply_sizes(settings, config);
    config.kv_heads = settings.kv_heads.value_or(config.kv_heads);
    config.inner = settings.inner.value_or(config.inner);
    config.vocabulary = vocabulary_of(config.vocabulary, vocabulary);
    return config;
}

ResNetConfig resnet_config(const JobPlan& plan) {
    ResNetConfig config;
    config.classes = plan.data.classes;
    config.width = plan.settings.width.value_or(config.width);
    config.blocks = plan.settings.layers.value_or(config.blocks);
    const std::string& norm = plan.settings.norm;
    if (!norm.empty()) config.norm = read_flag("--norm", [&] { return parse_image_norm(norm); });
    const std::string& policy = plan.settings.batch_norm;
    if (config.norm == ImageNorm::batch && replaces_batch_norm(policy)) config.norm = parse_image_norm(policy);
    return config;
}

MlpConfig mlp_config(const JobPlan& plan) {
    MlpConfig config;
    config.inputs = plan.data.height * plan.data.width;
    config.classes = plan.data.classes;
    config.width = plan.settings.width.value_or(config.width);
    config.layers = plan.settings.layers.value_or(config.layers);
    return config;
}

void require_match(const std::string& model, const OpenedData& data, const std::string& path) {
    const bool images = data.kind == DataKind::images;
    if (images == !reads_tokens(model)) return;
    refuse("--model {} trains on {}, but {} holds {}: choose --model {}", model, images ? "text or tokens" : "images",
           path, images ? "images" : "text or tokens",
           images ? "resnet or mlp" : one_of(find_option("heads")->traits.only_with.values));
}

// Initialized on the CPU, so that the parameters are the same on every device.
template <class Holder>
void use_model(Job& job, Holder model, LossFunction loss, at::Device device) {
    if (!device.is_cpu()) model->to(device);
    job.model = model.ptr();
    job.parameters = parameters_of(model);
    job.loss = on_device(std::move(loss), device);
}

// If the vocabulary is much larger than the width, the logits take most of the memory: compute them in chunks.
template <class Holder>
void use_language_model(Job& job, Holder model, at::Device device) {
    constexpr std::int64_t wide = 4096;
    const bool chunked = model->head_weight().size(0) >= wide;
    use_model(
        job, model,
        [model, chunked](const Batch& micro) mutable -> WeightedLoss {
            const at::Tensor &tokens = micro.fields[0], &targets = micro.fields[1];
            const at::Tensor sum = chunked
                                       ? linear_cross_entropy_sum(model->hidden(tokens), model->head_weight(), targets)
                                       : cross_entropy_sum(model->forward(tokens), targets);
            return {sum, count_targets(targets)};
        },
        device);
}

template <class Holder>
void use_classifier(Job& job, Holder model, at::Device device) {
    use_model(
        job, model,
        [model](const Batch& micro) mutable -> WeightedLoss {
            return {cross_entropy_sum(model->forward(micro.fields[0]), micro.fields[1]),
                    static_cast<double>(micro.size())};
        },
        device);
}

void use_optimizer(Job& job, const Settings& settings) {
    const RateConstants constants = constants_of(settings, settings.batch);
    const bool sgd = settings.optimizer == "sgd";
    const auto groups = split_by_decay(job.parameters, weight_decay_of(settings));
    if (sgd) {
        job.optimizer = std::make_unique<Sgd>(groups, SgdOptions{.learning_rate = constants.learning_rate,
                                                                 .momentum = momentum_of(settings),
                                                                 .nesterov = settings.nesterov});
    } else {
        job.optimizer = std::make_unique<AdamW>(groups, AdamWOptions{.learning_rate = constants.learning_rate,
                                                                     .beta1 = constants.adam->beta1,
                                                                     .beta2 = constants.adam->beta2,
                                                                     .epsilon = constants.adam->epsilon});
    }
}

// Records every size as a flag would set it, so that config.toml stays valid if the presets change.
void resolve_sizes(JobPlan& plan) {
    Settings& settings = plan.settings;
    if (is_gpt(plan.model)) {
        const GptConfig config = gpt_config(plan.model, settings, plan.data.classes);
        settings.layers = config.layers;
        settings.heads = config.heads;
        settings.width = config.width;
        settings.length = config.length;
        settings.norm = to_string(config.norm);
    } else if (is_llama(plan.model)) {
        const LlamaConfig config = llama_config(plan.model, settings, plan.data.classes);
        settings.layers = config.layers;
        settings.heads = config.heads;
        settings.kv_heads = config.kv_heads;
        settings.width = config.width;
        settings.inner = inner_width(config);
        settings.length = config.length;
    } else if (plan.model == "resnet") {
        const ResNetConfig config = resnet_config(plan);
        settings.layers = config.blocks;
        settings.width = config.width;
        settings.norm = to_string(config.norm);
    } else {
        const MlpConfig config = mlp_config(plan);
        settings.layers = config.layers;
        settings.width = config.width;
    }
}

std::string short_count(std::int64_t count) {
    return count >= 1'000'000 ? fmt::format("{:.1f}M", static_cast<double>(count) / 1e6)
                              : fmt::format("{:.0f}k", static_cast<double>(count) / 1e3);
}

std::string describe_model(const JobPlan& plan) {
    if (is_gpt(plan.model)) {
        const GptConfig config = gpt_config(plan.model, plan.settings, plan.data.classes);
        return fmt::format("{}, {} parameters: {} layers, {} heads, width {}, {} tokens per sample", plan.model,
                           short_count(count_parameters(config)), config.layers, config.heads, config.width,
                           config.length);
    }
    if (is_llama(plan.model)) {
        const LlamaConfig config = llama_config(plan.model, plan.settings, plan.data.classes);
        return fmt::format(
            "{}, {} parameters: {} layers, {} heads, {} of keys and values, width {}, {} tokens per sample", plan.model,
            short_count(count_parameters(config)), config.layers, config.heads, config.kv_heads, config.width,
            config.length);
    }
    std::int64_t count = 0;
    for (const Parameter& parameter : make_job(plan).parameters) count += parameter.tensor.numel();
    return fmt::format("{}, {} parameters", plan.model, short_count(count));
}

class Evaluation {
public:
    explicit Evaluation(torch::nn::Module& model) : model_(model) { model_.eval(); }
    Evaluation(const Evaluation&) = delete;
    Evaluation& operator=(const Evaluation&) = delete;
    ~Evaluation() { model_.train(); }

private:
    torch::nn::Module& model_;
};

Recompute recompute_of(const JobPlan& plan, const Job& job) {
    if (plan.settings.recompute == "never") return Recompute::never;
    if (plan.settings.recompute == "auto") return Recompute::automatic;
    if (job.accumulator->model().offers_checkpointing()) return Recompute::always;
    refuse("--recompute always: {} has no blocks to recompute; gpt, llama and resnet do", plan.model);
}

// No plan helps if even the sample numbers of the batch do not fit.
void require_room_for_numbers(std::int64_t batch, std::int64_t budget_bytes) {
    constexpr std::int64_t bytes_a_sample = 2 * sizeof(std::int64_t);
    constexpr std::int64_t little = std::int64_t{1} << 20;
    if (batch <= std::max(budget_bytes, little) / bytes_a_sample) return;
    throw Error(ErrorKind::does_not_fit, fmt::format("--batch {}: the list of its sample numbers alone exceeds the "
                                                     "memory budget of {}; use a smaller --batch or raise --memory",
                                                     batch, format_bytes(budget_bytes)));
}

std::optional<BatchNorm> batch_norm_of(const JobPlan& plan) {
    const std::string& name = plan.settings.batch_norm;
    const std::string& norm = plan.settings.norm;
    const bool replaced = plan.model == "resnet" && replaces_batch_norm(name) && norm == name;
    if (name == "auto" || replaced) return std::nullopt;
    if (plan.model != "resnet" || norm != "batch") {
        refuse("--batch-norm {}: the model, {}, has no BatchNorm layer; leave the flag out", name,
               plan.model == "resnet" ? fmt::format("resnet with --norm {}", norm) : plan.model);
    }
    return parse_batch_norm(name);
}

PlanReport make_report(const JobPlan& plan, const Job& job, const PlannerOptions& options) {
    require_room_for_numbers(plan.batch, options.budget_bytes);
    const Dataset& data = *plan.data.train;
    const PlanReport report = plan_batch_norm(*job.accumulator, DatasetBatch::longest(data, plan.share(plan.batch)),
                                              job.loss, options, batch_norm_of(plan));
    if (interrupted()) throw Interrupted();
    return report;
}

// The report is for one process's share of the batch.
PlanReport of_whole_batch(PlanReport report, const JobPlan& plan) {
    report.batch = plan.batch;
    return report;
}

}  // namespace

JobPlan open_job(const Settings& settings, Interval length) {
    JobPlan plan;
    plan.settings = settings;
    plan.model = settings.model;
    const std::string text_model = plan.model.empty() ? "gpt-tiny" : plan.model;
    const std::int64_t tokens = reads_tokens(text_model) ? sample_length(text_model, settings) : 1;
    plan.data = open_data(settings.data, tokens);
    if (plan.model.empty()) {
        plan.model = plan.data.kind == DataKind::images ? "resnet" : "gpt-tiny";
        plan.settings.model = plan.model;
        require_options_apply(plan.settings);
    }
    require_match(plan.model, plan.data, settings.data);
    resolve_sizes(plan);
    plan.model_description = describe_model(plan);
    const std::int64_t tokens_per_sample = plan.data.train->tokens_per_sample();
    plan.steps = convert(length, Unit::steps, settings.batch, tokens_per_sample).count;
    plan.batches = batches_of(settings, length, tokens_per_sample);
    plan.batch = largest_batch(plan.batches);
    if (length.unit != Unit::steps) {
        plan.batch = std::min(plan.batch, convert(length, Unit::samples, settings.batch, tokens_per_sample).count);
    }
    return plan;
}

std::int64_t room_to_measure(const Settings& settings, std::int64_t budget_bytes) {
    return std::max(budget_bytes, available_of(device_of(settings)) / 10 * 9);
}

Job make_job(const JobPlan& plan) {
    at::manual_seed(plan.settings.seed);
    const at::Device device = device_of(plan.settings);
    Job job;
    if (is_gpt(plan.model)) {
        use_language_model(job, Gpt(gpt_config(plan.model, plan.settings, plan.data.classes)), device);
    } else if (is_llama(plan.model)) {
        use_language_model(job, Llama(llama_config(plan.model, plan.settings, plan.data.classes)), device);
    } else if (plan.model == "resnet") {
        use_classifier(job, ResNet(resnet_config(plan)), device);
    } else {
        use_classifier(job, Mlp(mlp_config(plan)), device);
    }
    use_optimizer(job, plan.settings);
    job.accumulator = std::make_unique<Accumulator>(
        *job.model, *job.optimizer,
        AccumulatorOptions{.clip_norm = plan.settings.clip, .reducer = plan.reducer, .grain = plan.grain()});
    return job;
}

Job make_job_to_plan(const JobPlan& plan, std::int64_t budget_bytes) {
    const BudgetScope allowed(device_of(plan.settings).is_cpu() ? room_to_measure(plan.settings, budget_bytes)
                                                                : no_budget);
    return make_job(plan);
}

void require_whole_batch(const JobPlan& plan) {
    if (plan.batch >= plan.settings.batch) return;
    refuse(
        "a batch of {} is larger than the whole run of {} samples, which would be a single batch of {}; use a smaller "
        "batch or a longer run (--samples)",
        plan.settings.batch, plan.batch, plan.batch);
}

PlanReport plan_job(const JobPlan& plan, const Job& job, std::int64_t budget_bytes, std::FILE* progress,
                    bool whole_table) {
    PlannerOptions options{.budget_bytes = budget_bytes,
                           .steps = plan.steps,
                           .recompute = recompute_of(plan, job),
                           .micro_batch = plan.settings.micro_batch,
                           .most_bytes = room_to_measure(plan.settings, budget_bytes),
                           .communication_seconds = plan.communication_seconds,
                           .whole_table = whole_table};
    if (plan.grain() > 0) options.micro_batch = plan.grain();
    if (options.micro_batch) options.micro_batch = std::min(*options.micro_batch, plan.share(plan.batch));
    LiveLine line(progress, /*at_once=*/false);
    options.on_trial = [&line](const Plan& trial) {
        if (interrupted()) throw Interrupted();
        if (!line.is_due()) return;
        line.draw(fmt::format("measuring a micro-batch of {}{}", trial.micro_batch,
                              trial.recompute ? " with recompute" : ""));
    };
    PlanReport report = make_report(plan, job, options);
    if (plan.grain() > 0 && report.chosen) report.why = "the grains of the invariant mode";
    // One micro-batch for the whole run: a smaller batch would need a different split.
    const std::int64_t smallest = plan.share(std::min(smallest_batch(plan.batches), plan.batch));
    if (!report.chosen || report.choice().plan.micro_batch <= smallest) return of_whole_batch(std::move(report), plan);
    options.micro_batch = smallest;
    report = make_report(plan, job, options);
    if (report.chosen) report.why = "as large as the smallest batch of the schedule";
    return of_whole_batch(std::move(report), plan);
}

PlanReport plan_native(const JobPlan& plan, const Job& job, std::int64_t budget_bytes) {
    return make_report(plan, job,
                       {.budget_bytes = budget_bytes,
                        .recompute = Recompute::never,
                        .most_steps = 0.0,
                        .least_seconds = 0.0,
                        .on_trial = {}});
}

std::optional<std::string> replaced_norms(const JobPlan& plan) {
    const std::string& policy = plan.settings.batch_norm;
    if (plan.model != "resnet" || !replaces_batch_norm(policy)) return std::nullopt;
    return fmt::format("every BatchNorm is replaced by {}, with its affine weights: --norm {}",
                       policy == "group" ? "GroupNorm (8 groups)" : "RMSNorm over the channels", policy);
}

std::string describe_cut(const Candidate& candidate) {
    const std::string cut =
        candidate.micro_batches == 1
            ? "in one piece"
            : fmt::format("in {} micro-batches of {}", candidate.micro_batches, candidate.plan.micro_batch);
    return cut + (candidate.plan.recompute ? ", with recompute" : "");
}

void use_threads(const Settings& settings) {
    if (settings.threads) at::set_num_threads(static_cast<int>(*settings.threads));
}

LossFunction watched_loss(const Job& job) {
    return [&job, threads = std::make_shared<SpinThrottle>()](const Batch& micro) {
        if (interrupted()) throw Interrupted();
        threads->poll();
        return job.loss(micro);
    };
}

double held_out_loss(const JobPlan& plan, const Job& job, std::int64_t trained, std::int64_t micro_batch) {
    const Dataset& samples = *plan.data.held_out;
    const std::int64_t most = std::clamp<std::int64_t>(trained, 16, 1024);
    const Evaluation evaluation(*job.model);
    return mean_loss(samples, std::min({micro_batch, samples.size(), most}), watched_loss(job), most);
}

void print_data(std::FILE* out, const OpenedData& data, int column) {
    print(out, "{:<{}}{}\n", "data", column, data.description);
    for (const std::string& note : data.notes) print(out, "{:<{}}{}\n", "", column, note);
    for (const std::string& warning : data.warnings) print(out, "{:<{}}warning: {}\n", "", column, warning);
}

const char* speed_unit(const JobPlan& plan) {
    return plan.data.kind == DataKind::images ? "images" : "tokens";
}

}  // namespace microbatch::cli
