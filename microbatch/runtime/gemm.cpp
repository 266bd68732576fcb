#include "microbatch/runtime/gemm.h"

#include <ATen/Context.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/mm.h>

#include <string_view>

// MKL's function, which torch's own builds contain; a torch without MKL may have none, or a different one.
extern "C" __attribute__((weak)) int MKL_Set_Num_Threads_Local(int threads);
extern "C" __attribute__((weak)) void sgemm_(const char* transpose_a, const char* transpose_b, const int* rows,
                                             const int* columns, const int* depth, const float* alpha, const float* a,
                                             const int* a_row, const float* b, const int* b_row, const float* beta,
                                             float* c, const int* c_row);

namespace microbatch {

namespace {

/// oneDNN's x weightᵀ + bias as torch has registered it: mkldnn::_linear_pointwise.
using LinearSignature = at::Tensor(const at::Tensor& x, const at::Tensor& weight, const std::optional<at::Tensor>& bias,
                                   std::string_view then, c10::List<std::optional<at::Scalar>> then_scalars,
                                   std::optional<std::string_view> then_algorithm);
using Linear = c10::TypedOperatorHandle<LinearSignature>;

/// Measured only on Zen 4, where MKL uses an AVX2 kernel and oneDNN an AVX-512 kernel.
bool onednn_suits_the_processor() {
#if defined(__x86_64__) && defined(__GNUC__)
    __builtin_cpu_init();
    return __builtin_cpu_is("amd") && __builtin_cpu_supports("avx512f");
#else
    return false;
#endif
}

std::optional<Linear> find_linear() {
    if (!onednn_suits_the_processor()) return std::nullopt;
    const auto found = c10::Dispatcher::singleton().findSchema({"mkldnn::_linear_pointwise", ""});
    if (!found || !found->hasKernelForDispatchKey(c10::DispatchKey::CPU)) return std::nullopt;
    try {
        return found->typed<LinearSignature>();
    } catch (const c10::Error&) {
        return std::nullopt;  // another torch, another signature
    }
}

/// oneDNN's product; nullptr if MKL is as fast.
const Linear* onednn_linear() {
    static const std::optional<Linear> linear = find_linear();
    return linear && at::globalContext().userEnabledMkldnn() ? &*linear : nullptr;
}

bool is_float_matrix(const at::Tensor& tensor) {
    return tensor.dim() == 2 && tensor.scalar_type() == at::kFloat && tensor.layout() == at::kStrided &&
           tensor.is_cpu() && !tensor.is_neg();
}

constexpr std::int64_t enough_numbers = std::int64_t{48} << 10;

/// True if oneDNN gains more than its overhead of ten microseconds: see docs/decisions/gradients-in-the-product.md. A
/// bound on the multiplications would be closer, but the planner matches the allocations of two small micro-batches,
/// and oneDNN's scratch is one more: many models would change sides between the two.
bool is_large(const at::Tensor& x, const at::Tensor& matrix) {
    constexpr std::int64_t many_rows = 64, few_rows = 2, many_numbers = std::int64_t{512} << 10;
    const std::int64_t rows = x.size(0);
    return (rows >= many_rows && matrix.numel() >= enough_numbers) ||
           (rows >= few_rows && matrix.numel() >= many_numbers);
}

bool suits_onednn(const at::Tensor& x, const at::Tensor& matrix, const std::optional<at::Tensor>& bias) {
    return is_large(x, matrix) && x.size(1) == matrix.size(0) && x.is_contiguous() &&
           (matrix.is_contiguous() || matrix.t().is_contiguous()) &&
           (!bias || (bias->dim() == 1 && bias->size(0) == matrix.size(1) && bias->is_contiguous() &&
                      bias->scalar_type() == at::kFloat));
}

at::Tensor mkl_product(const at::Tensor& x, const at::Tensor& matrix, const std::optional<at::Tensor>& bias) {
    return bias ? at::addmm(*bias, x, matrix) : at::mm(x, matrix);
}

/// Sets MKL to one thread: with several, it copies even small matrices.
class OneThreadOfMkl {
public:
    OneThreadOfMkl() : before_(MKL_Set_Num_Threads_Local(1)) {}
    OneThreadOfMkl(const OneThreadOfMkl&) = delete;
    OneThreadOfMkl& operator=(const OneThreadOfMkl&) = delete;
    ~OneThreadOfMkl() { MKL_Set_Num_Threads_Local(before_); }

private:
    int before_;
};

at::Tensor tensor_of(const MatrixView& matrix, std::int64_t rows, std::int64_t columns) {
    auto* const values = const_cast<float*>(matrix.values);
    return matrix.transposed ? at::from_blob(values, {rows, columns}, {1, matrix.row}, at::kFloat)
                             : at::from_blob(values, {rows, columns}, {matrix.row, 1}, at::kFloat);
}

}  // namespace

at::Tensor gemm(const at::Tensor& x, const at::Tensor& matrix, const std::optional<at::Tensor>& bias) {
    const at::AutoDispatchBelowADInplaceOrView no_gradient;
    if (!is_float_matrix(x) || !is_float_matrix(matrix) || !suits_onednn(x, matrix, bias)) {
        return mkl_product(x, matrix, bias);
    }
    const Linear* linear = onednn_linear();
    if (linear == nullptr) return mkl_product(x, matrix, bias);
    return linear->call(x, matrix.t(), bias, "none", c10::List<std::optional<at::Scalar>>(), std::nullopt);
}

bool prefers_onednn(std::int64_t numbers) {
    return numbers >= enough_numbers && onednn_linear() != nullptr;
}

void gemm(std::int64_t rows, std::int64_t columns, std::int64_t depth, MatrixView a, MatrixView b, float* c,
          std::int64_t c_row, bool add) {
    if (sgemm_ != nullptr && MKL_Set_Num_Threads_Local != nullptr && at::Context::hasMKL()) {
        const OneThreadOfMkl one_thread;
        // Column-major: the transpose of c is the product of the transposes of b and a.
        const auto m = static_cast<int>(columns), n = static_cast<int>(rows), k = static_cast<int>(depth);
        const auto b_row = static_cast<int>(b.row), a_row = static_cast<int>(a.row), out_row = static_cast<int>(c_row);
        const float one = 1.0F, beta = add ? 1.0F : 0.0F;
        sgemm_(b.transposed ? "T" : "N", a.transposed ? "T" : "N", &m, &n, &k, &one, b.values, &b_row, a.values, &a_row,
               &beta, c, &out_row);
        return;
    }
    at::Tensor out = at::from_blob(c, {rows, columns}, {c_row, 1}, at::kFloat);
    const at::Tensor left = tensor_of(a, rows, depth), right = tensor_of(b, depth, columns);
    add ? at::addmm_out(out, out, left, right) : at::mm_out(out, left, right);
}

}  // namespace microbatch
