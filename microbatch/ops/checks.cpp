#include "microbatch/ops/checks.h"

#include "microbatch/core/error.h"
#include "microbatch/core/str_cat.h"

namespace microbatch {

void require_targets(const at::Tensor& targets) {
    if (!targets.defined()) throw Error(ErrorKind::usage, "the targets are an undefined tensor");
    if (targets.scalar_type() != at::kLong) {
        throw Error(ErrorKind::usage, str_cat("the targets are ", targets.scalar_type(),
                                              ", not int64; convert them with .to(at::kLong)"));
    }
}

void require_rows(std::string_view name, std::string_view row, const at::Tensor& rows, const at::Tensor& targets) {
    if (!rows.defined()) throw Error(ErrorKind::usage, str_cat("the ", name, " are an undefined tensor"));
    if (!rows.is_floating_point()) {
        throw Error(ErrorKind::usage, str_cat("the ", name, " are ", rows.scalar_type(), ", not floating point"));
    }
    if (rows.dim() == 0 || rows.sizes().slice(0, rows.dim() - 1) != targets.sizes()) {
        throw Error(ErrorKind::usage, str_cat(name, " of shape ", rows.sizes(), " do not match targets of shape ",
                                              targets.sizes(), "; give [..., ", row, "] and [...]"));
    }
}

}  // namespace microbatch
