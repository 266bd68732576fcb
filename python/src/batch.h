#pragma once

#include <utility>

#include "microbatch/data/batch_source.h"
#include "microbatch/data/dataset.h"
#include "microbatch/state/stateful.h"
#include "microbatch/step/loss.h"
#include "python/src/bindings.h"

namespace microbatch::python {

/// The micro-batch that Python fetched last. The library sees its tensors with a sample along dimension 0, which tell it
/// sizes and shapes; the loss function gets the Python structure.
class LastMicroBatch {
public:
    LastMicroBatch() = default;
    LastMicroBatch(const LastMicroBatch&) = delete;
    LastMicroBatch& operator=(const LastMicroBatch&) = delete;
    ~LastMicroBatch();

    /// The structure, once. Requires: the GIL.
    py::object take() const { return std::exchange(micro_, py::object()); }

protected:
    /// Drops it before the next one is made. Requires: the GIL.
    void drop() const { micro_ = py::object(); }

    /// Keeps the first of the pair and returns the second. Requires: the GIL.
    Batch keep(const py::tuple& fetched) const;

private:
    mutable py::object micro_;
};

/// A batch of a Python structure, through a source of microbatch.batches: `size`, `fetch(begin, end)`, which returns the
/// micro-batch and its tensors, `as_many_as(begin, samples)`, `fetch_twice()` and `fingerprint()`.
///
/// Threads: called without the GIL; takes it for every call into Python.
class PythonBatch final : public BatchSource, public LastMicroBatch {
public:
    /// Ownership: borrows the source.
    explicit PythonBatch(py::handle source) : source_(source), size_(source.attr("size").cast<std::int64_t>()) {}

    std::int64_t size() const override { return size_; }
    Batch fetch(Slice slice) const override;
    std::int64_t as_many_as(std::int64_t begin, std::int64_t samples) const override;
    Batch fetch_twice() const override;
    std::uint32_t fingerprint() const override;

private:
    py::handle source_;
    std::int64_t size_;
};

/// A dataset of Python, through microbatch.data: `size`, `tokens_per_sample`, `longest_sample`, `length(index)`,
/// `arrange(indices)`, which returns them in the order to use, and `get(indices)`, which returns a micro-batch and its tensors.
/// With a state of its own: also `save()`, which returns it as a dict, and `prepare(dict)`, which returns what applies it.
///
/// Threads: called without the GIL; takes it for every call into Python.
class PythonDataset final : public Dataset, public LastMicroBatch, public Stateful {
public:
    explicit PythonDataset(py::object data);
    ~PythonDataset() override;

    std::int64_t size() const override { return size_; }
    std::int64_t tokens_per_sample() const override { return tokens_per_sample_; }
    std::int64_t longest_sample() const override { return longest_sample_; }
    std::int64_t length(std::int64_t index) const override;
    void arrange(std::vector<std::int64_t>& batch) const override;
    Batch get(std::span<const std::int64_t> indices) const override;

    bool has_state() const { return has_state_; }
    void save(const StateWriter& writer) const override;
    Commit prepare(const StateReader& reader) override;

private:
    py::object data_;
    std::int64_t size_, tokens_per_sample_, longest_sample_;
    bool has_state_;
};

/// The user's loss of what was fetched last: `loss(micro)` returns (sum, weight).
/// Ownership: borrows both.
LossFunction loss_of(const LastMicroBatch& last, py::handle loss);

/// What a Python loss function returned: a pair of a tensor and a number or tensor of one element.
/// Errors: TypeError, naming what it is instead. Requires: the GIL.
WeightedLoss weighted_loss(const py::object& result);

}  // namespace microbatch::python
