#include "microbatch/step/gatherer.h"

#include <ATen/Context.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/_foreach_div.h>
#include <ATen/ops/count_nonzero.h>
#include <c10/util/ScopeExit.h>

#include <algorithm>
#include <utility>

#include "microbatch/autograd/batch_norm_layers.h"
#include "microbatch/core/error.h"
#include "microbatch/optim/clipping.h"
#include "microbatch/step/exact_batch.h"

namespace microbatch {

namespace {

// Each grain has random numbers of its own, whichever process draws them.
void seed_grain(std::uint64_t of_batch, std::int64_t number) {
    // splitmix64 (Steele, Lea and Flood 2014)
    std::uint64_t bits = of_batch + 0x9E3779B97F4A7C15ULL * (static_cast<std::uint64_t>(number) + 1);
    bits = (bits ^ (bits >> 30U)) * 0xBF58476D1CE4E5B9ULL;
    bits = (bits ^ (bits >> 27U)) * 0x94D049BB133111EBULL;
    at::manual_seed(bits ^ (bits >> 31U));
}

// A sum without a graph is what a loss function returns for a micro-batch of weight 0: the weight has to be read.
WeightedLoss settled(const WeightedLoss& loss) {
    const bool has_graph = loss.sum.defined() && loss.sum.requires_grad();
    return has_graph || loss.weight.is_known() ? loss : WeightedLoss{loss.sum, loss.weight.value()};
}

}  // namespace

Gatherer::Gatherer(const AnyModel& model, bool sum_in_product, std::shared_ptr<Precision> precision)
    : model_(model.get()), precision_(std::move(precision)) {
    if (sum_in_product) scopes_.push_back(std::make_shared<InProductSums>());
    if (model_->offers_checkpointing()) scopes_.push_back(std::make_shared<ActivationCheckpointing>(model_));
    track(model_->parameters());
}

Gatherer::Gatherer(Gatherer&&) noexcept = default;
Gatherer::~Gatherer() = default;

void Gatherer::track(const Parameters& parameters) {
    require_that(state_ == State::idle, "parameters cannot be added while a batch is gathered");
    precision_->require(parameters);
    Parameters all = parameters_;
    all.insert(all.end(), parameters.begin(), parameters.end());
    parameters_ = without_repeats(all);
}

std::variant<Gathered, PartialBatch> Gatherer::gather(const BatchSource& source, const LossFunction& loss,
                                                      const GatherOptions& options,
                                                      std::optional<PartialBatch> partial) {
    const std::int64_t samples = source.size();
    const bool has_others = options.reducer != nullptr && options.reducer->size() > 1;
    require_that(samples != 0 || has_others, "the batch is empty: give it at least one sample");
    micro_batch_count(samples, options.plan.micro_batch);  // refuses an invalid plan
    if (options.invariance != nullptr) return gather_grains(source, loss, options);
    const bool cut = options.plan.micro_batch < samples || (options.caps != nullptr && !options.caps->empty());
    if (cut && options.plan.batch_norm == BatchNorm::exact) return gather_exactly(source, loss, options);
    std::int64_t done = 0;
    if (partial) {
        done = partial->samples;
        resume(source, *partial, options.plan);
    } else {
        begin(options.measure_noise, options.plan);
    }
    auto clear_on_error = c10::make_scope_exit([this] { clear(); });
    while (done < samples) {
        done = add_next(source, done, loss, options);
        if (done < samples && options.stop && options.stop()) return leave(source, done, norms_.has_value());
    }
    if (has_others) {
        read_totals();   // whatever it finds is known before the processes agree
        norms_.reset();  // its memory is for the optimizer's state
    }
    if (options.on_added) options.on_added();
    clear_on_error.release();
    return finish(options.reducer);
}

Gathered Gatherer::gather(const Batch& batch, const Plan& plan, const LossFunction& loss, bool measure_noise) {
    return std::get<Gathered>(gather(TensorBatch(batch), loss, {.plan = plan, .measure_noise = measure_noise}));
}

Gatherer::Next Gatherer::load_next(const BatchSource& source, std::int64_t begin, const GatherOptions& options) {
    Plan plan = options.plan;
    const auto next = [&] { return next_cut(source.size() - begin, source.as_many_as(begin, plan.micro_batch)); };
    const auto fetch = [&] { return source.fetch({begin, begin + next()}); };
    Batch micro = fetch();
    const SampleShape shape = shape_of(micro);
    if (options.caps != nullptr) {
        plan = options.caps->within(plan, shape);
        if (next() < micro.size()) {
            micro = {};  // freed before the smaller one is loaded
            micro = fetch();
        }
    }
    if (options.on_micro_batch) options.on_micro_batch(shape, plan);
    enter(plan);
    gathered_.plan.micro_batch = std::min(gathered_.plan.micro_batch, plan.micro_batch);
    gathered_.plan.recompute = gathered_.plan.recompute || plan.recompute;
    const std::int64_t end = begin + micro.size();
    return {std::move(micro), end};
}

// Runs and adds the micro-batch that begins there; returns where it ends.
std::int64_t Gatherer::add_next(const BatchSource& source, std::int64_t begin, const LossFunction& loss,
                                const GatherOptions& options) {
    Next next = load_next(source, begin, options);
    const WeightedLoss sum = loss_of(loss, next.batch);
    next.batch = {};  // freed before the backward pass, which does not need it, as in a trial of the planner
    add(sum);
    return next.end;
}

Gathered Gatherer::gather_grains(const BatchSource& source, const LossFunction& loss, const GatherOptions& options) {
    Invariance& how = *options.invariance;
    begin(/*measure_noise=*/false, options.plan);
    auto clear_on_error = c10::make_scope_exit([this] { clear(); });
    sum_in_any_order(how.ranges, how.grains);
    GrainLosses losses;
    for (std::int64_t begin = 0; begin < source.size(); begin += how.grain) {
        Batch grain = source.fetch({begin, std::min(begin + how.grain, source.size())});
        if (options.on_micro_batch) options.on_micro_batch(shape_of(grain), options.plan);
        seed_grain(how.seed, how.first + begin / how.grain);
        const WeightedLoss sum = settled(loss_of(loss, grain));
        grain = {};
        add(sum);
        losses.weights.push_back(sum.weight.value());
        losses.losses.push_back(losses.weights.back() > 0.0 ? sum.sum.detach().item<double>() : 0.0);
    }
    how.found = sums_->largest();
    read_totals();
    gathered_.grains = std::move(losses);
    if (options.on_added) options.on_added();
    clear_on_error.release();
    return finish(options.reducer);
}

// All micro-batches at once, layer by layer.
Gathered Gatherer::gather_exactly(const BatchSource& source, const LossFunction& loss, const GatherOptions& options) {
    begin(/*measure_noise=*/false, options.plan);
    auto clear_on_error = c10::make_scope_exit([this] { clear(); });
    if (!keep_plans_) keep_plans_ = learn_keep_plans(model_, loss, load_next(source, 0, options).batch);
    Next next = load_next(source, 0, options);
    ExactBatch batch(model_, *keep_plans_, gathered_.plan, options.on_piece);
    batch.add(loss, std::move(next.batch), next.end == source.size());
    while (next.end < source.size()) {
        next = load_next(source, next.end, options);
        batch.add(loss, std::move(next.batch), next.end == source.size());
    }
    std::vector<WeightedLoss> losses = batch.finish_forward();
    std::transform(losses.begin(), losses.end(), losses.begin(), settled);
    refuse_changed_gradients();
    for (const WeightedLoss& one : losses) count(one);
    if (totals_.may_have_weight()) batch.backward(precision_->loss_scale());
    refuse_sparse_gradients();
    for (const WeightedLoss& one : losses) {
        if (!one.weight.is_known_zero()) totals_.add(one);
    }
    mark_gradients();
    clear_on_error.release();
    // The model may have changed since it was learned: the next batch keeps what this one shows.
    if (batch.fingerprint() != keep_plans_->all.fingerprint) keep_plans_ = keep_plans_of(batch.program());
    return finish();
}

void Gatherer::sum_in_any_order(const GradientRanges& ranges, std::int64_t summands) {
    sums_.emplace(parameters_, ranges, summands);
}

void Gatherer::enter(const Plan& plan) {
    for (const auto& scope : scopes_) scope->enter(plan);
    if (layers_) layers_->begin_forward();
}

void Gatherer::refuse_stale_gradients() {
    const auto refuse_if = [](bool stale, const Parameter& parameter) {
        require_that(
            !stale, "parameter ", parameter.name,
            " has a gradient that does not belong to this batch; clear it (zero_grad) before the batch begins");
    };
    std::vector<const Parameter*> found;
    std::vector<at::Tensor> nonzero;
    for (const Parameter& parameter : parameters_) {
        const at::Tensor& gradient = parameter.tensor.grad();
        if (!gradient.defined()) continue;
        refuse_if(gradient.layout() != at::kStrided, parameter);
        found.push_back(&parameter);
        nonzero.push_back(at::count_nonzero(gradient));
    }
    const std::vector<double> counts = numbers_in(nonzero);
    for (std::size_t i = 0; i < counts.size(); ++i) refuse_if(counts[i] != 0.0, *found[i]);
}

Gatherer::Mark::Mark(const at::Tensor& of)
    : gradient(of.getIntrusivePtr()), version(of.defined() ? static_cast<std::uint32_t>(of._version()) : 0) {}

bool Gatherer::Mark::holds(const at::Tensor& now) const {
    return gradient._unsafe_get_target() == now.unsafeGetTensorImpl() &&
           (!now.defined() || version == static_cast<std::uint32_t>(now._version()));
}

void Gatherer::mark_gradients() {
    marks_.clear();
    for (const Parameter& parameter : parameters_) marks_.emplace_back(parameter.tensor.grad());
}

void Gatherer::refuse_changed_gradients() const {
    for (std::size_t i = 0; i < parameters_.size(); ++i) {
        require_that(marks_[i].holds(parameters_[i].tensor.grad()), "the gradient of parameter ", parameters_[i].name,
                     " changed while the loss was computed: the loss function must neither call backward() nor "
                     "clear gradients (zero_grad); return the sum, and this library differentiates it");
    }
}

void Gatherer::require_idle() const {
    require_that(state_ != State::open,
                 "the previous batch was not finished: call finish() after its last micro-batch");
    require_that(state_ != State::gathered,
                 "the previous batch was gathered but neither applied nor discarded: call apply() or discard() first");
}

void Gatherer::begin(bool measure_noise, const Plan& plan) {
    require_idle();
    refuse_stale_gradients();
    clear();
    gathered_ = {.plan = plan};
    if (plan.batch_norm == BatchNorm::deferred || plan.batch_norm == BatchNorm::frozen) {
        layers_ = std::make_unique<BatchNormLayers>(plan.batch_norm, model_->buffers());
    }
    enter(plan);
    if (measure_noise) norms_.emplace();
    mark_gradients();
    state_ = State::open;
}

void Gatherer::add(const WeightedLoss& loss) {
    require_that(state_ == State::open, "no batch is open: call begin() before the first micro-batch");
    auto clear_on_error = c10::make_scope_exit([this] { clear(); });
    refuse_changed_gradients();
    add_checked(loss);
    mark_gradients();
    clear_on_error.release();
}

void Gatherer::add_checked(const WeightedLoss& given) {
    const WeightedLoss loss = settled(given);
    require_that(gathered_.plan.batch_norm != BatchNorm::exact || gathered_.micro_batches == 0,
                 "exact BatchNorm needs all micro-batches of a batch at once: pass the whole batch to step() or "
                 "gather(), or choose the policy deferred");
    count(loss);
    if (layers_) layers_->end_forward();
    const auto next_forward = c10::make_scope_exit([this] {
        if (layers_) layers_->begin_forward();
    });
    if (loss.weight.is_known_zero()) return;
    const double scale = precision_->loss_scale();
    model_->backward(scale == 1.0 ? loss.sum : loss.sum * scale);
    refuse_sparse_gradients();
    totals_.add(loss, norms_ ? norms_->added(parameters_) : at::Tensor());
    if (sums_) sums_->take();
}

void Gatherer::count(const WeightedLoss& loss) {
    validate(loss);
    ++gathered_.micro_batches;
    if (loss.weight.is_known_zero()) return;
    require_that(loss.sum.requires_grad(),
                 "the loss depends on no parameter that requires a gradient: is every parameter frozen, or does the "
                 "loss function detach?");
    totals_.count(loss.weight);
}

Gathered Gatherer::finish(Reducer* reducer) {
    require_that(state_ == State::open, "no batch is open: call begin() before finish()");
    norms_.reset();  // frees its memory before the update
    auto clear_on_error = c10::make_scope_exit([this] { clear(); });
    refuse_changed_gradients();
    const bool has_others = reducer != nullptr && reducer->size() > 1;
    measure(has_others ? reducer : nullptr);
    if (layers_ && has_others) layers_->pool(reducer->gather(layers_->packed()));
    if (layers_) layers_->finish();
    layers_.reset();
    clear_on_error.release();
    for (const auto& scope : scopes_) scope->leave();
    state_ = State::gathered;
    return std::exchange(gathered_, {});
}

void Gatherer::hand_over(std::span<const GradientView> sums, double divisor) {
    if (state_ != State::gathered) throw Error(ErrorKind::usage, "nothing is gathered to hand over");
    const at::NoGradGuard no_grad;
    if (divisor != 1.0 && !sums.empty()) at::_foreach_div_(sums_of(sums), divisor);
    state_ = State::idle;
    totals_ = {};
}

void Gatherer::refuse_sparse_gradients() const {
    for (const Parameter& parameter : parameters_) {
        const at::Tensor& gradient = parameter.tensor.grad();
        require_that(!gradient.defined() || gradient.layout() == at::kStrided, "parameter ", parameter.name,
                     " has a sparse gradient; create its embedding with sparse = false");
    }
}

void Gatherer::measure(Reducer* reducer) {
    read_totals();
    if (gathered_.weight == 0.0) drop_gradients();  // zeros, of weights that were not known
    const bool in_any_order = sums_.has_value();
    gathered_.sums = in_any_order ? sums_->sums() : gradients_in(tensors_of(parameters_));
    sums_.reset();
    if (gathered_.weight == 0.0) gathered_.sums.clear();
    const double scale = precision_->loss_scale();
    if (reducer != nullptr) gathered_ = reducer->reduce(std::move(gathered_), parameters_, scale);
    require_that(gathered_.weight == 0.0 || !gathered_.sums.empty() || reducer != nullptr, no_gradient);
    if (gathered_.weight > 0.0 && reducer == nullptr) {
        const std::vector<at::Tensor> sums = sums_of(gathered_.sums);
        const double norm = in_any_order ? norm_of_squares(squares_of_each(sums)) : joint_norm(sums);
        gathered_.gradient_norm = norm / (gathered_.weight * scale);
    }
    if (reducer != nullptr || in_any_order) place(gathered_.sums);
}

// Makes the sums, and no others, the parameters' .grad.
void Gatherer::place(GradientViews& sums) {
    const at::NoGradGuard no_grad;
    drop_gradients();
    for (GradientView& one : sums) {
        one.sum = one.sum.to(one.parameter.scalar_type());
        one.parameter.mutable_grad() = one.sum;
    }
}

GradientViews Gatherer::gradients_to_come() const {
    if (!sums_) return gradients_in(tensors_of(parameters_));
    GradientViews views = sums_->sums();
    for (GradientView& one : views) one.sum = one.parameter;
    return views;
}

void Gatherer::read_totals() {
    totals_.read();
    gathered_.loss_sum = totals_.loss_sum();
    gathered_.weight = totals_.weight();
    gathered_.parts = totals_.parts();
}

PartialBatch Gatherer::leave(const BatchSource& source, std::int64_t samples, bool measure_noise) {
    read_totals();
    PartialBatch partial{.so_far = std::exchange(gathered_, {}),
                         .samples = samples,
                         .fingerprint = source.fingerprint(),
                         .measure_noise = measure_noise};
    partial.so_far.sums = gradients_in(tensors_of(parameters_));
    if (layers_) layers_->save(StateWriter(partial.batch_norm));
    clear();
    return partial;
}

void Gatherer::require_partial(const BatchSource& source, const PartialBatch& partial) const {
    require_that(partial.fingerprint == source.fingerprint() && partial.samples >= 1 && partial.samples < source.size(),
                 "the partial batch belongs to another batch: pass gather() the batch that was interrupted");
    for (const GradientView& view : partial.so_far.sums) {
        const auto is_owner = [&view](const Parameter& one) { return one.tensor.is_same(view.parameter); };
        require_that(!std::none_of(parameters_.begin(), parameters_.end(), is_owner) &&
                         view.sum.sizes() == view.parameter.sizes() &&
                         view.sum.scalar_type() == view.parameter.scalar_type(),
                     "the partial batch has gradients of other parameters");
    }
}

void Gatherer::resume(const BatchSource& source, PartialBatch& partial, const Plan& plan) {
    require_partial(source, partial);
    begin(partial.measure_noise, plan);
    if (layers_) layers_->load(StateReader(partial.batch_norm));
    auto clear_on_error = c10::make_scope_exit([this] { clear(); });
    for (const GradientView& view : partial.so_far.sums) {
        // A copy, so the partial batch does not change.
        view.parameter.mutable_grad() = view.sum.use_count() > 1 ? view.sum.clone() : view.sum;
    }
    gathered_ = std::exchange(partial.so_far, {});
    gathered_.sums.clear();
    gathered_.plan = plan;
    totals_ = BatchTotals(gathered_.loss_sum, gathered_.weight, gathered_.parts);
    if (norms_) norms_->begin_with(parameters_);
    mark_gradients();
    clear_on_error.release();
}

void Gatherer::drop_gradients() {
    for (const Parameter& parameter : parameters_) parameter.tensor.mutable_grad() = at::Tensor();
}

void Gatherer::clear() {
    drop_gradients();
    totals_ = {};
    norms_.reset();
    sums_.reset();
    layers_.reset();
    for (const auto& scope : scopes_) scope->leave();
    state_ = State::idle;
}

}  // namespace microbatch
