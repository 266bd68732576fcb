#pragma once

#include <cstdint>
#include <vector>

namespace microbatch {

/// The position of a sampler: everything needed to continue with the same indices.
struct SamplerState {
    std::uint64_t seed = 0;
    std::int64_t epoch = 0;     ///< completed passes over the data
    std::int64_t position = 0;  ///< samples of the current epoch already returned: in [0, dataset size)

    bool operator==(const SamplerState&) const = default;
};

/// Indices of samples in random order, epoch after epoch, without end. Every epoch is a permutation of [0, dataset
/// size) that depends only on the seed and the epoch, and is the same on every platform.
///
/// State:   state() and restore(); the permutation itself is computed index by index and never stored.
/// Threads: const calls may overlap; others need outside locking.
class Sampler {
public:
    /// Errors: ErrorKind::usage if dataset_size is below 1.
    Sampler(std::int64_t dataset_size, std::uint64_t seed);

    /// The next `count` indices. Past the end of an epoch, they continue with the next one: no sample is dropped, and
    /// next(a) followed by next(b) is next(a + b).
    ///
    /// Errors: ErrorKind::usage if count is negative or the epoch would exceed int64; std::bad_alloc or
    ///         std::length_error if the indices do not fit in memory. The state is then unchanged.
    /// Cost:   20 to 300 ns per index; memory does not grow with the data set.
    std::vector<std::int64_t> next(std::int64_t count);

    SamplerState state() const { return state_; }

    /// Restores a state of a sampler over a data set of the same size.
    /// Errors: ErrorKind::usage if the epoch is negative or the position is outside [0, dataset size); the state is
    ///         then unchanged. Whether the data set is the same cannot be checked here.
    void restore(SamplerState state);

private:
    std::int64_t size_;
    SamplerState state_;
};

}  // namespace microbatch
