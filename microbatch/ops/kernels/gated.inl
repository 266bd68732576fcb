// A linear layer gated by another: silu(gate) up (Shazeer 2020, arXiv:2002.05202, SwiGLU).

// 1 / (1 + e^-x); beyond 87 it is 0 or 1 to all digits. NaN stays.
inline Vector logistic(Vector x) {
    return 1.0F / (1.0F + exp(-at_most(at_least(x, -87.0F), 87.0F)));
}

void gated(const float* gate, const float* up, float* y, int64_t count) {
    for_each_vector(count, [&](int64_t i, int64_t some) {
        const Vector x = load_some(gate + i, some);
        store_some(y + i, x * logistic(x) * load_some(up + i, some), some);
    });
}

void gated_backward(const float* gate, const float* up, const float* gradient, float* grad_gate, float* grad_up,
                    float* y, int64_t count) {
    for_each_vector(count, [&](int64_t i, int64_t some) {
        const Vector x = load_some(gate + i, some), u = load_some(up + i, some), g = load_some(gradient + i, some);
        const Vector s = logistic(x), silu = x * s;
        store_some(y + i, silu * u, some);
        store_some(grad_up + i, g * silu, some);
        store_some(grad_gate + i, g * u * (s + silu * (1.0F - s)), some);
    });
}
