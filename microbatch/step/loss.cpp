#include "microbatch/step/loss.h"

#include <c10/util/Exception.h>

#include <cmath>
#include <memory>
#include <string_view>
#include <utility>

#include "microbatch/core/batch_plan.h"
#include "microbatch/core/error.h"
#include "microbatch/runtime/uploader.h"

namespace microbatch {

Weight::Weight(const at::Tensor& of) {
    require_that(of.defined() && of.numel() == 1 && !of.is_complex(),
                 "the loss function returned a weight that is not one real number: return the samples or target tokens "
                 "of the micro-batch");
    if (of.is_cpu()) {
        value_ = of.item<double>();
    } else {
        on_device_ = of.detach().to(at::kDouble).reshape({});
    }
}

double Weight::value() const {
    return is_known() ? value_ : on_device_.item<double>();
}

void require_weight(double weight) {
    require_that(weight >= 0.0 && std::isfinite(weight), "the loss function returned the weight ", weight,
                 "; it must be finite and at least 0 (samples or target tokens)");
}

void validate(const WeightedLoss& loss) {
    if (loss.weight.is_known()) require_weight(loss.weight.value());
    if (loss.weight.is_known_zero()) return;
    require_that(loss.sum.defined(), "the loss function returned an undefined sum");
    require_that(!loss.sum.is_complex(),
                 "the loss function returned a complex sum; return a real one, such as its abs()");
    require_that(loss.sum.numel() == 1, "the loss function returned a tensor of shape ", loss.sum.sizes(),
                 "; return the sum over the micro-batch, one element");
}

double weight_of(const WeightedLoss& loss) {
    validate(loss);
    const double weight = loss.weight.value();
    require_weight(weight);
    return weight;
}

LossFunction on_device(LossFunction loss, at::Device device) {
    if (device.is_cpu()) return loss;
    return [loss = std::move(loss), uploader = std::make_shared<Uploader>(device)](const Batch& micro) {
        return loss({uploader->upload(micro.fields)});
    };
}

WeightedLoss loss_of(const LossFunction& loss, const Batch& micro) {
    try {
        return loss(micro);
    } catch (const c10::Error& error) {
        const std::string_view what = error.what_without_backtrace();
        if (what.find("Expected more than 1 value per channel") == std::string_view::npos) throw;
    }
    throw TooFewSamples(ErrorKind::usage, "a micro-batch of ", micro.size(), micro.size() == 1 ? " sample" : " samples",
                        " leaves BatchNorm a single value per channel, which it cannot normalise: use a "
                        "micro-batch of at least 2, or at least 3 if the batch is odd; or use GroupNorm");
}

}  // namespace microbatch
