// Rotary positions (Su et al. 2021, arXiv:2104.09864), pairs half a head apart, as Llama arranges them.

// cosines and sines of both numbers of a pair: they may differ.
inline void rotate(const RotateRows& of, bool back) {
    const int64_t half = of.size / 2;
    for (int64_t r = 0; r < of.rows; ++r) {
        const float *cosines = of.cosines + r * of.size, *sines = of.sines + r * of.size;
        for (int64_t h = 0; h < of.heads; ++h) {
            float* const first = of.values + r * of.row + h * of.size;
            float* const second = first + half;
            for_each_vector(half, [&](int64_t i, int64_t some) {
                const Vector a = load_some(first + i, some), b = load_some(second + i, some);
                const Vector cos_a = load_some(cosines + i, some), cos_b = load_some(cosines + half + i, some);
                const Vector sin_a = load_some(sines + i, some), sin_b = load_some(sines + half + i, some);
                store_some(first + i, back ? a * cos_a + b * sin_b : a * cos_a - b * sin_a, some);
                store_some(second + i, back ? b * cos_b - a * sin_a : b * cos_b + a * sin_b, some);
            });
        }
    }
}

void rotate_rows(const RotateRows& of) {
    rotate(of, false);
}

void rotate_rows_backward(const RotateRows& of) {
    rotate(of, true);
}
