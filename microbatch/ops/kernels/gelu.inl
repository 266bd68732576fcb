// GELU by the tanh formula, as a sigmoid: 1/2 (1 + tanh u) = 1 / (1 + e^(-2u)), u = sqrt(2/pi) (x + 0.044715 x^3).

// Beyond these GELU is 0 and x to all digits, its slope 0 and 1; between them e^(-2u) is a number.
constexpr float gelu_least = -9.9F, gelu_most = 9.9F;

inline Vector gelu_sigmoid(Vector bounded) {
    constexpr float minus_two_k = -1.5957691216F;  // -2 sqrt(2/pi)
    return 1.0F / (1.0F + exp(minus_two_k * bounded * (1.0F + 0.044715F * (bounded * bounded))));
}

inline Vector gelu_value(Vector x) {
    const Vector above = at_least(x, gelu_least);
    return above * gelu_sigmoid(at_most(above, gelu_most));
}

struct GeluAndSlope {
    Vector value, slope;
};

inline GeluAndSlope gelu_and_slope(Vector x) {
    constexpr float two_k = 1.5957691216F;
    const Vector above = at_least(x, gelu_least), bounded = at_most(above, gelu_most);
    const Vector s = gelu_sigmoid(bounded);
    const Vector slope = s + bounded * s * (1.0F - s) * (two_k * (1.0F + 3 * 0.044715F * (bounded * bounded)));
    return {above * s, slope};
}

void gelu(const float* x, float* y, int64_t count) {
    for_each_vector(count,
                    [&](int64_t i, int64_t some) { store_some(y + i, gelu_value(load_some(x + i, some)), some); });
}

void gelu_backward(const float* x, const float* gradient, float* result, int64_t count) {
    for_each_vector(count, [&](int64_t i, int64_t some) {
        const Vector slope = gelu_and_slope(load_some(x + i, some)).slope;
        store_some(result + i, load_some(gradient + i, some) * slope, some);
    });
}

void gelu_rows(int64_t rows, int64_t width, const float* bias, float* x, float* y) {
    for (int64_t r = 0; r < rows; ++r, x += width, y += width) {
        for_each_vector(width, [&](int64_t i, int64_t some) {
            const Vector value = load_some(x + i, some) + load_some(bias + i, some);
            store_some(x + i, value, some);
            store_some(y + i, gelu_value(value), some);
        });
    }
}

void gelu_rows_backward(int64_t rows, int64_t width, const float* x, float* gradient, float* y, float* sums) {
    for (int64_t r = 0; r < rows; ++r, x += width, gradient += width, y += width) {
        for_each_vector(width, [&](int64_t i, int64_t some) {
            const GeluAndSlope at_x = gelu_and_slope(load_some(x + i, some));
            const Vector grad_x = load_some(gradient + i, some) * at_x.slope;
            store_some(y + i, at_x.value, some);
            store_some(gradient + i, grad_x, some);
            store_some(sums + i, load_some(sums + i, some) + grad_x, some);
        });
    }
}
