#pragma once

#include <cstdint>
#include <vector>

namespace microbatch {

/// A value that an operator of a forward made: a tensor between two in-place changes.
struct ProgramValue {
    std::int32_t made_by = 0;                ///< index of the operator
    std::vector<std::int32_t> used_by = {};  ///< operators, in order
    std::int32_t storage = 0;                ///< values with the same number share memory
    std::int64_t bytes = 0;                  ///< of the value
    bool overwritten = false;                ///< by an in-place operator: keeping it takes a copy
};

/// The operators of a forward, as far as memory is concerned. Its BatchNorm calls cut it into segments: segment 0 ends
/// before the first, segment j begins with the j-th.
struct Program {
    std::uint64_t fingerprint = 0;  ///< of the sequence of operators
    std::int32_t operators = 0;
    std::vector<std::int32_t> barriers = {};  ///< indices of the BatchNorm calls
    std::vector<ProgramValue> values = {};    ///< in the order in which they are made
};

/// Which values of a forward are kept until they are differentiated; the others are computed again.
struct Keep {
    std::uint64_t fingerprint = 0;   ///< of the program that it is for
    std::vector<bool> forward = {};  ///< by value: kept from when it is made
    /// By segment: values to compute again and keep, before the segment is differentiated.
    std::vector<std::vector<std::int32_t>> before = {};
};

/// Keeps all values that one segment makes and another one uses: every segment runs twice, once with a graph.
Keep keep_all(const Program& program);

/// Keeps the least: what is alive at a few places where little is, and on the way back what the segments between two of
/// them need. Every segment runs at most three times. Source: Chen et al. 2016, arXiv:1604.06174, with the places
/// chosen by their bytes.
/// Cost: O(B² (V + 64)) for B barriers and V values between two of them.
Keep keep_least(const Program& program);

/// keep_all() and keep_least() of one program.
struct KeepPlans {
    Keep all = {};
    Keep least = {};
};
KeepPlans keep_plans_of(const Program& program);

}  // namespace microbatch
