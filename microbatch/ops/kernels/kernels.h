#pragma once

#include <cstdint>
#include <vector>

namespace microbatch {

/// One head of one sample, for attention. Rows are one token each, their numbers side by side.
struct AttentionHead {
    std::int64_t tokens = 0;
    std::int64_t keys = 0;                                 ///< 1 to tokens: the first of them, which queries attend to
    std::int64_t size = 0;                                 ///< numbers per token in q, k, v and out
    bool causal = true;                                    ///< a query attends to no later key
    float scale = 1.0F;                                    ///< of q . k
    std::int64_t row = 0, kv_row = 0, out_row = 0;         ///< floats from one token to the next
    const float *q = nullptr, *k = nullptr, *v = nullptr;  ///< row, kv_row and kv_row apart
    float* out = nullptr;                                  ///< out_row apart
    float* log_sums = nullptr;                             ///< [tokens], log of the sum of e^score of a query
    const float* gradient = nullptr;                       ///< of out, out_row apart; backward only
    float* grad_q = nullptr;                               ///< row apart, overwritten by backward
    float *grad_k = nullptr, *grad_v = nullptr;            ///< kv_row apart
    bool add_to_keys = false;                              ///< backward adds to grad_k and grad_v
};

/// RMS norm: y = x inverse scale, row by row, inverse = 1 / sqrt(mean(x^2) + epsilon).
struct RmsNormRows {
    std::int64_t rows = 0, width = 0;
    float epsilon = 0.0F;
    const float* x = nullptr;
    const float* scale = nullptr;  ///< [width]
    float* y = nullptr;
    float* inverses = nullptr;  ///< [rows]
};

/// Its gradient, and optionally y again.
struct RmsNormRowsBackward {
    std::int64_t rows = 0, width = 0;
    const float* x = nullptr;
    const float* inverses = nullptr;
    const float* scale = nullptr;
    const float* gradient = nullptr;  ///< of y
    const float* residual = nullptr;  ///< the gradient of x that does not come through the norm, or nullptr
    float* grad_x = nullptr;          ///< the sum of both; may be gradient
    float* y = nullptr;               ///< or nullptr
    float* grad_scale = nullptr;      ///< [width]; these rows' gradient is added
};

/// Rotary positions: in each of `heads` parts of a row, pairs of numbers half a part apart are rotated, in place.
/// Forward: (a, b) becomes (a cos - b sin, b cos + a sin); backward is the transpose of that.
struct RotateRows {
    std::int64_t rows = 0, heads = 0, size = 0;        ///< size: numbers of a part, even
    std::int64_t row = 0;                              ///< floats from one row to the next
    const float *cosines = nullptr, *sines = nullptr;  ///< [rows, size]
    float* values = nullptr;
};

/// sum = x + added + bias, row by row; rows of `width` numbers, without gaps.
struct RowSums {
    std::int64_t rows = 0, width = 0;
    const float *x = nullptr, *added = nullptr;
    const float* bias = nullptr;  ///< [width]
    float* sum = nullptr;         ///< may be x or added
};

/// Layer norm: y = (x - mean) inverse scale + shift, row by row, inverse = 1 / sqrt(variance + epsilon).
struct NormRows {
    std::int64_t rows = 0, width = 0;
    float epsilon = 0.0F;
    const float* x = nullptr;
    const float *scale = nullptr, *shift = nullptr;  ///< [width]
    float* y = nullptr;
    float *means = nullptr, *inverses = nullptr;  ///< [rows]
};

/// Its gradient, and y again.
struct NormRowsBackward {
    std::int64_t rows = 0, width = 0;
    const float* x = nullptr;
    const float *means = nullptr, *inverses = nullptr;
    const float *scale = nullptr, *shift = nullptr;
    const float* gradient = nullptr;  ///< of y
    const float* residual = nullptr;  ///< the gradient of x that does not come through the norm
    float* grad_x = nullptr;          ///< the sum of both; may be gradient
    float* y = nullptr;
    /// [width]; these rows' gradients are added.
    float *grad_scale = nullptr, *grad_shift = nullptr, *grad_x_sums = nullptr;
};

/// Group norm of images, all channels of a pixel side by side: y = (x - mean) inverse scale + shift, then optionally
/// + added and max(0, .). Mean and inverse deviation are those of a sample's group of channels.
struct GroupNormImages {
    std::int64_t samples = 0, pixels = 0, channels = 0, groups = 0;
    float epsilon = 0.0F;
    const float* x = nullptr;
    const float *scale = nullptr, *shift = nullptr;  ///< [channels]
    const float* added = nullptr;                    ///< as x, or nullptr
    bool relu = false;
    float* y = nullptr;
    float* statistics = nullptr;  ///< [samples, 2, groups]: means, inverses
};

/// Its gradient.
struct GroupNormImagesBackward {
    std::int64_t samples = 0, pixels = 0, channels = 0, groups = 0;
    const float* x = nullptr;
    const float* y = nullptr;  ///< nullptr where there was no ReLU
    const float* statistics = nullptr;
    const float* scale = nullptr;
    const float* gradient = nullptr;                     ///< of y
    float* grad_x = nullptr;                             ///< no input
    float* grad_added = nullptr;                         ///< no input, or nullptr
    float *grad_scale = nullptr, *grad_shift = nullptr;  ///< [channels]; these samples' gradients are added
};

/// A stretch of a parameter, its gradient and its optimizer state. Number: float or double.
template <class Number>
struct UpdateArrays {
    Number* parameter;
    const Number* gradient;
    Number* first;   ///< moment, or velocity: nullptr without momentum
    Number* second;  ///< AdamW alone
    std::int64_t count;
};

struct AdamWUpdate {
    double beta1, beta2, epsilon;
    double kept;        ///< of the parameter: 1 - eta lambda
    double length;      ///< of the step: eta / (1 - b1^t)
    double correction;  ///< of the root: 1 / sqrt(1 - b2^t)
    double divisor;     ///< of the gradient
};

struct SgdUpdate {
    double learning_rate, momentum;
    bool nesterov;
    double kept;     ///< of the parameter, with decoupled decay: 1 - eta lambda
    double decay;    ///< a coupled one's share of the parameter, which is added to the gradient
    double divisor;  ///< of the gradient
};

/// Of a row of logits, which is overwritten with exp(x - max) of every element. Below -87 that is 0, as nothing is lost
/// beside the largest, which is 1; elsewhere it is exact to two units in the last place. NaN anywhere, or an infinite
/// maximum, makes the sum NaN.
struct Exponentials {
    float largest;  ///< of the logits
    double sum;     ///< of the exponentials
};

/// The loops that give the same bits for every kind of vector: no multiplication is fused with an addition.
struct ExactKernels {
    void (*adamw)(const AdamWUpdate& how, const UpdateArrays<float>& arrays);
    void (*adamw_double)(const AdamWUpdate& how, const UpdateArrays<double>& arrays);
    void (*sgd)(const SgdUpdate& how, const UpdateArrays<float>& arrays);
    void (*sgd_double)(const SgdUpdate& how, const UpdateArrays<double>& arrays);
    /// In fp64.
    double (*sum_of_squares)(const float* numbers, std::int64_t count);
    double (*sum_of_squares_double)(const double* numbers, std::int64_t count);
    /// sums += numbers, each rounded to a multiple of the quantum, which is `shift` / (1.5 * 2^52). Returns the largest
    /// magnitude; NaN does not count.
    double (*add_rounded)(const float* numbers, double* sums, std::int64_t count, double shift);
    double (*add_rounded_double)(const double* numbers, double* sums, std::int64_t count, double shift);
    Exponentials (*exponentiate_row)(float* row, std::int64_t count);
    void (*scale_row)(float* row, std::int64_t count, float factor);
};

/// The inner loops, one table per kind of vector, so that a program compiled for any processor uses the widest vectors
/// of the one it runs on. All work on fp32, in the calling thread, on the caller's memory; NaN and infinity give NaN
/// where they do in exact arithmetic.
struct Kernels {
    const char* name;
    const ExactKernels* exact;
    void (*gelu)(const float* x, float* y, std::int64_t count);
    /// result = gradient * gelu'(x).
    void (*gelu_backward)(const float* x, const float* gradient, float* result, std::int64_t count);
    /// x += bias, y = gelu(x), row by row.
    void (*gelu_rows)(std::int64_t rows, std::int64_t width, const float* bias, float* x, float* y);
    /// y = gelu(x) and gradient *= gelu'(x); the rows of the gradient are added to sums, [width].
    void (*gelu_rows_backward)(std::int64_t rows, std::int64_t width, const float* x, float* gradient, float* y,
                               float* sums);
    void (*add_rows)(const RowSums& sums);
    /// y = silu(gate) * up, silu(x) = x / (1 + e^-x).
    void (*gated)(const float* gate, const float* up, float* y, std::int64_t count);
    /// y again, and the gradients of gate and up from that of y, which may be in the place of grad_up.
    void (*gated_backward)(const float* gate, const float* up, const float* gradient, float* grad_gate, float* grad_up,
                           float* y, std::int64_t count);
    void (*rms_norm_rows)(const RmsNormRows& norm);
    void (*rms_norm_rows_backward)(const RmsNormRowsBackward& norm);
    void (*rotate_rows)(const RotateRows& of);
    void (*rotate_rows_backward)(const RotateRows& of);
    void (*norm_rows)(const NormRows& norm);
    void (*norm_rows_backward)(const NormRowsBackward& norm);
    /// Adds every row to sums, [width].
    void (*sum_columns)(std::int64_t rows, std::int64_t width, const float* values, float* sums);
    /// Sizes of scratch memory are in floats.
    std::int64_t (*group_norm_scratch)(std::int64_t channels);
    void (*group_norm_images)(const GroupNormImages& norm, float* scratch);
    /// y again, from the statistics that are there.
    void (*group_norm_images_again)(const GroupNormImages& norm, float* scratch);
    void (*group_norm_images_backward)(const GroupNormImagesBackward& norm, float* scratch);
    std::int64_t (*attention_forward_scratch)(std::int64_t tokens, std::int64_t size);
    void (*attention_forward)(const AttentionHead& head, float* scratch);
    std::int64_t (*attention_backward_scratch)(std::int64_t tokens, std::int64_t size);
    void (*attention_backward)(const AttentionHead& head, float* scratch);
};

/// The table for the widest vectors that this processor has, chosen once. Threads: any.
const Kernels& kernels();

/// All tables that this processor can run, the narrowest vectors first.
std::vector<const Kernels*> all_kernels();

}  // namespace microbatch
