#include "microbatch/autograd/in_place_gradients.h"

#include <ATen/TensorSubclassLikeUtils.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/embedding.h>
#include <ATen/ops/embedding_backward.h>
#include <ATen/ops/mm.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/functions/accumulate_grad.h>
#include <torch/library.h>

#include <string>
#include <utility>

#include "microbatch/autograd/sum_in_place.h"
#include "microbatch/runtime/gemm.h"

namespace microbatch {

namespace {

using torch::autograd::AccumulateGrad;
using torch::autograd::AutogradContext;
using torch::autograd::Function;
using torch::autograd::Node;
using torch::autograd::variable_list;

const std::shared_ptr<std::atomic<int>>& scopes_of_this_thread() {
    static thread_local const auto scopes = std::make_shared<std::atomic<int>>(0);
    return scopes;
}

/// The key set that finds torch's own autograd function, which this one replaces.
c10::DispatchKeySet to_autograd(c10::DispatchKeySet keys) {
    return (keys & c10::after_autograd_keyset) | c10::DispatchKeySet(c10::DispatchKey::AutogradOther);
}

/// The leaf that the matrix of a product is, or is the transpose of.
struct Weight {
    at::Tensor leaf;            // undefined if the matrix is neither
    Node* transpose = nullptr;  // the matrix's node, if it is not the leaf; lives as long as the product's node
};

bool is_transpose(const at::Tensor& matrix, const at::Tensor& of) {
    return of.dim() == 2 && matrix.size(0) == of.size(1) && matrix.size(1) == of.size(0) &&
           matrix.stride(0) == of.stride(1) && matrix.stride(1) == of.stride(0);
}

Weight weight_of(const at::Tensor& matrix) {
    if (!matrix.requires_grad()) return {};
    if (matrix.is_leaf()) return {matrix};
    const auto made_by = matrix.grad_fn();
    const std::string name = made_by->name();
    if (name != "TBackward0" && name != "TransposeBackward0") return {};
    const auto* accumulate = dynamic_cast<const AccumulateGrad*>(made_by->next_edge(0).function.get());
    if (accumulate == nullptr || !is_transpose(matrix, accumulate->variable)) return {};
    return {accumulate->variable, made_by.get()};
}

bool by_columns(const at::Tensor& matrix) {
    return matrix.stride(0) == 1 && matrix.stride(1) == matrix.size(0);
}

/// a b, with a gradient if one is needed.
at::Tensor times(const at::Tensor& a, const at::Tensor& b) {
    return at::GradMode::is_enabled() ? at::mm(a, b) : gemm(a, b);
}

/// y = x m + b.
class ProductOfWeight : public Function<ProductOfWeight> {
public:
    static at::Tensor forward(AutogradContext* context, const at::Tensor& x, const at::Tensor& matrix,
                              const std::optional<at::Tensor>& bias, const Weight& weight) {
        context->set_materialize_grads(false);
        context->save_for_backward(
            {matrix.requires_grad() ? x : at::Tensor(), x.requires_grad() ? matrix : at::Tensor()});
        context->saved_data["more"] = at::IValue::make_capsule(
            c10::make_intrusive<More>(weight, by_columns(x), by_columns(matrix), bias.has_value()));
        return gemm(x, matrix, bias);
    }

    static variable_list backward(AutogradContext* context, variable_list gradients) {
        variable_list results(4);
        const at::Tensor& gradient = gradients[0];
        if (!gradient.defined()) return results;
        const auto more = c10::static_intrusive_pointer_cast<More>(context->saved_data["more"].toCapsule());
        const variable_list saved = context->get_saved_variables();
        const at::Tensor &x = saved[0], &matrix = saved[1];
        if (context->needs_input_grad(1) && !add_weight_gradient(more->weight, x, gradient)) {
            // In the layout of the matrix, like torch.
            results[1] = more->matrix_by_columns ? at::mm(gradient.t(), x).t() : at::mm(x.t(), gradient);
        }
        if (context->needs_input_grad(0)) {
            results[0] = more->x_by_columns ? times(matrix, gradient.t()).t() : times(gradient, matrix.t());
        }
        if (more->bias && context->needs_input_grad(2)) results[2] = gradient;  // torch sums it to the bias's shape
        return results;
    }

private:
    struct More : torch::CustomClassHolder {
        More(Weight of, bool x_columns, bool matrix_columns, bool with_bias)
            : weight(std::move(of)), x_by_columns(x_columns), matrix_by_columns(matrix_columns), bias(with_bias) {}

        Weight weight;
        bool x_by_columns;
        bool matrix_by_columns;
        bool bias;
    };

    static bool add_weight_gradient(const Weight& weight, const at::Tensor& x, const at::Tensor& gradient) {
        if (weight.transpose != nullptr && has_hooks(*weight.transpose)) return false;
        return sum_in_place(weight.leaf, {x, gradient}, [&](at::Tensor& sum) {
            weight.transpose != nullptr ? sum.addmm_(gradient.t(), x) : sum.addmm_(x.t(), gradient);
        });
    }
};

/// The rows of a weight at the given indices.
class RowsOfWeight : public Function<RowsOfWeight> {
public:
    static at::Tensor forward(AutogradContext* context, const at::Tensor& weight, const at::Tensor& indices,
                              std::int64_t padding) {
        context->set_materialize_grads(false);
        context->save_for_backward({indices});
        context->saved_data["weight"] = weight;
        context->saved_data["padding"] = padding;
        const at::AutoDispatchBelowADInplaceOrView no_gradient;
        return at::embedding(weight, indices, padding);
    }

    static variable_list backward(AutogradContext* context, variable_list gradients) {
        variable_list results(3);
        const at::Tensor& gradient = gradients[0];
        if (!gradient.defined() || !context->needs_input_grad(0)) return results;
        const at::Tensor weight = context->saved_data["weight"].toTensor();
        const at::Tensor indices = context->get_saved_variables()[0];
        const std::int64_t padding = context->saved_data["padding"].toInt();
        const bool added = sum_in_place(weight, {gradient}, [&](at::Tensor& sum) {
            add_rows(sum, indices.reshape({-1}), gradient.reshape({-1, gradient.size(-1)}), padding);
        });
        if (!added) {
            results[0] = at::embedding_backward(gradient, indices, weight.size(0), padding,
                                                /*scale_grad_by_freq=*/false, /*sparse=*/false);
        }
        return results;
    }

private:
    static void add_rows(at::Tensor& sum, at::Tensor indices, at::Tensor rows, std::int64_t padding) {
        if (padding >= 0) {
            const at::Tensor counted = indices.ne(padding).nonzero().squeeze(1);
            indices = indices.index_select(0, counted);
            rows = rows.index_select(0, counted);
        }
        sum.index_add_(0, indices, rows);
    }
};

bool takes_product(const at::Tensor& x, const at::Tensor& matrix, const at::Tensor* bias = nullptr) {
    return InPlaceGradients::active() && is_plain(x) && is_plain(matrix) && x.dim() == 2 && matrix.dim() == 2 &&
           (bias == nullptr || is_plain(*bias));
}

/// Also without a gradient, so that a block that runs twice, first without gradients, computes the same both times.
at::Tensor take_product(const at::Tensor& x, const at::Tensor& matrix, const std::optional<at::Tensor>& bias) {
    const bool needs_gradient = x.requires_grad() || matrix.requires_grad() || (bias && bias->requires_grad());
    if (!at::GradMode::is_enabled() || !needs_gradient) return gemm(x, matrix, bias);
    return ProductOfWeight::apply(x, matrix, bias, weight_of(matrix));
}

at::Tensor mm(c10::DispatchKeySet keys, const at::Tensor& x, const at::Tensor& matrix) {
    if (takes_product(x, matrix)) return take_product(x, matrix, std::nullopt);
    return at::_ops::mm::redispatch(to_autograd(keys), x, matrix);
}

at::Tensor addmm(c10::DispatchKeySet keys, const at::Tensor& bias, const at::Tensor& x, const at::Tensor& matrix,
                 const at::Scalar& beta, const at::Scalar& alpha) {
    if (takes_product(x, matrix, &bias) && beta.equal(1) && alpha.equal(1)) return take_product(x, matrix, bias);
    return at::_ops::addmm::redispatch(to_autograd(keys), bias, x, matrix, beta, alpha);
}

at::Tensor embedding(c10::DispatchKeySet keys, const at::Tensor& weight, const at::Tensor& indices, c10::SymInt padding,
                     bool scale_by_count, bool sparse) {
    const bool own = InPlaceGradients::active() && at::GradMode::is_enabled() && is_plain(weight) && weight.is_leaf() &&
                     weight.requires_grad() && !at::isTensorSubclassLike(indices) && !scale_by_count && !sparse;
    if (own) return RowsOfWeight::apply(weight, indices, padding.expect_int());
    return at::_ops::embedding::redispatch(to_autograd(keys), weight, indices, std::move(padding), scale_by_count,
                                           sparse);
}

// Not before somebody needs it: a program that only loads the library has torch's own operators. For good, since a
// backward may run after the scope has ended.
void override_operators() {
    [[maybe_unused]] static const auto* const library = [] {
        auto* made =
            new torch::Library(torch::Library::IMPL, "aten", c10::DispatchKey::AutogradCPU, __FILE__, __LINE__);
        made->impl("mm", TORCH_FN(mm));
        made->impl("addmm", TORCH_FN(addmm));
        made->impl("embedding", TORCH_FN(embedding));
        return made;
    }();
}

}  // namespace

bool InPlaceGradients::active() {
    return scopes_of_this_thread()->load(std::memory_order_relaxed) > 0 && !operators_are_watched();
}

InPlaceGradients::InPlaceGradients() : scopes_(scopes_of_this_thread()) {
    override_operators();
    ++*scopes_;
}

InPlaceGradients::~InPlaceGradients() {
    if (scopes_) --*scopes_;
}

}  // namespace microbatch
