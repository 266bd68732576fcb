#include "microbatch/step/repeatable.h"

#include <ATen/ATen.h>
#include <gtest/gtest.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <atomic>

#include "support/errors.h"
#include "support/jobs.h"

namespace microbatch {
namespace {

// An operator that is not the same each time, as one that adds up in the order in which threads come.
at::Tensor unsteady(const at::Tensor& x) {
    static std::atomic<int> calls{0};
    return x * (1.0 + 1e-6 * ++calls);
}

at::Tensor call_unsteady(const at::Tensor& x) {
    static const auto op = c10::Dispatcher::singleton()
                               .findSchemaOrThrow("microbatch_test::unsteady", "")
                               .typed<at::Tensor(const at::Tensor&)>();
    return op.call(x);
}

TORCH_LIBRARY(microbatch_test, library) {
    library.def("unsteady(Tensor x) -> Tensor", unsteady);
}

TEST(Repeatable, AreModelsOfTheseLayersAlsoWithDropout) {
    test::Job job =
        test::gpt_job({.layers = 1, .heads = 2, .width = 16, .length = 8, .vocabulary = 20, .dropout = 0.2});
    const auto model = make_model(*job.model);
    const test::Named before = job.state();
    const Batch grain = job.make_batch(2);
    const at::Tensor generator = at::globalContext().defaultGenerator(at::kCPU).get_state().clone();
    require_repeatable(*model, job.parameters, job.loss, [&] { return grain; });
    EXPECT_TRUE(test::same_bits(at::globalContext().defaultGenerator(at::kCPU).get_state(), generator));
    test::expect_no_gradients(job.parameters);
    test::expect_same_bits(test::values_of(job.parameters),
                           test::Named(before.begin(), before.begin() + std::ssize(job.parameters)));
}

TEST(Repeatable, NamesAnOperatorThatIsNot) {
    test::Job job = test::mlp_job({.inputs = 3, .layers = 1, .width = 4, .classes = 2});
    const auto model = make_model(*job.model);
    const Batch batch = job.make_batch(2);
    const LossFunction loss = [own = job.loss](const Batch& micro) {
        return own({{call_unsteady(micro.fields[0]), micro.fields[1]}});
    };
    test::expect_usage_error({"invariant", "microbatch_test::unsteady"},
                             [&] { require_repeatable(*model, job.parameters, loss, [&] { return batch; }); });
    test::expect_no_gradients(job.parameters);
}

TEST(Repeatable, NamesAParameterIfNoOperatorIsToBlame) {
    test::Job job = test::mlp_job({.inputs = 3, .layers = 1, .width = 4, .classes = 2});
    const auto model = make_model(*job.model);
    const Batch batch = job.make_batch(2);
    int calls = 0;
    const LossFunction loss = [&calls, own = job.loss](const Batch& micro) {
        WeightedLoss result = own(micro);
        result.sum = result.sum * (1.0 + 1e-3 * ++calls);  // the number is not a tensor that an operator has made
        return result;
    };
    test::expect_usage_error({"invariant"},
                             [&] { require_repeatable(*model, job.parameters, loss, [&] { return batch; }); });
}

}  // namespace
}  // namespace microbatch
