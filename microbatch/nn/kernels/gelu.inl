// GELU by the tanh formula, as a sigmoid: 1/2 (1 + tanh u) = 1 / (1 + e^(-2u)), u = sqrt(2/pi) (x + 0.044715 x^3).

inline Vector gelu_sigmoid(Vector x) {
    constexpr float minus_two_k = -1.5957691216F;  // -2 sqrt(2/pi)
    const Vector exponents = minus_two_k * x * (1.0F + 0.044715F * (x * x));
    // 0, not the smallest number: x may be large.
    return exponents > splat(87.0F) ? Vector{} : 1.0F / (1.0F + exp(exponents));
}

inline Vector gelu_value(Vector x) {
    return x * gelu_sigmoid(x);
}

inline Vector gelu_slope(Vector x) {
    constexpr float two_k = 1.5957691216F;
    x = at_most(at_least(x, -30.0F), 30.0F);  // where the slope is 0 and 1, and no square overflows
    const Vector s = gelu_sigmoid(x);
    return s + x * s * (1.0F - s) * (two_k * (1.0F + 3 * 0.044715F * (x * x)));
}

// The last few elements in a vector of their own.
template <class Function>
inline void for_each_vector(int64_t count, const Function& function) {
    int64_t i = 0;
    for (; i + lanes <= count; i += lanes) function(i, lanes);
    if (i < count) function(i, count - i);
}

inline Vector load_some(const float* from, int64_t count) {
    if (count == lanes) return load(from);
    Vector values{};
    for (int64_t i = 0; i < count; ++i) values[i] = from[i];
    return values;
}

inline void store_some(float* to, Vector values, int64_t count) {
    if (count == lanes) {
        store(to, values);
    } else {
        for (int64_t i = 0; i < count; ++i) to[i] = values[i];
    }
}

void gelu(const float* x, float* y, int64_t count) {
    for_each_vector(count,
                    [&](int64_t i, int64_t some) { store_some(y + i, gelu_value(load_some(x + i, some)), some); });
}

void gelu_backward(const float* x, const float* gradient, float* result, int64_t count) {
    for_each_vector(count, [&](int64_t i, int64_t some) {
        const Vector slope = gelu_slope(load_some(x + i, some));
        store_some(result + i, load_some(gradient + i, some) * slope, some);
    });
}
