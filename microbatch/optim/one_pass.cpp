#include "microbatch/optim/one_pass.h"

#include <algorithm>
#include <cmath>

#include "microbatch/core/clones.h"
#include "microbatch/runtime/parallel.h"

namespace microbatch {
namespace one_pass {

template <class Number>
struct Arrays {
    Number* parameter;
    const Number* gradient;
    Number* first;  // moment, or velocity: null without momentum
    Number* second;
    std::int64_t count;
};

namespace {

template <class Number>
[[gnu::always_inline]] inline void loop(const AdamWUpdate& how, const Arrays<Number>& arrays) {
    Number* __restrict p = arrays.parameter;
    const Number* __restrict gradient = arrays.gradient;
    Number* __restrict m = arrays.first;
    Number* __restrict v = arrays.second;
    const auto weight1 = static_cast<Number>(1.0 - how.beta1), weight2 = static_cast<Number>(1.0 - how.beta2);
    const auto beta2 = static_cast<Number>(how.beta2), epsilon = static_cast<Number>(how.epsilon);
    const auto kept = static_cast<Number>(how.kept), length = static_cast<Number>(how.length);
    const auto correction = static_cast<Number>(how.correction), divisor = static_cast<Number>(how.divisor);
    for (std::int64_t i = 0; i < arrays.count; ++i) {
        const Number g = gradient[i] / divisor;
        m[i] = m[i] + weight1 * (g - m[i]);
        v[i] = beta2 * v[i] + weight2 * g * g;
        p[i] = kept * p[i] - length * m[i] / (std::sqrt(v[i]) * correction + epsilon);
    }
}

template <bool with_momentum, bool nesterov, class Number>
[[gnu::always_inline]] inline void sgd_loop(const SgdUpdate& how, const Arrays<Number>& arrays) {
    Number* __restrict p = arrays.parameter;
    const Number* __restrict gradient = arrays.gradient;
    Number* __restrict v = arrays.first;
    const auto rate = static_cast<Number>(how.learning_rate), momentum = static_cast<Number>(how.momentum);
    const auto kept = static_cast<Number>(how.kept), decay = static_cast<Number>(how.decay);
    const auto divisor = static_cast<Number>(how.divisor);
    for (std::int64_t i = 0; i < arrays.count; ++i) {
        const Number g = gradient[i] / divisor + decay * p[i];
        Number step = g;
        if constexpr (with_momentum) {
            v[i] = momentum * v[i] + g;
            step = nesterov ? g + momentum * v[i] : v[i];
        }
        p[i] = kept * p[i] - rate * step;
    }
}

template <class Number>
[[gnu::always_inline]] inline void loop(const SgdUpdate& how, const Arrays<Number>& arrays) {
    if (arrays.first == nullptr) {
        sgd_loop<false, false>(how, arrays);
    } else if (how.nesterov) {
        sgd_loop<true, true>(how, arrays);
    } else {
        sgd_loop<true, false>(how, arrays);
    }
}

}  // namespace

// A single thread needs wide vectors to keep up with memory.
MICROBATCH_CLONES void run(const AdamWUpdate& how, const Arrays<float>& arrays) {
    loop(how, arrays);
}
MICROBATCH_CLONES void run(const AdamWUpdate& how, const Arrays<double>& arrays) {
    loop(how, arrays);
}
MICROBATCH_CLONES void run(const SgdUpdate& how, const Arrays<float>& arrays) {
    loop(how, arrays);
}
MICROBATCH_CLONES void run(const SgdUpdate& how, const Arrays<double>& arrays) {
    loop(how, arrays);
}

}  // namespace one_pass

namespace {

template <class Number>
one_pass::Arrays<Number> arrays_of(const at::Tensor& parameter, const at::Tensor& gradient, const at::Tensor& first,
                                   const at::Tensor& second, std::int64_t begin, std::int64_t end) {
    const auto at = [begin](const at::Tensor& tensor) {
        return tensor.defined() ? tensor.mutable_data_ptr<Number>() + begin : nullptr;
    };
    return {at(parameter), gradient.const_data_ptr<Number>() + begin, at(first), at(second), end - begin};
}

}  // namespace

bool updates_in_one_pass(const at::Tensor& parameter) {
    return parameter.is_cpu() && (parameter.scalar_type() == at::kFloat || parameter.scalar_type() == at::kDouble);
}

void for_each_stretch(const std::vector<at::Tensor>& tensors,
                      const std::function<void(std::size_t, std::int64_t, std::int64_t)>& work) {
    std::int64_t all = 0;
    for (const at::Tensor& tensor : tensors) all += tensor.numel();
    constexpr std::int64_t grain = 32768;  // torch's own for elements: below it a second thread gains nothing
    in_parallel(all, grain, [&](std::int64_t begin, std::int64_t end) {
        std::int64_t first = 0;  // element of the i-th tensor
        for (std::size_t i = 0; i < tensors.size() && first < end; ++i) {
            const std::int64_t count = tensors[i].numel();
            const std::int64_t from = std::max(begin - first, std::int64_t{0}), to = std::min(end - first, count);
            if (from < to) work(i, from, to);
            first += count;
        }
    });
}

void update_stretch(const AdamWUpdate& how, const at::Tensor& parameter, const at::Tensor& gradient,
                    const at::Tensor& first_moment, const at::Tensor& second_moment, std::int64_t begin,
                    std::int64_t end) {
    if (parameter.scalar_type() == at::kFloat) {
        one_pass::run(how, arrays_of<float>(parameter, gradient, first_moment, second_moment, begin, end));
    } else {
        one_pass::run(how, arrays_of<double>(parameter, gradient, first_moment, second_moment, begin, end));
    }
}

void update_stretch(const SgdUpdate& how, const at::Tensor& parameter, const at::Tensor& gradient,
                    const at::Tensor& velocity, std::int64_t begin, std::int64_t end) {
    if (parameter.scalar_type() == at::kFloat) {
        one_pass::run(how, arrays_of<float>(parameter, gradient, velocity, {}, begin, end));
    } else {
        one_pass::run(how, arrays_of<double>(parameter, gradient, velocity, {}, begin, end));
    }
}

}  // namespace microbatch
