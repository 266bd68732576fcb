#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <vector>

namespace microbatch {

/// The samples of one optimizer step, or a slice of them: one tensor per field, with samples along dimension 0.
///
/// Shapes:  every field has at least one dimension and the same length along dimension 0.
/// Threads: const calls may overlap; others need outside locking.
struct Batch {
    std::vector<at::Tensor> fields;

    /// Number of samples; 0 if there are no fields.
    /// Errors: ErrorKind::usage if a field is undefined, has no dimension, or its length differs from the first one's.
    std::int64_t size() const;

    /// Samples [begin, end) as views of the same storage: nothing is copied.
    /// Errors: ErrorKind::usage unless 0 <= begin <= end <= size().
    Batch slice(std::int64_t begin, std::int64_t end) const;
};

}  // namespace microbatch
