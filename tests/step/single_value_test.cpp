// BatchNorm cannot normalise a single value per channel: batches are split so that no micro-batch has one.
#include <gtest/gtest.h>
#include <torch/nn/modules/batchnorm.h>

#include "microbatch/step/gatherer.h"
#include "support/errors.h"
#include "support/models.h"

namespace microbatch {
namespace {

struct NormedMlp : torch::nn::Module {
    torch::nn::Linear first = register_module("first", torch::nn::Linear(3, 5));
    torch::nn::BatchNorm1d norm = register_module("norm", torch::nn::BatchNorm1d(5));

    at::Tensor forward(const at::Tensor& x) { return norm->forward(first->forward(x)); }
};

struct SingleValue : testing::Test {
    std::shared_ptr<NormedMlp> model = std::make_shared<NormedMlp>();
    LossFunction loss = [this](const Batch& micro) -> WeightedLoss {
        sizes.push_back(micro.size());
        return {model->forward(micro.fields[0]).pow(3).sum(), static_cast<double>(micro.size())};
    };
    std::vector<std::int64_t> sizes;

    Gathered gather(std::int64_t batch, std::int64_t micro_batch) {
        at::Generator random = test::generator(1);
        Gatherer gatherer(parameters_of(*model));
        const Batch samples{{test::normal({batch, 3}, random, at::kFloat)}};
        const Gathered gathered = gatherer.gather(samples, {.micro_batch = micro_batch}, loss);
        gatherer.clear();
        return gathered;
    }
};

TEST_F(SingleValue, NoSampleIsLeftOver) {
    EXPECT_EQ(gather(9, 4).micro_batches, 3);
    EXPECT_EQ(sizes, (std::vector<std::int64_t>{4, 3, 2}));
    sizes.clear();
    EXPECT_EQ(gather(4, 3).micro_batches, 2);
    EXPECT_EQ(sizes, (std::vector<std::int64_t>{2, 2}));
}

TEST_F(SingleValue, WhereOneIsASentenceSaysWhatToDo) {
    for (const auto& [batch, micro_batch] : {std::pair{1, 1}, {4, 1}, {5, 2}}) {
        const auto what = [&, batch = batch, micro_batch = micro_batch] { gather(batch, micro_batch); };
        EXPECT_THROW(what(), TooFewSamples);
        test::expect_usage_error(
            {"a micro-batch of 1 sample", "BatchNorm", "at least 2", "at least 3 if the batch is odd"}, what);
    }
}

TEST_F(SingleValue, OtherErrorsOfTheLossFunctionPassThrough) {
    const LossFunction wrong = [](const Batch& micro) -> WeightedLoss { return {micro.fields[0].view({7}), 1.0}; };
    EXPECT_THROW(loss_of(wrong, {{at::ones({2, 3})}}), c10::Error);
    EXPECT_THROW(loss_of([](const Batch&) -> WeightedLoss { throw std::domain_error("mine"); }, {{at::ones({2, 3})}}),
                 std::domain_error);
}

}  // namespace
}  // namespace microbatch
