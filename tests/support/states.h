#pragma once

#include <gtest/gtest.h>

#include <string>

#include "microbatch/io/state_json.h"
#include "microbatch/state/state_dict.h"
#include "support/gradients.h"

namespace microbatch::test {

/// The same state without this one value. (erase() takes every name that begins so.)
inline StateDict without(const StateDict& state, const std::string& name) {
    StateDict result;
    for (const auto& [other, tensor] : state.tensors()) {
        if (other != name) result.put(other, tensor);
    }
    for (const auto& [other, scalar] : state.scalars()) {
        if (other != name) result.put(other, scalar);
    }
    return result;
}

/// The same state with another scalar, or another tensor, by this name.
inline StateDict with(const StateDict& state, const std::string& name, const StateScalar& scalar) {
    StateDict result = without(state, name);
    result.put(name, scalar);
    return result;
}

inline StateDict with(const StateDict& state, const std::string& name, const at::Tensor& tensor) {
    StateDict result = without(state, name);
    result.put(name, StoredTensor(tensor));
    return result;
}

/// Every name, every bit of the scalars; sizes, strides, dtype and every bit of the tensors.
inline void expect_same(const StateDict& left, const StateDict& right) {
    // JSON tells doubles of other bits apart, and knows no kinds that a file does not.
    EXPECT_EQ(scalars_to_json(left), scalars_to_json(right));
    ASSERT_EQ(left.tensors().size(), right.tensors().size());
    auto other = right.tensors().begin();
    for (const auto& [name, stored] : left.tensors()) {
        ASSERT_EQ(name, other->first);
        const at::Tensor one = stored.get(), two = other->second.get();
        EXPECT_TRUE(same_bits(one, two)) << name;
        for (const at::Tensor& shape : {stored.shape(), other->second.shape(), one}) {
            EXPECT_EQ(shape.strides(), two.strides()) << name;
            EXPECT_EQ(shape.sizes(), two.sizes()) << name;
            EXPECT_EQ(shape.scalar_type(), two.scalar_type()) << name;
        }
        ++other;
    }
}

}  // namespace microbatch::test
