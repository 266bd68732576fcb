#include "cli/options/flags.h"

#include <fmt/format.h>

#include "cli/options/refuse.h"

namespace microbatch::cli {
namespace {

// A flag that counts: "64", "10k", "1M".
template <class Target>
CLI::Option* add_count(CLI::App& command, const char* flag, Target& target, const char* help, std::int64_t least = 0) {
    return command.add_option_function<std::string>(
        flag,
        [flag, &target, least](const std::string& text) {
            const std::int64_t count = read_flag(flag, [&] { return parse_count(text); });
            if (count < least) refuse(fmt::format("{} is {}; it must be at least {}", flag, count, least));
            target = count;
        },
        help);
}

}  // namespace

void refuse_empty_values(const CLI::App& command) {
    for (const CLI::Option* option : command.get_options()) {
        for (const std::string& value : option->results()) {
            if (value.empty()) refuse(fmt::format("{} is empty: give it a value, or leave it out", option->get_name()));
        }
    }
}

std::string reworded(const CLI::Error& error) {
    const std::string message = error.what();
    const std::size_t twice = message.find(": At Most 1 required but received");
    if (twice != std::string::npos) return message.substr(0, twice) + " is given twice";
    const std::string prefix = "Could not convert: ";
    if (!message.starts_with(prefix)) return message;
    return fmt::format("cannot read {}: a number is expected", message.substr(prefix.size()));
}

void add_job_options(CLI::App& command, Settings& s) {
    const char* what = "What is trained";
    command
        .add_option("--data", s.data,
                    "A text file or a folder of text (each byte a token), a .bin of uint16 tokens, or a folder with "
                    "IDX images and labels (.gz or not)")
        ->type_name("PATH")
        ->group(what);
    command
        .add_option("--model", s.model,
                    "gpt-tiny (0.8M parameters), gpt-small (10.8M), gpt2 (124M), resnet or mlp; without it resnet for "
                    "images and gpt-tiny for the rest")
        ->type_name("NAME")
        ->group(what);
    add_count(command, "--layers", s.layers, "Blocks of a gpt, hidden layers of an mlp, blocks a stage of a resnet")
        ->type_name("N")
        ->group(what);
    add_count(command, "--heads", s.heads, "Attention heads of a gpt")->type_name("N")->group(what);
    add_count(command, "--width", s.width, "Width of the model")->type_name("N")->group(what);
    add_count(command, "--length", s.length, "Tokens a sample, for a gpt", 1)->type_name("N")->group(what);
    command.add_option("--norm", s.norm, "batch or group, for a resnet (default batch)")
        ->type_name("NAME")
        ->group(what);
    command.add_option("--dropout", s.dropout, "Dropout of a gpt (default 0)")->type_name("P")->group(what);

    const char* batch = "Batch and memory";
    add_count(command, "--batch", s.batch, "Samples per optimizer step (default 64)")->type_name("N")->group(batch);
    command
        .add_option("--micro-batch", s.micro_batch,
                    "Samples per forward/backward; auto (the default) measures and takes the fastest that fits")
        ->type_name("N|auto")
        ->group(batch);
    command
        .add_option("--recompute", s.recompute,
                    "auto (the default), never or always: compute activations of blocks again in backward, not keep "
                    "them; slower, less memory, the same gradients")
        ->type_name("NAME")
        ->group(batch);
    command
        .add_option("--memory", s.memory,
                    "Budget of all tensors of the process, such as 400MiB or 2GiB; without it four fifths of the "
                    "memory that is free")
        ->type_name("SIZE")
        ->group(batch);

    const char* optimizer = "Optimizer";
    command.add_option("--optimizer", s.optimizer, "adamw (default) or sgd")->type_name("NAME")->group(optimizer);
    command.add_option("--lr", s.lr, "Peak learning rate (default 0.001 for adamw, 0.05 for sgd)")
        ->type_name("X")
        ->group(optimizer);
    command
        .add_option(
            "--lr-rule", s.lr_rule,
            "How the rate follows the batch: linear, sqrt, adam-sde (betas and epsilon, too), beta2-time (beta2 "
            "alone) or none (default: sqrt for adamw, linear for sgd)")
        ->type_name("NAME")
        ->group(optimizer);
    add_count(command, "--reference-batch", s.reference_batch,
              "The batch for which --lr and --final-lr are right; without it they are taken as they are")
        ->type_name("N")
        ->group(optimizer);
    command.add_option("--clip", s.clip, "Largest gradient norm of the batch (default 1; inf: no clipping)")
        ->type_name("X")
        ->group(optimizer);
    command
        .add_option("--weight-decay", s.weight_decay,
                    "Decoupled weight decay, not on biases and norms (default 0.1 for adamw, 0.0005 for sgd)")
        ->type_name("X")
        ->group(optimizer);
    command.add_option("--momentum", s.momentum, "Momentum of sgd (default 0.9)")->type_name("X")->group(optimizer);
    command.add_flag("--nesterov", s.nesterov, "Nesterov momentum for sgd")->group(optimizer);
    command.add_option("--schedule", s.schedule, "constant, linear, cosine (default), wsd or polynomial")
        ->type_name("NAME")
        ->group(optimizer);
    command.add_option("--warmup", s.warmup, "Linear warmup, such as \"100 steps\" or \"1M tokens\" (default none)")
        ->type_name("INTERVAL")
        ->group(optimizer);
    command.add_option("--final-lr", s.final_lr, "Learning rate at the end (default 0)")
        ->type_name("X")
        ->group(optimizer);
    command.add_option("--decay", s.decay, "Length of wsd's final decay (default a fifth of the run)")
        ->type_name("INTERVAL")
        ->group(optimizer);
    command.add_option("--power", s.power, "Power of the polynomial schedule (default 2)")
        ->type_name("X")
        ->group(optimizer);

    const char* run = "Run";
    add_count(command, "--seed", s.seed, "Same seed, threads and cut: same bits (default 1)")
        ->type_name("N")
        ->group(run);
    add_count(command, "--threads", s.threads, "Threads of torch's kernels (default: torch's own choice)", 1)
        ->type_name("N")
        ->group(run);
    command.add_option("--config", s.config, "TOML file with any of these flags as keys; flags win")
        ->type_name("FILE")
        ->group(run);
    command.add_flag("--json", s.json, "Print one JSON document for a program to read; the rest goes to stderr")
        ->group(run);
}

void add_train_options(CLI::App& command, Settings& s) {
    command
        .add_option("--batch-schedule", s.batch_schedule,
                    "The batch over the run, \"32 at 0, 128 at 2M tokens\", or \"seesaw to 512\": it doubles where the "
                    "rate has halved; the rate follows by --lr-rule")
        ->type_name("TEXT")
        ->group("Batch and memory");
    const char* group = "Guard and noise";
    command
        .add_flag("--no-guard", s.no_guard,
                  "Refuse only what is not finite; not losses and gradient norms far beyond those of the last 128 "
                  "steps, nor a run whose loss climbs")
        ->group(group);
    add_count(command, "--restores", s.restores,
              "How often a run that diverges goes back to a snapshot, at a smaller rate, before it is stopped (default "
              "3)")
        ->type_name("N")
        ->group(group);
    add_count(command, "--noise-every", s.noise_every,
              "Measure the gradient's noise every N steps, where a copy of the gradients fits (default 20; 0: never)")
        ->type_name("N")
        ->group(group);
}

void add_checkpoint_options(CLI::App& command, Settings& s) {
    const char* group = "Checkpoints";
    command
        .add_option(
            "--checkpoint-every", s.checkpoint_every,
            "How often the run is saved, and so how much of it a kill can lose (default \"100 steps\"; \"0 steps\": "
            "when it is interrupted, and at its end)")
        ->type_name("INTERVAL")
        ->group(group);
    add_count(command, "--keep", s.keep, "How many of the newest checkpoints stay (default 3)", 1)
        ->type_name("N")
        ->group(group);
    command
        .add_option("--keep-every", s.keep_every,
                    "The first checkpoint at or after each multiple of this stays, too, such as \"1000 steps\"")
        ->type_name("INTERVAL")
        ->group(group);
    command.add_flag("--no-checkpoints", s.no_checkpoints, "Write none: a run that is killed is lost")->group(group);
    command
        .add_flag("--resume", s.resume,
                  "Go on with the run of --run from its newest checkpoint that is whole, to the same bits; with no "
                  "checkpoint there, begin. Settings come from the checkpoint; flags win")
        ->group(group);
    command
        .add_flag("--resume-changed", s.resume_changed,
                  "As --resume, although model, data, batch, optimizer or seed are not those of the checkpoint")
        ->group(group);
}

void add_length_options(CLI::App& command, Settings& s, const std::string& fallback) {
    const std::string group = fmt::format("How long (one of them; default {})", fallback);
    command.add_option("--steps", s.steps, "Optimizer steps, such as 500 or 10k")->type_name("N")->group(group);
    command.add_option("--samples", s.samples, "Samples, such as 60000 or 1M")->type_name("N")->group(group);
    command.add_option("--tokens", s.tokens, "Tokens, such as 10M (an image counts as one)")
        ->type_name("N")
        ->group(group);
}

}  // namespace microbatch::cli
