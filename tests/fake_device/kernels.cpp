#include <ATen/EmptyTensor.h>
#include <ATen/core/Tensor.h>
#include <ATen/native/CPUFallback.h>
#include <ATen/native/Resize.h>
#include <ATen/ops/_local_scalar_dense.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/convolution.h>
#include <ATen/ops/convolution_backward.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/native_batch_norm.h>
#include <ATen/ops/set_native.h>
#include <ATen/ops/unfold_native.h>
#include <ATen/ops/view_native.h>
#include <torch/library.h>

#include <cstring>

#include "fake_device/fake_device.h"
#include "fake_device/generator.h"
#include "fake_device/memory.h"
#include "fake_device/stream.h"

namespace fake {
namespace {

constexpr c10::DispatchKeySet keys(c10::DispatchKey::PrivateUse1);

void require_fake(std::optional<at::Device> where, std::optional<bool> pinned) {
    TORCH_CHECK(!where || where->index() <= 0, "the device ", where->str(), " does not exist: there is one, fake:0");
    TORCH_CHECK(!pinned.value_or(false), "only memory of the host can be pinned");
}

at::Tensor empty(c10::SymIntArrayRef shape, std::optional<at::ScalarType> type, std::optional<at::Layout>,
                 std::optional<at::Device> where, std::optional<bool> pinned, std::optional<at::MemoryFormat> format) {
    require_fake(where, pinned);
    return at::detail::empty_generic(C10_AS_INTARRAYREF_SLOW(shape), &allocator(), keys,
                                     type.value_or(at::get_default_dtype_as_scalartype()), format);
}

at::Tensor empty_strided(c10::SymIntArrayRef shape, c10::SymIntArrayRef strides, std::optional<at::ScalarType> type,
                         std::optional<at::Layout>, std::optional<at::Device> where, std::optional<bool> pinned) {
    require_fake(where, pinned);
    return at::detail::empty_strided_generic(C10_AS_INTARRAYREF_SLOW(shape), C10_AS_INTARRAYREF_SLOW(strides),
                                             &allocator(), keys, type.value_or(at::get_default_dtype_as_scalartype()));
}

at::Tensor as_strided(const at::Tensor& of, c10::SymIntArrayRef shape, c10::SymIntArrayRef strides,
                      std::optional<c10::SymInt> offset) {
    return at::native::as_strided_tensorimpl(of, C10_AS_INTARRAYREF_SLOW(shape), C10_AS_INTARRAYREF_SLOW(strides),
                                             offset ? std::optional(offset->expect_int()) : std::nullopt);
}

at::Tensor view(const at::Tensor& of, c10::SymIntArrayRef shape) {
    return at::native::view(of, C10_AS_INTARRAYREF_SLOW(shape));
}

at::Tensor reshape_alias(const at::Tensor& of, c10::SymIntArrayRef shape, c10::SymIntArrayRef strides) {
    return at::native::_reshape_alias(of, C10_AS_INTARRAYREF_SLOW(shape), C10_AS_INTARRAYREF_SLOW(strides));
}

const at::Tensor& resize(const at::Tensor& of, c10::SymIntArrayRef wanted, std::optional<at::MemoryFormat> format) {
    const at::IntArrayRef shape = C10_AS_INTARRAYREF_SLOW(wanted);
    auto* const tensor = of.unsafeGetTensorImpl();
    std::int64_t count = 1;
    for (const std::int64_t size : shape) count *= size;
    const std::size_t bytes = (static_cast<std::size_t>(count + of.storage_offset())) * of.dtype().itemsize();
    if (bytes > of.storage().nbytes()) resize_storage(of.storage(), bytes);
    tensor->set_sizes_contiguous(shape);
    if (format && *format != at::MemoryFormat::Preserve) tensor->empty_tensor_restride(*format);
    return of;
}

at::Tensor copy_from(const at::Tensor& from, const at::Tensor& to, bool non_blocking) {
    fake::copy(from, to, non_blocking);
    return to;
}

at::Tensor copy_from_and_resize(const at::Tensor& from, const at::Tensor& to) {
    if (to.sizes() != from.sizes()) to.resize_(from.sizes());
    fake::copy(from, to, /*non_blocking=*/false);
    return to;
}

at::Scalar scalar(const at::Tensor& of) {
    count_scalar();
    return at::_local_scalar_dense(as_cpu(of));
}

at::Tensor& set_tensor(at::Tensor& to, const at::Tensor& source) {
    return at::native::set_tensor_(to, source);
}
at::Tensor& set_storage(at::Tensor& to, at::Storage source) {
    return at::native::set_(to, std::move(source));
}
at::Tensor& set_storage_at(at::Tensor& to, at::Storage source, c10::SymInt offset, c10::SymIntArrayRef shape,
                           c10::SymIntArrayRef strides) {
    return at::native::set_storage_cpu_(to, std::move(source), offset.expect_int(), C10_AS_INTARRAYREF_SLOW(shape),
                                        C10_AS_INTARRAYREF_SLOW(strides));
}

at::Tensor to_device(const at::Tensor& result) {
    if (!result.defined()) return result;
    const at::Tensor there = at::empty_like(result, result.options().device(device()));
    as_cpu(there).copy_(result);
    return there;
}

// For devices that torch does not know, convolutions end in these two.
at::Tensor convolve(const at::Tensor& x, const at::Tensor& weight, const std::optional<at::Tensor>& bias,
                    at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation, bool transposed,
                    at::IntArrayRef output_padding, std::int64_t groups) {
    begin_kernel();
    const OnDevice now;
    return to_device(at::convolution(as_cpu(x), as_cpu(weight), bias ? std::optional(as_cpu(*bias)) : std::nullopt,
                                     stride, padding, dilation, transposed, output_padding, groups));
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> convolve_backward(const at::Tensor& gradient, const at::Tensor& x,
                                                                 const at::Tensor& weight, at::IntArrayRef stride,
                                                                 at::IntArrayRef padding, at::IntArrayRef dilation,
                                                                 bool transposed, at::IntArrayRef output_padding,
                                                                 std::int64_t groups, std::array<bool, 3> wanted) {
    begin_kernel();
    const OnDevice now;
    const std::int64_t bias[] = {gradient.size(1)};
    const auto [of_x, of_weight, of_bias] = at::convolution_backward(
        as_cpu(gradient), as_cpu(x), as_cpu(weight), wanted[2] ? at::OptionalIntArrayRef(bias) : std::nullopt, stride,
        padding, dilation, transposed, output_padding, groups, wanted);
    return {to_device(of_x), to_device(of_weight), to_device(of_bias)};
}

// The schema does not say that it changes the running statistics, so it cannot run on copies.
std::tuple<at::Tensor, at::Tensor, at::Tensor> batch_norm(const at::Tensor& x, const std::optional<at::Tensor>& weight,
                                                          const std::optional<at::Tensor>& bias,
                                                          const std::optional<at::Tensor>& mean,
                                                          const std::optional<at::Tensor>& variance, bool training,
                                                          double momentum, double epsilon) {
    const auto on_cpu = [](const std::optional<at::Tensor>& one) {
        return one && one->defined() ? std::optional(as_cpu(*one)) : std::nullopt;
    };
    begin_kernel();
    const OnDevice now;
    const auto [y, saved_mean, saved_scale] = at::native_batch_norm(
        as_cpu(x), on_cpu(weight), on_cpu(bias), on_cpu(mean), on_cpu(variance), training, momentum, epsilon);
    return {to_device(y), to_device(saved_mean), to_device(saved_scale)};
}

// Everything else, by the CPU's kernel on the same memory.
void run_on_cpu(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
    const bool draws = op.hasTag(at::Tag::nondeterministic_seeded);
    const std::string& name = op.schema().name();
    const bool waits = op.hasTag(at::Tag::dynamic_output_shape) || name == "aten::equal";
    if (waits) count_scalar();
    begin_kernel();
    const OnDevice now;
    std::optional<DrawFrom> generator;
    if (draws) generator.emplace(*stack, op.schema().arguments().size());
    at::native::cpu_fallback(op, stack);
}

}  // namespace

void resize_storage(const c10::Storage& storage, std::size_t bytes) {
    auto* const kept = storage.unsafeGetStorageImpl();
    c10::DataPtr larger = allocator().allocate(bytes);
    const std::size_t both = std::min(bytes, kept->nbytes());
    if (both > 0) std::memcpy(behind(larger.get()), behind(kept->data()), both);
    kept->set_data_ptr_noswap(std::move(larger));
    kept->set_nbytes(bytes);
}

TORCH_LIBRARY_IMPL(aten, PrivateUse1, library) {
    library.impl("empty.memory_format", &empty);
    library.impl("empty_strided", &empty_strided);
    library.impl("as_strided", &as_strided);
    library.impl("view", &view);
    library.impl("_reshape_alias", &reshape_alias);
    library.impl("unfold", &at::native::unfold);
    library.impl("convolution_overrideable", &convolve);
    library.impl("convolution_backward_overrideable", &convolve_backward);
    library.impl("native_batch_norm", &batch_norm);
    library.impl("resize_", &resize);
    library.impl("_copy_from", &copy_from);
    library.impl("_copy_from_and_resize", &copy_from_and_resize);
    library.impl("_local_scalar_dense", &scalar);
    library.impl("set_.source_Tensor", &set_tensor);
    library.impl("set_.source_Storage", &set_storage);
    library.impl("set_.source_Storage_storage_offset", &set_storage_at);
}

// Torch has others of these, out of smaller operators, which a fallback for all does not replace.
TORCH_LIBRARY_IMPL(aten, PrivateUse1, library) {
    for (const char* name : {"native_group_norm", "native_group_norm_backward"}) {
        library.impl(name, torch::CppFunction::makeFromBoxedFunction<&run_on_cpu>());
    }
}

TORCH_LIBRARY_IMPL(_, PrivateUse1, library) {
    library.fallback(torch::CppFunction::makeFromBoxedFunction<&run_on_cpu>());
}

}  // namespace fake
