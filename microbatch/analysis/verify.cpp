#include "microbatch/analysis/verify.h"

#include <ATen/ops/equal.h>
#include <c10/util/ScopeExit.h>

#include <algorithm>
#include <cmath>
#include <variant>

#include "microbatch/core/error.h"
#include "microbatch/model/forward_state.h"
#include "microbatch/optim/clipping.h"
#include "microbatch/step/gatherer.h"

namespace microbatch {
namespace {

struct Gradients {
    double loss = 0.0;
    double weight = 0.0;
    double norm = 0.0;
    std::vector<at::Tensor> mean;  // by parameter; undefined for one without a gradient
};

// NaN compares as larger than everything, so it is never hidden.
bool above(double value, double limit) {
    return !(value <= limit);
}

double relative(double difference, double scale) {
    return difference == 0.0 ? 0.0 : difference / scale;
}

class Verifier {
public:
    Verifier(const AnyModel& model, const BatchSource& batch, const LossFunction& loss, const Plan& cut)
        : model_(*model.get()), batch_(batch), loss_(loss), cut_(cut), gatherer_(model), before_(model_) {}

    Verification run() {
        result_.tolerance = tolerance();
        const Gradients whole = gradients(at_once());
        const bool moves_buffers = buffers_changed();
        const Gradients cut = gradients(cut_);
        result_.loss_difference =
            relative(std::abs(whole.loss - cut.loss), std::max(std::abs(whole.loss), std::abs(cut.loss)));
        result_.differences = compare(whole, cut);
        if (!std::isfinite(whole.loss) || !std::isfinite(whole.norm) || !std::isfinite(cut.norm)) {
            result_.causes.push_back(Cause::not_finite);
        } else if (!result_.differences.empty()) {
            diagnose(whole, moves_buffers);
        } else if (above(std::abs(whole.weight - cut.weight), result_.tolerance * whole.weight)) {
            // Micro-batches of one size hide a mean of means; the next ragged batch would not. Where the weights add
            // up and the means are the same, the sums add up, too.
            result_.causes.push_back(Cause::averaged_loss);
        }
        return result_;
    }

private:
    double tolerance() const {
        double epsilon = 0.0;
        for (const Parameter& parameter : gatherer_.parameters()) {
            if (parameter.tensor.scalar_type() == at::kFloat) return std::sqrt(0x1p-23);
            epsilon = std::sqrt(0x1p-52);
        }
        return epsilon;
    }

    // Every call starts with the same generators and buffers, unless the draws are to differ.
    Gradients gradients(const Plan& plan, bool same_draws = true) {
        restore_forward_state(model_, before_.before(), /*generators=*/same_draws);
        if (evaluate_) evaluate();
        const auto gathered = std::get<Gathered>(gatherer_.gather(batch_, loss_, {.plan = plan}));
        const auto clear = c10::make_scope_exit([this] { gatherer_.clear(); });
        require_that(gathered.weight != 0.0, "the batch to verify has weight 0: there is no gradient to compare");
        Gradients result{gathered.loss(), gathered.weight, gathered.gradient_norm, {}};
        for (const Parameter& parameter : gatherer_.parameters()) {
            const at::Tensor& gradient = parameter.tensor.grad();
            result.mean.push_back(gradient.defined() ? gradient / gathered.weight : at::Tensor());
        }
        return result;
    }

    Plan at_once() const { return {.micro_batch = batch_.size(), .batch_norm = cut_.batch_norm}; }

    bool buffers_changed() const {
        const StateReader before = StateReader(before_.before()).section("model");
        const NamedTensors buffers = model_.buffers();
        return std::any_of(buffers.begin(), buffers.end(), [&before](const NamedTensor& live) {
            const at::Tensor copy = before.tensor(live.name).get();
            return live.tensor.sizes() != copy.sizes() || !at::equal(live.tensor, copy);
        });
    }

    std::vector<Difference> compare(const Gradients& a, const Gradients& b) const {
        std::int64_t elements = 0;
        for (const Parameter& parameter : gatherer_.parameters()) elements += parameter.tensor.numel();
        std::vector<Difference> found;
        for (std::size_t i = 0; i < a.mean.size(); ++i) {
            const Parameter& parameter = gatherer_.parameters()[i];
            const double floor =
                0.01 * std::max(a.norm, b.norm) *
                std::sqrt(static_cast<double>(parameter.tensor.numel()) / static_cast<double>(elements));
            const double difference = distance(a.mean[i], b.mean[i], floor);
            if (above(difference, result_.tolerance)) found.push_back({parameter.name, difference});
        }
        std::stable_sort(found.begin(), found.end(), [](const Difference& x, const Difference& y) {
            return above(x.relative, y.relative) && !above(y.relative, x.relative);
        });
        return found;
    }

    static double distance(const at::Tensor& a, const at::Tensor& b, double floor) {
        if (!a.defined() && !b.defined()) return 0.0;
        const at::Tensor difference = !a.defined() ? b : !b.defined() ? a : a - b;
        const double scale =
            std::max({a.defined() ? joint_norm({a}) : 0.0, b.defined() ? joint_norm({b}) : 0.0, floor});
        return relative(joint_norm({difference}), scale);
    }

    // Draws again: in evaluation mode, dropout is off, but noise that the loss function adds is not.
    bool is_random(const Gradients& whole) {
        return !compare(whole, gradients(at_once(), /*same_draws=*/false)).empty();
    }

    void diagnose(const Gradients& whole, bool moves_buffers) {
        const bool random = is_random(whole);
        evaluate_ = true;
        const Gradients evaluated = gradients(at_once());
        if (random && is_random(evaluated)) {
            if (is_averaged()) result_.causes.push_back(Cause::averaged_loss);
        } else if (!compare(evaluated, gradients(cut_)).empty()) {
            result_.causes.push_back(is_averaged() ? Cause::averaged_loss : Cause::coupled_samples);
        }
        if (moves_buffers) result_.causes.push_back(Cause::batch_statistics);
        if (random) result_.causes.push_back(Cause::randomness);
        if (result_.causes.empty()) result_.causes.push_back(Cause::unknown);
    }

    // Duplicating every sample doubles a sum and leaves a mean unchanged.
    bool is_averaged() {
        const auto [sum, weight] = value([this] { return batch_.fetch({0, batch_.size()}); });
        const auto [sum_twice, weight_twice] = value([this] { return batch_.fetch_twice(); });
        const bool sum_grows = !above(std::abs(sum_twice - 2.0 * sum), result_.tolerance * std::abs(2.0 * sum));
        const bool sum_stays = sum != 0.0 && !above(std::abs(sum_twice - sum), result_.tolerance * std::abs(sum));
        const bool weight_grows = !above(std::abs(weight_twice - 2.0 * weight), result_.tolerance * 2.0 * weight);
        return sum_stays || (sum_grows && !weight_grows);
    }

    template <class Fetch>
    std::pair<double, double> value(Fetch fetch) {
        before_.restore();
        evaluate();
        const WeightedLoss loss = loss_(fetch());
        return {loss.sum.template item<double>(), loss.weight.value()};
    }

    void evaluate() { model_.set_training_flags(std::vector<std::int64_t>(model_.training_flags().size(), 0)); }

    Model& model_;
    const BatchSource& batch_;
    const LossFunction& loss_;
    Plan cut_;
    Gatherer gatherer_;
    ForwardStateScope before_;
    bool evaluate_ = false;
    Verification result_;
};

}  // namespace

std::string_view describe(Cause cause) {
    switch (cause) {
        case Cause::averaged_loss:
            return "the loss is already averaged: return the sum over the micro-batch, and as weight the number of "
                   "samples or target tokens";
        case Cause::batch_statistics:
            return "a layer normalises over the micro-batch (BatchNorm), so its update depends on the micro-batch: the "
                   "BatchNorm policy exact normalises over the whole batch; GroupNorm and LayerNorm need no policy";
        case Cause::randomness:
            return "the forward pass draws random numbers (dropout): another split draws other numbers, without bias";
        case Cause::coupled_samples:
            return "the loss of a sample depends on the other samples of its micro-batch (in-batch negatives, batch "
                   "statistics): splitting the batch changes what is trained";
        case Cause::not_finite:
            return "the loss or a gradient is not finite";
        case Cause::unknown:
            break;
    }
    return "unknown cause: does the loss function keep state between calls?";
}

Verification verify(const AnyModel& model, const BatchSource& batch, const LossFunction& loss, std::int64_t micro_batch,
                    BatchNorm batch_norm) {
    require_that(micro_batch >= 1 && micro_batch < batch.size(),
                 "verify needs a micro-batch of at least 1 and below the batch of ", batch.size(), " samples, not ",
                 micro_batch);
    return Verifier(model, batch, loss, {.micro_batch = micro_batch, .batch_norm = batch_norm}).run();
}

Verification verify(const AnyModel& model, const Batch& batch, const LossFunction& loss, std::int64_t micro_batch,
                    BatchNorm batch_norm) {
    return verify(model, TensorBatch(batch), loss, micro_batch, batch_norm);
}

}  // namespace microbatch
