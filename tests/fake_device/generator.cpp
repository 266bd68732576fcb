#include "fake_device/generator.h"

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/core/Tensor.h>

#include "fake_device/fake_device.h"

namespace fake {
namespace {

/// Draws the numbers of a CPU generator that nothing else draws from.
struct Generator final : c10::GeneratorImpl {
    explicit Generator(std::uint64_t seed)
        : c10::GeneratorImpl(fake::device(), c10::DispatchKeySet(c10::DispatchKey::PrivateUse1)),
          numbers(at::detail::createCPUGenerator(seed)) {}

    void set_current_seed(std::uint64_t seed) override { numbers.set_current_seed(seed); }
    void set_offset(std::uint64_t offset) override { numbers.set_offset(offset); }
    std::uint64_t get_offset() const override { return numbers.get_offset(); }
    std::uint64_t current_seed() const override { return numbers.current_seed(); }
    std::uint64_t seed() override { return numbers.seed(); }
    void set_state(const c10::TensorImpl& state) override { numbers.unsafeGetGeneratorImpl()->set_state(state); }
    c10::intrusive_ptr<c10::TensorImpl> get_state() const override {
        return numbers.unsafeGetGeneratorImpl()->get_state();
    }
    Generator* clone_impl() const override {
        auto* const copy = new Generator(0);
        copy->numbers = numbers.clone();
        return copy;
    }

    mutable at::Generator numbers;
};

const at::Generator& numbers_of(const at::Generator& generator) {
    return dynamic_cast<const Generator&>(*generator.unsafeGetGeneratorImpl()).numbers;
}

}  // namespace

at::Generator make_generator() {
    return at::make_generator<Generator>(c10::default_rng_seed_val);
}

const at::Generator& default_generator() {
    static const at::Generator one = make_generator();
    return one;
}

DrawFrom::DrawFrom(torch::jit::Stack& stack, std::size_t arguments) : generator_(default_generator()) {
    for (std::size_t i = stack.size() - arguments; i < stack.size(); ++i) {
        if (!stack[i].isGenerator()) continue;
        if (stack[i].toGenerator().device().is_cpu()) return;  // draws from that one
        generator_ = stack[i].toGenerator();
        stack[i] = c10::IValue();
    }
    at::Generator cpu = at::detail::getDefaultCPUGenerator();
    cpu_state_ = cpu.get_state();
    cpu.set_state(numbers_of(generator_).get_state());
}

DrawFrom::~DrawFrom() {
    if (!cpu_state_.defined()) return;
    at::Generator cpu = at::detail::getDefaultCPUGenerator();
    at::Generator numbers = numbers_of(generator_);
    numbers.set_state(cpu.get_state());
    cpu.set_state(cpu_state_);
}

}  // namespace fake
