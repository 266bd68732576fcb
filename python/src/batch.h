#pragma once

#include "microbatch/data/batch_source.h"
#include "microbatch/step/loss.h"
#include "python/src/bindings.h"

namespace microbatch::python {

/// A batch of a Python structure, through a source of microbatch.batches: `size`, `fetch(begin, end)`, which returns the
/// micro-batch and the tensors in it that have a sample along dimension 0, and `fingerprint()`.
///
/// The tensors tell the library of sizes and shapes; the loss function gets the structure, from take().
/// Threads: called without the GIL; takes it for every call into Python.
class PythonBatch final : public BatchSource {
public:
    /// Ownership: borrows the source.
    explicit PythonBatch(py::handle source);
    ~PythonBatch() override;

    std::int64_t size() const override { return size_; }
    Batch fetch(Slice slice) const override;
    std::uint32_t fingerprint() const override;

    /// The micro-batch that was fetched last, once. Requires: the GIL.
    py::object take() const { return std::exchange(micro_, py::object()); }

private:
    py::handle source_;
    std::int64_t size_;
    mutable py::object micro_;
};

/// The user's loss of what was fetched last: `loss(micro)` returns (sum, weight).
/// Ownership: borrows both.
LossFunction loss_of(const PythonBatch& batch, py::handle loss);

/// What a Python loss function returned: a pair of a tensor and a number or tensor of one element.
/// Errors: TypeError, naming what it is instead. Requires: the GIL.
WeightedLoss weighted_loss(const py::object& result);

}  // namespace microbatch::python
