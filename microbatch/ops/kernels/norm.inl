// Layer norm of rows (Ba et al. 2016, arXiv:1607.06450), with the additions that stand beside it in a residual stream.

inline float row_sum(const float* row, int64_t width) {
    Vector sums{};
    for_each_vector(width, [&](int64_t i, int64_t some) { sums += load_some(row + i, some); });
    return sum_of(sums);
}

inline float row_squares(const float* row, int64_t width, float mean) {
    Vector sums{};
    int64_t i = 0;
    for (; i + lanes <= width; i += lanes) {
        const Vector difference = load(row + i) - mean;
        sums += difference * difference;
    }
    float sum = sum_of(sums);
    for (; i < width; ++i) sum += (row[i] - mean) * (row[i] - mean);
    return sum;
}

void add_rows(const RowSums& sums) {
    for (int64_t r = 0; r < sums.rows; ++r) {
        const int64_t row = r * sums.width;
        for_each_vector(sums.width, [&](int64_t i, int64_t some) {
            const Vector added = load_some(sums.added + row + i, some) + load_some(sums.bias + i, some);
            store_some(sums.sum + row + i, load_some(sums.x + row + i, some) + added, some);
        });
    }
}

void norm_rows(const NormRows& norm) {
    for (int64_t r = 0; r < norm.rows; ++r) {
        const float* x = norm.x + r * norm.width;
        float* y = norm.y + r * norm.width;
        const float width = static_cast<float>(norm.width);
        const float mean = row_sum(x, norm.width) / width;
        const float variance = row_squares(x, norm.width, mean) / width;
        const float inverse = 1.0F / sqrtf(variance + norm.epsilon);
        norm.means[r] = mean;
        norm.inverses[r] = inverse;
        for_each_vector(norm.width, [&](int64_t i, int64_t some) {
            const Vector normed = (load_some(x + i, some) - mean) * inverse;
            store_some(y + i, normed * load_some(norm.scale + i, some) + load_some(norm.shift + i, some), some);
        });
    }
}

// With n = (x - mean) inverse and g = gradient scale: the gradient of x is inverse (g - mean(g) - n mean(g n)).
inline void norm_row_backward(const NormRowsBackward& norm, int64_t r) {
    const int64_t row = r * norm.width;
    const float mean = norm.means[r], inverse = norm.inverses[r];
    Vector sum{}, product{};
    for_each_vector(norm.width, [&](int64_t i, int64_t some) {
        // Beyond the row's end scale and gradient are 0.
        const Vector normed = (load_some(norm.x + row + i, some) - mean) * inverse;
        const Vector scale = load_some(norm.scale + i, some), gradient = load_some(norm.gradient + row + i, some);
        store_some(norm.y + row + i, normed * scale + load_some(norm.shift + i, some), some);
        store_some(norm.grad_scale + i, load_some(norm.grad_scale + i, some) + gradient * normed, some);
        store_some(norm.grad_shift + i, load_some(norm.grad_shift + i, some) + gradient, some);
        const Vector scaled = gradient * scale;
        sum += scaled;
        product += scaled * normed;
    });
    const float width = static_cast<float>(norm.width);
    const float mean_sum = sum_of(sum) / width, mean_product = sum_of(product) / width;
    for_each_vector(norm.width, [&](int64_t i, int64_t some) {
        const Vector normed = (load_some(norm.x + row + i, some) - mean) * inverse;
        const Vector scaled = load_some(norm.gradient + row + i, some) * load_some(norm.scale + i, some);
        const Vector grad_x =
            load_some(norm.residual + row + i, some) + inverse * (scaled - mean_sum - normed * mean_product);
        store_some(norm.grad_x + row + i, grad_x, some);
        store_some(norm.grad_x_sums + i, load_some(norm.grad_x_sums + i, some) + grad_x, some);
    });
}

void norm_rows_backward(const NormRowsBackward& norm) {
    for (int64_t r = 0; r < norm.rows; ++r) norm_row_backward(norm, r);
}

// RMS norm (Zhang and Sennrich 2019, arXiv:1910.07467).
void rms_norm_rows(const RmsNormRows& norm) {
    for (int64_t r = 0; r < norm.rows; ++r) {
        const float* x = norm.x + r * norm.width;
        float* y = norm.y + r * norm.width;
        const float squares = row_squares(x, norm.width, 0.0F) / static_cast<float>(norm.width);
        const float inverse = 1.0F / sqrtf(squares + norm.epsilon);
        norm.inverses[r] = inverse;
        for_each_vector(norm.width, [&](int64_t i, int64_t some) {
            store_some(y + i, load_some(x + i, some) * inverse * load_some(norm.scale + i, some), some);
        });
    }
}

// With n = x inverse and g = gradient scale: the gradient of x is inverse (g - n mean(g n)).
inline void rms_norm_row_backward(const RmsNormRowsBackward& norm, int64_t r) {
    const int64_t row = r * norm.width;
    const float inverse = norm.inverses[r];
    Vector product{};
    for_each_vector(norm.width, [&](int64_t i, int64_t some) {
        const Vector normed = load_some(norm.x + row + i, some) * inverse;
        const Vector scale = load_some(norm.scale + i, some), gradient = load_some(norm.gradient + row + i, some);
        if (norm.y != nullptr) store_some(norm.y + row + i, normed * scale, some);
        store_some(norm.grad_scale + i, load_some(norm.grad_scale + i, some) + gradient * normed, some);
        product += gradient * scale * normed;
    });
    const float mean_product = sum_of(product) / static_cast<float>(norm.width);
    for_each_vector(norm.width, [&](int64_t i, int64_t some) {
        const Vector normed = load_some(norm.x + row + i, some) * inverse;
        const Vector scaled = load_some(norm.gradient + row + i, some) * load_some(norm.scale + i, some);
        Vector grad_x = inverse * (scaled - normed * mean_product);
        if (norm.residual != nullptr) grad_x = load_some(norm.residual + row + i, some) + grad_x;
        store_some(norm.grad_x + row + i, grad_x, some);
    });
}

void rms_norm_rows_backward(const RmsNormRowsBackward& norm) {
    for (int64_t r = 0; r < norm.rows; ++r) rms_norm_row_backward(norm, r);
}

void sum_columns(int64_t rows, int64_t width, const float* values, float* sums) {
    for_each_vector(width, [&](int64_t i, int64_t some) {
        Vector sum = load_some(sums + i, some);
        for (int64_t r = 0; r < rows; ++r) sum += load_some(values + r * width + i, some);
        store_some(sums + i, sum, some);
    });
}
