#include "microbatch/runtime/gemm.h"

#include <ATen/Context.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/mm.h>

// MKL's, which torch's own builds carry; a torch without MKL may have another interface by this name, or none.
extern "C" __attribute__((weak)) int MKL_Set_Num_Threads_Local(int threads);
extern "C" __attribute__((weak)) void sgemm_(const char* transpose_a, const char* transpose_b, const int* rows,
                                             const int* columns, const int* depth, const float* alpha, const float* a,
                                             const int* a_row, const float* b, const int* b_row, const float* beta,
                                             float* c, const int* c_row);

namespace microbatch {

namespace {

/// MKL with one thread, which spares small matrices a copy that it makes for several.
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

void gemm(std::int64_t rows, std::int64_t columns, std::int64_t depth, MatrixView a, MatrixView b, float* c,
          std::int64_t c_row, bool add) {
    if (sgemm_ != nullptr && MKL_Set_Num_Threads_Local != nullptr && at::Context::hasMKL()) {
        const OneThreadOfMkl one_thread;
        // By columns the transpose of c is the product of b's and a's.
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
