#include <ATen/Parallel.h>
#include <ATen/Version.h>
#include <ATen/ops/matmul.h>
#include <ATen/ops/randn.h>
#include <c10/util/Exception.h>
#include <fmt/format.h>
#include <torch/version.h>

#include <chrono>
#include <cstdlib>
#include <filesystem>
#include <nlohmann/json.hpp>
#include <thread>

#include "cli/commands/commands.h"
#include "cli/print/output.h"
#include "microbatch/analysis/verify.h"
#include "microbatch/core/error.h"
#include "microbatch/core/units.h"
#include "microbatch/memory/budget_allocator.h"
#include "microbatch/memory/machine.h"
#include "microbatch/memory/meter.h"
#include "microbatch/models/gpt.h"
#include "microbatch/ops/cross_entropy.h"
#include "microbatch/runtime/device.h"

namespace microbatch::cli {
namespace {

// odd: slower or less complete than possible; broken: no result on this machine can be trusted.
enum class State { good, odd, broken };

struct Finding {
    std::string name, value;
    State state = State::good;
};

Finding check_budget() {
    const std::int64_t before = memory_use().live_bytes;
    bool refused = false;
    try {
        const BudgetScope tight(before + 1024);
        at::zeros({1024}, at::kDouble);
    } catch (const c10::OutOfMemoryError&) {
        refused = true;
    }
    const bool good = refused && memory_use().live_bytes == before;
    return {"memory budget", good ? "enforced: an allocation beyond it fails" : "not enforced",
            good ? State::good : State::broken};
}

Finding check_gradients(at::Device device) {
    at::manual_seed(1);
    Gpt model(GptConfig{.layers = 2, .heads = 2, .width = 32, .length = 16, .vocabulary = 64});
    model->to(device);
    const Batch batch{{at::randint(64, {5, 16}, at::kLong), at::randint(64, {5, 16}, at::kLong)}};
    const Verification found =
        verify(*model, batch,
               on_device(
                   [&model](const Batch& micro) -> WeightedLoss {
                       return {cross_entropy_sum(model->forward(micro.fields[0]), micro.fields[1]),
                               count_targets(micro.fields[1])};
                   },
                   device),
               3);
    return {device.is_cpu() ? "accumulated gradients" : fmt::format("the same on {}", device.str()),
            found.ok() ? "same as those of the whole batch" : "differ from those of the whole batch",
            found.ok() ? State::good : State::broken};
}

double matrix_product_gflops() {
    const at::Tensor a = at::randn({1024, 1024});
    const at::Tensor b = at::randn({1024, 1024});
    double best = 0.0;
    for (int i = 0; i < 5; ++i) {
        const auto started = std::chrono::steady_clock::now();
        at::matmul(a, b);
        const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - started).count();
        best = std::max(best, 2.0 * 1024 * 1024 * 1024 / seconds / 1e9);
    }
    return best;
}

Finding check_load() {
    double load = 0.0;
    if (getloadavg(&load, 1) != 1) return {"load", "unknown"};
    const auto cores = static_cast<double>(std::thread::hardware_concurrency());
    const bool busy = load > 0.75 * cores;
    return {"load",
            fmt::format("{:.1f} on {} cores{}", load, cores,
                        busy ? ": other processes use the cores; expect steps to be several times slower" : ""),
            busy ? State::odd : State::good};
}

Finding check_data(const char* name, const char* path) {
    const bool there = std::filesystem::exists(path);
    return {name, there ? path : fmt::format("not installed ({}); `make demo` installs it", path)};
}

// An accelerator that fails does not hide what is said of the CPU.
std::vector<Finding> check_device(at::Device device) {
    try {
        const Meter& meter = meter_of(device);
        return {{device.str(), fmt::format("{} free", format_bytes(meter.available()))}, check_gradients(device)};
    } catch (const Error& error) {
        return {{device.str(), error.what(), State::odd}};
    } catch (const c10::Error& error) {
        return {{device.str(), error.what_without_backtrace(), State::odd}};
    }
}

std::vector<Finding> examine() {
    std::vector<Finding> findings{
        {"microbatch", MICROBATCH_VERSION},
        {"torch", fmt::format("{}, kernels for {}", TORCH_VERSION, at::get_cpu_capability())},
        {"threads", fmt::format("{} of {} cores", at::get_num_threads(), std::thread::hardware_concurrency())},
        check_load(),
        {"memory",
         fmt::format("{} free of {}", format_bytes(available_memory_bytes()), format_bytes(physical_memory_bytes()))},
        {"matrix product", fmt::format("{:.0f} GFLOP/s at 1024 x 1024 x 1024, float32", matrix_product_gflops())},
        check_budget(),
        check_gradients(at::kCPU),
        check_data("sample text", "/usr/share/games/fortunes"),
        check_data("sample images", "/usr/share/datasets/fashion-mnist")};
    for (const at::Device& device : devices_here()) {
        if (device.is_cpu()) continue;
        for (Finding& finding : check_device(device)) findings.push_back(std::move(finding));
    }
    return findings;
}

int examine_machine(const Arguments& arguments) {
    install_budget_allocator();
    const std::vector<Finding> findings = examine();
    bool broken = false;
    nlohmann::ordered_json document;
    for (const Finding& finding : findings) {
        broken = broken || finding.state == State::broken;
        document[finding.name] = {{"value", finding.value}, {"good", finding.state == State::good}};
        if (arguments.settings.json) continue;
        print(stdout, "{}  {:<22} {}\n", finding.state == State::good ? "ok" : "!!", finding.name, finding.value);
    }
    if (arguments.settings.json) print(stdout, "{}\n", document.dump(2));
    return broken ? static_cast<int>(ErrorKind::usage) : 0;
}

}  // namespace

CommandSpec doctor_command() {
    return {
        .command = command::doctor,
        .name = "doctor",
        .summary = "Check that Microbatch works on this machine",
        .footer =
            R"(Exit code 2 if Microbatch does not work on this machine: the memory budget is not enforced, or accumulated
gradients differ from those of the whole batch.)",
        .run = examine_machine};
}

}  // namespace microbatch::cli
