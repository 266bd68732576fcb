#include "microbatch/autograd/batch_norm_layers.h"

#include <ATen/core/grad_mode.h>
#include <ATen/ops/batch_norm_native.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/maximum.h>
#include <ATen/ops/scalar_tensor.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>
#include <torch/library.h>

#include <algorithm>
#include <mutex>
#include <optional>
#include <string_view>
#include <unordered_map>
#include <vector>

#include "microbatch/autograd/buffers.h"
#include "microbatch/core/error.h"

namespace microbatch {
namespace {

constexpr std::string_view mean_name = "running_mean", variance_name = "running_var",
                           count_name = "num_batches_tracked";

bool is_named(const std::string& buffer, std::string_view name) {
    if (!buffer.ends_with(name)) return false;
    return buffer.size() == name.size() || buffer[buffer.size() - name.size() - 1] == '.';
}

/// The buffer with this name in the layer of another one.
std::string beside(const std::string& buffer, std::string_view name) {
    return buffer.substr(0, buffer.rfind('.') + 1) + std::string(name);
}

/// Which object a layer belongs to, by its running mean.
class Registry {
public:
    static Registry& get() {
        static Registry registry;
        return registry;
    }

    void add(const at::Tensor& mean, BatchNormLayers* layers) {
        const std::lock_guard lock(mutex_);
        require_that(owners_.emplace(mean.unsafeGetTensorImpl(), layers).second,
                     "a BatchNorm layer is in use by two batches at the same time: finish the first one");
    }

    void remove(const BatchNormLayers* layers) {
        const std::lock_guard lock(mutex_);
        std::erase_if(owners_, [layers](const auto& one) { return one.second == layers; });
    }

    BatchNormLayers* owner_of(const std::optional<at::Tensor>& mean) {
        if (!mean || !mean->defined()) return nullptr;
        const std::lock_guard lock(mutex_);
        const auto found = owners_.find(mean->unsafeGetTensorImpl());
        return found == owners_.end() ? nullptr : found->second;
    }

private:
    std::mutex mutex_;
    std::unordered_map<const void*, BatchNormLayers*> owners_;
};

at::Tensor batch_norm(const at::Tensor& x, const std::optional<at::Tensor>& weight,
                      const std::optional<at::Tensor>& bias, const std::optional<at::Tensor>& mean,
                      const std::optional<at::Tensor>& variance, bool training, double momentum, double epsilon,
                      bool cudnn) {
    BatchNormLayers* layers = training ? Registry::get().owner_of(mean) : nullptr;
    if (layers != nullptr) return layers->run(x, weight, bias, *mean, *variance, momentum, epsilon, cudnn);
    return at::native::batch_norm(x, weight, bias, mean, variance, training, momentum, epsilon, cudnn);
}

// Not before somebody needs it: a program that only loads the library has torch's own operator.
void override_operator() {
    [[maybe_unused]] static const auto libraries = [] {
        std::vector<torch::Library*> made;
        for (const auto key :
             {c10::DispatchKey::AutogradCPU, c10::DispatchKey::AutogradCUDA, c10::DispatchKey::AutogradXPU,
              c10::DispatchKey::AutogradMPS, c10::DispatchKey::AutogradPrivateUse1}) {
            made.push_back(new torch::Library(torch::Library::IMPL, "aten", key, __FILE__, __LINE__));
            made.back()->impl("batch_norm", TORCH_FN(batch_norm));
        }
        return made;
    }();
}

// The layers in the same order in every process.
template <class Layers>
auto by_name(Layers& layers) {
    std::vector<decltype(&layers.begin()->second)> sorted;
    for (auto& [key, layer] : layers) sorted.push_back(&layer);
    std::ranges::sort(sorted, {}, [](const auto* one) -> const std::string& { return one->name; });
    return sorted;
}

/// Takes apart what BatchNormLayers::packed() has joined, in the same order.
class Unpacking {
public:
    explicit Unpacking(const at::Tensor& packed) : packed_(packed.cpu()) {}

    double number() { return packed_[at_++].item<double>(); }

    at::Tensor like(const at::Tensor& channels) {
        const at::Tensor values = packed_.slice(0, at_, at_ + channels.numel()).clone().to(channels.device());
        at_ += channels.numel();
        return values;
    }

private:
    at::Tensor packed_;
    std::int64_t at_ = 0;
};

}  // namespace

bool counts_batches(const NamedTensor& buffer) {
    return is_named(buffer.name, count_name);
}

bool has_batch_norm(const NamedTensors& buffers) {
    return std::ranges::any_of(buffers, [](const NamedTensor& one) { return is_named(one.name, mean_name); });
}

BatchNormLayers::BatchNormLayers(BatchNorm policy, const NamedTensors& buffers) : policy_(policy) {
    override_operator();
    std::map<std::string, at::Tensor> by_name;
    for (const NamedTensor& buffer : buffers) by_name.emplace(buffer.name, buffer.tensor);
    for (const NamedTensor& buffer : buffers) {
        if (counts_batches(buffer)) counts_.push_back({buffer.tensor, buffer.name, buffer.tensor.detach().clone()});
        if (!is_named(buffer.name, mean_name)) continue;
        const auto variance = by_name.find(beside(buffer.name, variance_name));
        if (variance == by_name.end()) continue;
        layers_.emplace(buffer.tensor.unsafeGetTensorImpl(), Layer{buffer.name, buffer.tensor, variance->second});
    }
    try {
        for (const auto& [key, layer] : layers_) Registry::get().add(layer.mean, this);
    } catch (...) {
        Registry::get().remove(this);
        throw;
    }
}

BatchNormLayers::~BatchNormLayers() {
    Registry::get().remove(this);
}

void BatchNormLayers::begin_forward() {
    for (const Count& count : counts_) overwrite_buffer(count.buffer, count.before);
    for (auto& [key, layer] : layers_) layer.next = 0;
    counting_ = true;
}

void BatchNormLayers::end_forward() {
    for (Count& count : counts_) count.after = count.buffer.detach().clone();
    counting_ = false;
}

at::Tensor BatchNormLayers::run(const at::Tensor& x, const std::optional<at::Tensor>& weight,
                                const std::optional<at::Tensor>& bias, const at::Tensor& mean,
                                const at::Tensor& variance, double momentum, double epsilon, bool cudnn) {
    if (policy_ == BatchNorm::frozen) {
        return at::native::batch_norm(x, weight, bias, mean, variance, /*training=*/false, momentum, epsilon, cudnn);
    }
    // With a momentum of 1, torch leaves the micro-batch's own statistics there.
    const at::Tensor own_mean = at::zeros_like(mean), own_variance = at::zeros_like(variance);
    at::Tensor y = at::native::batch_norm(x, weight, bias, own_mean, own_variance, /*training=*/true, /*momentum=*/1.0,
                                          epsilon, cudnn);
    if (!counting_) return y;
    const at::NoGradGuard no_grad;
    const double count = values_per_channel(x);
    Layer& layer = layers_.at(mean.unsafeGetTensorImpl());
    if (layer.next == layer.calls.size()) layer.calls.emplace_back();
    Collected& all = layer.calls[layer.next++];
    all.momentum = momentum;
    all.moments = pooled(all.moments, {count, own_mean.to(at::kDouble), own_variance.to(at::kDouble) * (count - 1.0)});
    return y;
}

at::Tensor BatchNormLayers::packed() const {
    const at::NoGradGuard no_grad;
    std::vector<at::Tensor> parts;
    const auto add = [&parts](const at::Tensor& one) { parts.push_back(one.to(at::kCPU, at::kDouble).reshape({-1})); };
    const auto add_number = [&parts](double one) { parts.push_back(at::scalar_tensor(one, at::kDouble).reshape({1})); };
    for (const Count& count : counts_) add(count.after.defined() ? count.after - count.before : count.before * 0);
    for (const Layer* layer : by_name(layers_)) {
        add_number(static_cast<double>(layer->calls.size()));
        for (const Collected& call : layer->calls) {
            add_number(call.moments.count);
            add_number(call.momentum);
            add(call.moments.mean);
            add(call.moments.m2);
        }
    }
    return parts.empty() ? at::zeros({0}, at::kDouble) : at::cat(parts);
}

void BatchNormLayers::pool(const std::vector<at::Tensor>& all) {
    const at::NoGradGuard no_grad;
    for (Count& count : counts_) count.after = count.before.detach().clone();
    for (Layer* layer : by_name(layers_)) layer->calls.clear();
    for (const at::Tensor& one : all) {
        Unpacking packed(one);
        // As many batches as the process that counted the most: one without samples counts none.
        for (Count& count : counts_) count.after = at::maximum(count.after, count.before + packed.number());
        for (Layer* layer : by_name(layers_)) {
            const auto calls = static_cast<std::size_t>(packed.number());
            if (layer->calls.size() < calls) layer->calls.resize(calls);
            for (std::size_t call = 0; call < calls; ++call) {
                Collected& so_far = layer->calls[call];
                const double count = packed.number();
                so_far.momentum = packed.number();
                const at::Tensor mean = packed.like(layer->mean), m2 = packed.like(layer->mean);
                so_far.moments = pooled(so_far.moments, {count, mean, m2});
            }
        }
    }
}

void BatchNormLayers::finish() {
    counting_ = false;
    for (const Count& count : counts_) {
        overwrite_buffer(count.buffer,
                         policy_ == BatchNorm::deferred && count.after.defined() ? count.after : count.before);
    }
    for (const auto& [key, layer] : layers_) {
        for (const Collected& all : layer.calls) {
            move_running_statistics(layer.mean, layer.variance, all.moments, all.momentum);
        }
    }
}

void BatchNormLayers::save(const StateWriter& writer) const {
    for (const Count& count : counts_) writer.section("counts").put(count.name, count.before);
    for (const auto& [key, layer] : layers_) {
        for (std::size_t call = 0; call < layer.calls.size(); ++call) {
            const StateWriter one = writer.section("calls").section(layer.name).section(std::to_string(call));
            one.put("mean", layer.calls[call].moments.mean);
            one.put("m2", layer.calls[call].moments.m2);
            one.put("count", layer.calls[call].moments.count);
            one.put("momentum", layer.calls[call].momentum);
        }
    }
}

void BatchNormLayers::load(const StateReader& reader) {
    for (Count& count : counts_) {
        const StateReader counts = reader.section("counts");
        if (counts.has(count.name)) count.before = counts.tensor(count.name).get_own();
    }
    for (auto& [key, layer] : layers_) {
        const auto device = layer.mean.device();
        for (std::size_t call = 0;; ++call) {
            const StateReader one = reader.section("calls").section(layer.name).section(std::to_string(call));
            if (!one.exists()) break;
            layer.calls.push_back({.moments = {.count = one.positive("count"),
                                               .mean = one.tensor("mean").get_own().to(device),
                                               .m2 = one.tensor("m2").get_own().to(device)},
                                   .momentum = one.number("momentum")});
        }
    }
}

}  // namespace microbatch
