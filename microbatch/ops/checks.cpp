#include "microbatch/ops/checks.h"

#include "microbatch/core/error.h"

namespace microbatch {

void require_targets(const at::Tensor& targets) {
    require_that(targets.defined(), "the targets are an undefined tensor");
    require_that(targets.scalar_type() == at::kLong, "the targets are ", targets.scalar_type(),
                 ", not int64; convert them with .to(at::kLong)");
}

void require_rows(std::string_view name, std::string_view row, const at::Tensor& rows, const at::Tensor& targets) {
    require_that(rows.defined(), "the ", name, " are an undefined tensor");
    require_that(rows.is_floating_point(), "the ", name, " are ", rows.scalar_type(), ", not floating point");
    require_that(rows.dim() != 0 && rows.sizes().slice(0, rows.dim() - 1) == targets.sizes(), name, " of shape ",
                 rows.sizes(), " do not match targets of shape ", targets.sizes(), "; give [..., ", row, "] and [...]");
}

void require_lengths(std::string_view operation, const at::Tensor& lengths, std::int64_t samples, std::int64_t tokens) {
    if (!lengths.defined()) return;
    require_that(lengths.scalar_type() == at::kLong && lengths.is_cpu() && lengths.dim() == 1 &&
                     lengths.size(0) == samples && lengths.is_contiguous(),
                 operation, ": lengths are ", lengths.scalar_type(), " of shape ", lengths.sizes(), "; give int64 of [",
                 samples, "], contiguous, on the CPU");
    const auto* const all = lengths.const_data_ptr<std::int64_t>();
    for (std::int64_t i = 0; i < samples; ++i) {
        require_that(all[i] >= 1 && all[i] <= tokens, operation, ": sample ", i, " has a length of ", all[i],
                     "; give 1 to ", tokens);
    }
}

}  // namespace microbatch
