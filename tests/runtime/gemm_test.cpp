#include "microbatch/runtime/gemm.h"

#include <ATen/ATen.h>

#include <tuple>
#include <vector>

#include "autograd/in_place.h"
#include "microbatch/memory/budget_allocator.h"
#include "microbatch/memory/memory_trace.h"

namespace microbatch {
namespace {

using namespace test;

TEST(Gemm, IsThatOfMatricesOfAnyLayoutWithOrWithoutBias) {
    at::manual_seed(1);
    for (const auto& [rows, inputs, outputs] :
         {std::tuple{4, 3, 5}, {1, 768, 768}, {2, 768, 768}, {5, 768, 768}, {96, 512, 256}, {512, 128, 384}}) {
        const at::Tensor x = at::randn({rows, inputs}), bias = at::randn({outputs});
        const at::Tensor matrix = at::randn({inputs, outputs}), wide = at::randn({rows, 2 * inputs});
        const at::Tensor columns = at::randn({outputs, inputs}).t();
        // Sums of at most 768 products, rounded in any order: 6e-8 a rounding, which grow with the root.
        const double tolerance = 6e-8 * 28 * 2;
        for (const at::Tensor& left : {x, x.t().contiguous().t(), wide.narrow(1, 1, inputs)}) {
            for (const at::Tensor& right : {matrix, columns}) {
                const at::Tensor exact = left.to(at::kDouble).mm(right.to(at::kDouble));
                EXPECT_LT(relative_difference(gemm(left, right), exact), tolerance);
                for (const at::Tensor& b : {bias, bias.view({1, -1}), at::randn({rows, outputs}), at::randn({1})}) {
                    EXPECT_LT(relative_difference(gemm(left, right, b), exact + b.to(at::kDouble)), tolerance);
                }
            }
        }
    }
}

TEST(Gemm, HasTheSameBitsEveryTime) {
    const at::Tensor x = at::randn({512, 384}), weight = at::randn({1536, 384});
    const at::Tensor first = gemm(x, weight.t());
    for (int i = 0; i < 5; ++i) EXPECT_TRUE(same_bits(gemm(x, weight.t()), first));
}

TEST(Gemm, AllocatesTheSameForAnyNumberOfRowsOnOneSideOfTheRule) {
    install_budget_allocator();
    const auto beside_the_result = [&](std::int64_t rows, std::int64_t inputs) {
        const at::Tensor x = at::randn({rows, inputs}), weight = at::randn({512, inputs}), bias = at::randn({512});
        const std::int64_t live = memory_use().live_bytes;
        MemoryTrace trace(at::kCPU);
        { const at::Tensor y = gemm(x, weight.t(), bias); }
        trace.stop();
        std::vector<std::int64_t> bytes = trace.live_bytes();
        for (std::int64_t& each : bytes) each -= live;
        for (std::size_t i = 0; i + 1 < bytes.size(); ++i) bytes[i] -= rows * 512 * 4;
        return bytes;
    };
    using Rows = std::vector<std::int64_t>;
    for (const auto& [least, inputs, more] :
         {std::tuple{1, 128, Rows{2, 16, 63}}, {64, 128, Rows{65, 128, 512}}, {2, 1024, Rows{3, 4, 16, 63, 64, 512}}}) {
        for (const std::int64_t rows : more) {
            EXPECT_EQ(beside_the_result(rows, inputs), beside_the_result(least, inputs)) << rows << " rows";
        }
    }
}

TEST(Gemm, RefusesWhatTorchRefuses) {
    EXPECT_THROW(gemm(at::ones({512, 384}), at::ones({512, 384})), c10::Error);
    EXPECT_THROW(gemm(at::ones({512, 384}), at::ones({384, 512}).to(at::kDouble)), c10::Error);
    EXPECT_THROW(gemm(at::ones({512, 384}), at::ones({384, 512}), at::ones({511})), c10::Error);
}

}  // namespace
}  // namespace microbatch
