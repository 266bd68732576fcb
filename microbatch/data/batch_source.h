#pragma once

#include <cstdint>
#include <vector>

#include "microbatch/core/batch_plan.h"
#include "microbatch/data/batch.h"
#include "microbatch/data/dataset.h"

namespace microbatch {

/// How many samples of length `length` are as long as `samples` of the length `first`, at least 1.
std::int64_t as_many_tokens(std::int64_t samples, std::int64_t first, std::int64_t length);

/// The source of the samples of one batch, one micro-batch at a time.
///
/// Threads: no two calls at the same time.
class BatchSource {
public:
    BatchSource() = default;
    BatchSource(const BatchSource&) = delete;
    BatchSource& operator=(const BatchSource&) = delete;
    virtual ~BatchSource() = default;

    /// The number of samples in the whole batch.
    virtual std::int64_t size() const = 0;

    /// The samples of the slice. Requires: 0 <= begin < end <= size().
    /// Errors: ErrorKind::usage if the number of returned samples differs from the requested one.
    virtual Batch fetch(Slice slice) const = 0;

    /// How many samples from `begin` on take the memory of `samples` of the first ones: more than that if they are
    /// shorter. Requires: 0 <= begin < size(), samples >= 1. Returns at least 1.
    virtual std::int64_t as_many_as(std::int64_t /*begin*/, std::int64_t samples) const { return samples; }

    /// The whole batch with every sample twice, for verify(): a sum doubles, a mean stays.
    virtual Batch fetch_twice() const;

    /// Identifies this batch, also in another process: a partial batch is resumed only with the same batch.
    /// Cost: reads the batch once if it consists of tensors.
    virtual std::uint32_t fingerprint() const = 0;
};

/// A batch in memory: slices are views of it. Errors: as Batch::size().
class TensorBatch final : public BatchSource {
public:
    /// Ownership: shares the tensors.
    explicit TensorBatch(Batch batch) : batch_(std::move(batch)), size_(batch_.size()) {}

    std::int64_t size() const override { return size_; }
    Batch fetch(Slice slice) const override { return batch_.slice(slice.begin, slice.end); }
    std::uint32_t fingerprint() const override;

private:
    Batch batch_;
    std::int64_t size_;
};

/// Some consecutive samples of another batch.
///
/// Ownership: borrows the batch.
class SliceOf final : public BatchSource {
public:
    SliceOf(const BatchSource& batch, Slice slice) : batch_(batch), slice_(slice) {}

    std::int64_t size() const override { return slice_.size(); }
    Batch fetch(Slice slice) const override {
        return batch_.fetch({slice_.begin + slice.begin, slice_.begin + slice.end});
    }
    std::int64_t as_many_as(std::int64_t begin, std::int64_t samples) const override {
        return batch_.as_many_as(slice_.begin + begin, samples);
    }
    std::uint32_t fingerprint() const override { return batch_.fingerprint(); }

private:
    const BatchSource& batch_;
    Slice slice_;
};

/// Samples of a dataset by number, loaded when needed: the whole batch is never in memory.
///
/// Ownership: borrows the dataset.
class DatasetBatch final : public BatchSource {
public:
    DatasetBatch(const Dataset& dataset, std::vector<std::int64_t> indices)
        : dataset_(dataset), indices_(std::move(indices)) {}

    /// `samples` copies of the dataset's sample that takes the most memory: a batch for planning.
    /// Errors: ErrorKind::usage if `samples` is below 1.
    static DatasetBatch longest(const Dataset& dataset, std::int64_t samples);

    std::int64_t size() const override { return static_cast<std::int64_t>(indices_.size()); }
    Batch fetch(Slice slice) const override;
    std::int64_t as_many_as(std::int64_t begin, std::int64_t samples) const override;
    std::uint32_t fingerprint() const override;

private:
    const Dataset& dataset_;
    std::vector<std::int64_t> indices_;
};

}  // namespace microbatch
