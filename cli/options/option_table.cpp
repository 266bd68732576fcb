#include <fmt/format.h>

#include <cmath>

#include "cli/options/options.h"

namespace microbatch::cli {
namespace {

using S = Settings;
using enum AtResume;

constexpr Range at_least_1{"at least 1", [](double value) { return value >= 1.0; }};
constexpr Range above_0{"above 0", [](double value) { return value > 0.0; }};
constexpr Range not_negative{"finite and 0 or more", [](double value) { return std::isfinite(value) && value >= 0.0; }};
constexpr Range below_1{"from 0 to below 1", [](double value) { return value >= 0.0 && value < 1.0; }};
constexpr Range a_batch{"from 1 to 2^31", [](double value) { return value >= 1.0 && value <= 0x1p31; }};
constexpr Range up_to_1000{"from 1 to 1000", [](double value) { return value >= 1.0 && value <= 1000.0; }};
constexpr Range up_to_1024{"from 1 to 1024", [](double value) { return value >= 1.0 && value <= 1024.0; }};

std::string by_optimizer(double OptimizerDefaults::*value) {
    return fmt::format("{} for adamw, {} for sgd", adamw_defaults.*value, sgd_defaults.*value);
}

std::vector<std::string> joined(std::vector<std::string> all, const std::vector<std::string>& more) {
    all.insert(all.end(), more.begin(), more.end());
    return all;
}

class Table {
public:
    // What the options that follow have in common.
    void begin(const char* group, unsigned commands, AtResume at_resume) {
        group_ = group;
        usual_ = {.at_resume = at_resume, .commands = commands};
    }

    void add(const char* name, Option::Member member, const char* value, std::string help, Option::Traits traits = {}) {
        if (traits.commands == 0) traits.commands = usual_.commands;
        if (!traits.at_resume) traits.at_resume = usual_.at_resume;
        all.push_back({name, member, value, std::move(help), std::move(traits), group_});
    }

    std::vector<Option> all;

private:
    const char* group_ = "";
    Option::Traits usual_;
};

void add_model(Table& table) {
    const std::vector<std::string> gpts{"gpt-tiny", "gpt-small", "gpt2"};
    const std::vector<std::string> llamas{"llama-1m", "llama-15m", "llama-110m"};
    const std::vector<std::string> texts = joined(gpts, llamas);
    const Option::Traits size{.fallback = "the model's", .range = at_least_1, .reset_by = {"model"}};
    Option::Traits of_text = size, of_llama = size, dropout = size;
    of_text.only_with = {"model", texts};
    of_llama.only_with = {"model", llamas};
    dropout.only_with = {"model", gpts};
    Option::Traits inner = of_llama;
    inner.fallback = "8/3 of the width, rounded up to a multiple of 32";
    inner.reset_by = {"model", "width"};
    dropout.fallback = std::string(1, '0');
    dropout.range = below_1;
    table.begin("What is trained", command::any_job, another_run);
    table.add("data", &S::data, "PATH",
              "A text file or a folder of text (each byte is a token), a .bin file of uint16 tokens, or a folder with "
              "IDX images and labels (.gz or not)",
              {.at_resume = ignored});  // its content is compared
    table.add(
        "model", &S::model, "NAME",
        "gpt-tiny (0.8M parameters), gpt-small (10.8M), gpt2 (124M), llama-1m (1.0M), llama-15m (14.7M), "
        "llama-110m (113M), resnet or mlp. The output head of a gpt or llama is its token embedding (tied weights)",
        {.fallback = "resnet for images, gpt-tiny for text and tokens", .choices = joined(texts, {"resnet", "mlp"})});
    table.add("layers", &S::layers, "N",
              "Blocks of a gpt or llama, hidden layers of an mlp, blocks per stage of a resnet", size);
    table.add("heads", &S::heads, "N", "Attention heads of a gpt or llama", of_text);
    table.add("kv-heads", &S::kv_heads, "N", "Heads of keys and values of a llama, each shared by several heads",
              of_llama);
    table.add("width", &S::width, "N", "Width of the model", size);
    table.add("inner", &S::inner, "N", "Width inside the MLP of a llama", inner);
    table.add("length", &S::length, "N", "Tokens per sample of a gpt or llama", of_text);
    table.add("norm", &S::norm, "NAME", "Normalization: layer or rms of a gpt, batch, group or rms of a resnet",
              {.fallback = "layer for a gpt, batch for a resnet",
               .choices = {"layer", "rms", "batch", "group"},
               .only_with = {"model", joined(gpts, {"resnet"})},
               .unrecorded = "layer",  // runs of a gpt; a resnet has always recorded its own
               .reset_by = {"model"}});
    table.add("dropout", &S::dropout, "P", "Dropout of a gpt", dropout);
}

void add_batch(Table& table) {
    table.begin("Batch and memory", command::any_job, another_cut);
    table.add("batch", &S::batch, "N", "Samples per optimizer step",
              {.at_resume = another_run, .range = a_batch, .reset_by = {"batch-schedule"}});
    table.add("micro-batch", &S::micro_batch, "N|auto",
              "Samples per forward and backward pass; auto measures a few sizes and picks the fastest that fits",
              {.fallback = "auto", .range = at_least_1, .choices = {"auto"}, .reset_by = {"batch", "batch-schedule"}});
    table.add(
        "recompute", &S::recompute, "NAME",
        "Activation checkpointing: auto, never or always. Recomputes the activations of blocks in the backward pass "
        "instead of storing them: slower, needs less memory, gives the same gradients",
        {.choices = {"auto", "never", "always"}, .reset_by = {"batch", "batch-schedule"}});
    table.add("batch-norm", &S::batch_norm, "NAME",
              "What BatchNorm layers do while a batch is cut. exact: normalise by the whole batch. deferred: by the "
              "micro-batch, and move the running statistics once a step, by those of the batch. frozen: by the running "
              "statistics, which stay. naive: by the micro-batch, and move them with each. group, rms: replace the "
              "layers. auto: exact if it fits and takes at most twice the time of the batch at once (a given "
              "--micro-batch may take longer), else deferred",
              {.choices = {"auto", "exact", "deferred", "frozen", "naive", "group", "rms"},
               .reset_by = {"batch", "batch-schedule"}});
    table.add(
        "device", &S::device, "NAME",
        "Where to train: cpu, cuda, cuda:1 or another accelerator of this LibTorch; `microbatch doctor` lists them",
        {.unrecorded = "cpu"});
    table.add("memory", &S::memory, "SIZE",
              "Budget for all tensors of the process on the device, such as 400MiB or 2GiB",
              {.fallback = "four fifths of the free memory"});
    table.add(
        "batch-schedule", &S::batch_schedule, "TEXT",
        "How the batch changes over the run: \"32 at 0, 128 at 2M tokens\", or \"seesaw to 512\", which doubles it "
        "each time the schedule halves the learning rate. --lr-rule scales the rate with the batch",
        {.at_resume = another_run, .fallback = "a constant batch", .reset_by = {"batch"}, .commands = command::train});
}

void add_optimizer(Table& table) {
    const OnlyWith sgd{"optimizer", {"sgd"}};
    table.begin("Optimizer", command::any_job, noted);
    table.add("optimizer", &S::optimizer, "NAME", "adamw or sgd",
              {.at_resume = another_run, .choices = {"adamw", "sgd"}});
    table.add("lr", &S::lr, "X", "Peak learning rate",
              {.fallback = by_optimizer(&OptimizerDefaults::lr), .range = not_negative, .reset_by = {"optimizer"}});
    table.add("lr-rule", &S::lr_rule, "NAME",
              "How to scale the learning rate with the batch: linear, sqrt, adam-sde (also changes betas and epsilon), "
              "beta2-time (changes beta2 only) or none",
              {.fallback = "sqrt for adamw, linear for sgd",
               .choices = {"none", "linear", "sqrt", "adam-sde", "beta2-time"}});
    table.add("reference-batch", &S::reference_batch, "N",
              "The batch that --lr and --final-lr were tuned for; without it, the rates are not scaled",
              {.range = at_least_1});
    table.add("clip", &S::clip, "X", "Clip the gradient of the whole batch to this norm; inf turns clipping off",
              {.range = above_0});
    table.add(
        "weight-decay", &S::weight_decay, "X", "Decoupled weight decay; not applied to biases and norms",
        {.fallback = by_optimizer(&OptimizerDefaults::weight_decay), .range = not_negative, .reset_by = {"optimizer"}});
    table.add("momentum", &S::momentum, "X", "Momentum of sgd",
              {.fallback = fmt::format("{}", default_momentum),
               .range = below_1,
               .only_with = sgd,
               .reset_by = {"optimizer"}});
    table.add("nesterov", &S::nesterov, "", "Use Nesterov momentum with sgd",
              {.only_with = sgd, .reset_by = {"optimizer"}});
    table.add("schedule", &S::schedule, "NAME", "constant, linear, cosine, wsd (warmup, stable, decay) or polynomial",
              {.choices = {"constant", "linear", "cosine", "wsd", "polynomial"}});
    table.add("warmup", &S::warmup, "INTERVAL", "Linear warmup, such as \"100 steps\" or \"1M tokens\"");
    table.add("final-lr", &S::final_lr, "X", "Learning rate at the end of the run",
              {.fallback = "0", .only_with = {"schedule", {"linear", "cosine", "wsd", "polynomial"}}});
    table.add("decay", &S::decay, "INTERVAL", "Length of the final decay of wsd",
              {.fallback = "a fifth of the run", .only_with = {"schedule", {"wsd"}}});
    table.add("power", &S::power, "X", "Power of the polynomial schedule",
              {.fallback = fmt::format("{}", Schedule().power), .only_with = {"schedule", {"polynomial"}}});
}

void add_length(Table& table) {
    table.begin(length_group, command::train + command::compare + command::advise, noted);
    table.add("steps", &S::steps, "N", "Optimizer steps, such as 500 or 10k", {.range = at_least_1});
    table.add("samples", &S::samples, "N", "Samples, such as 60000 or 1M", {.range = at_least_1});
    table.add("tokens", &S::tokens, "N", "Tokens, such as 10M; an image counts as one", {.range = at_least_1});
}

void add_guard(Table& table) {
    table.begin("Guard and noise", command::train, noted);
    table.add(
        "no-guard", &S::no_guard, "",
        "Refuse only steps whose loss or gradient norm is not finite. The guard also refuses steps where one of them "
        "is far above the last 128 steps, and detects a run whose loss climbs");
    table.add(
        "restores", &S::restores, "N",
        "How many times a diverging run rolls back to a snapshot, at a lower learning rate, before it is stopped");
    table.add("noise-every", &S::noise_every, "N",
              "Measure the gradient noise every N steps, if a copy of the gradients fits in memory; 0 turns it off");
}

void add_checkpoint(Table& table) {
    table.begin("Checkpoints", command::train, ignored);
    table.add("checkpoint-every", &S::checkpoint_every, "INTERVAL",
              "Interval between checkpoints: a killed run loses at most this much. \"0 steps\" saves only on interrupt "
              "and at "
              "the end");
    table.add("keep", &S::keep, "N", "Number of newest checkpoints to keep", {.range = at_least_1});
    table.add("keep-every", &S::keep_every, "INTERVAL",
              "Also keep the first checkpoint at or after each multiple of this, such as \"1000 steps\"");
    table.add("no-checkpoints", &S::no_checkpoints, "", "Write no checkpoints: a killed run cannot be resumed");
    table.add("resume", &S::resume, "",
              "Resume the run in --run bit-for-bit from its newest valid checkpoint, or start a new run if there is no "
              "checkpoint yet. Settings come from the checkpoint; flags override them",
              {.at_resume = not_recorded});
    table.add("resume-changed", &S::resume_changed, "",
              "Like --resume, but also if the model, data, batch, optimizer or seed differ from the checkpoint's",
              {.at_resume = not_recorded});
}

void add_run(Table& table) {
    table.begin("Run", command::any_job, not_recorded);
    table.add("seed", &S::seed, "N",
              "Random seed, up to 2^64 - 1. The same seed, threads and micro-batch give the same bits",
              {.at_resume = another_run});
    table.add("processes", &S::processes, "N",
              "Processes on this machine that train together, each on its share of the batch; --memory is that of one. "
              "Under torchrun, leave it out",
              {.at_resume = not_recorded, .range = up_to_1024, .commands = command::train});
    table.add(
        "shard-optimizer", &S::shard_optimizer, "NAME",
        "Whether each of several processes keeps only its share of the optimizer's state, and gives the others the "
        "parameters that it updates (ZeRO-1): auto, yes or no. auto: if memory limits the micro-batch, and it is "
        "faster so",
        {.at_resume = ignored, .choices = {"auto", "yes", "no"}, .unrecorded = "auto", .commands = command::train});
    table.add(
        "invariant", &S::invariant, "",
        "The same bits for any --micro-batch and any number of processes, each with as many --threads: the batch is "
        "computed in grains, which are summed without an order. Takes more time and memory; --micro-batch has no "
        "effect",
        {.at_resume = another_cut, .unrecorded = "false", .commands = command::train});
    table.add(
        "grain", &S::grain, "N",
        "Samples of a grain with --invariant: more are faster, and take more memory; fewer spread a small batch over "
        "more processes",
        {.at_resume = another_cut, .range = at_least_1, .unrecorded = "1", .commands = command::train});
    table.add("threads", &S::threads, "N", "Number of threads for torch's kernels",
              {.at_resume = ignored, .fallback = "torch's choice", .range = up_to_1024});
    table.add("config", &S::config, "FILE", "TOML file with any of these options as keys; flags override it");
    table.add("json", &S::json, "", "Print one JSON document to stdout; everything else goes to stderr",
              {.commands = command::any_job + command::doctor});
    table.add("run", &S::run, "DIR", "Folder for this run; must not contain a run yet, except with --resume",
              {.fallback = "runs/MODEL-TIME", .commands = command::train});
    table.add("run", &S::run, "DIR", "Compare the predictions for the run in this folder with its measurements",
              {.commands = command::plan});
    table.add("run", &S::run, "DIR", "Keep all runs in this new folder, each with the comparison in its report.html",
              {.commands = command::compare});
    table.add("run", &S::run, "DIR", "Folder of the run; it may still be training", {.commands = command::report});
    table.add("batches", &S::batches, "LIST",
              "Compare these batches instead, such as \"16, 64, 256\", all with the plan's micro-batch",
              {.commands = command::compare});
    table.add("seeds", &S::seeds, "N", "Number of runs of each strategy, with seeds from --seed upwards",
              {.range = up_to_1000, .commands = command::compare});
    table.add("check", &S::check, "",
              "Also continue training at 1, 2, 4 and 8 times the batch, to see which batches reach the same loss",
              {.commands = command::advise});
    table.add("no-verify", &S::no_verify, "",
              "Skip the check at the start that the gradient does not depend on how the batch is split",
              {.at_resume = ignored, .commands = command::train});
    table.add("quiet", &S::quiet, "", "Print only the progress, without the plan before it and the summary after it",
              {.commands = command::train});
}

}  // namespace

const std::vector<Option>& options() {
    static const std::vector<Option> all = [] {
        Table table;
        for (const auto add : {add_model, add_batch, add_optimizer, add_length, add_guard, add_checkpoint, add_run}) {
            add(table);
        }
        return table.all;
    }();
    return all;
}

}  // namespace microbatch::cli
