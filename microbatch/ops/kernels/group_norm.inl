// Group norm of one sample's image (Wu and He 2018, arXiv:1803.08494) with what follows it in a residual network. The
// channels of a pixel are side by side: a vector holds some channels, and goes from pixel to pixel.

// The last chunk begins early enough to be a whole one where there are that many channels: it does some of them twice.
template <class Function>
inline void for_each_chunk(int64_t channels, const Function& function) {
    int64_t c = 0;
    for (; c + lanes <= channels; c += lanes) function(c, lanes);
    if (c == channels) return;
    if (c > 0) {
        function(channels - lanes, lanes);
    } else {
        function(0, channels);
    }
}

// The sum over the pixels of value(pixel): four at a time, so that no addition waits for the one before.
template <class Value>
inline Vector sum_over_pixels(int64_t pixels, const Value& value) {
    Vector sums[4]{};
    int64_t p = 0;
    for (; p + 4 <= pixels; p += 4) {
        for (int i = 0; i < 4; ++i) sums[i] += value(p + i);
    }
    for (; p < pixels; ++p) sums[0] += value(p);
    return (sums[0] + sums[1]) + (sums[2] + sums[3]);
}

// every = each group's sum of `values` (times `weights`, where given) times `factor`, for each channel of the group.
inline void spread_group_sums(int64_t channels, int64_t groups, const float* values, const float* weights,
                              double factor, float* every) {
    const int64_t size = channels / groups;
    for (int64_t g = 0; g < groups; ++g) {
        double sum = 0;
        for (int64_t c = g * size; c < (g + 1) * size; ++c) {
            sum += static_cast<double>(values[c]) * (weights != nullptr ? static_cast<double>(weights[c]) : 1.0);
        }
        for (int64_t c = g * size; c < (g + 1) * size; ++c) every[c] = static_cast<float>(sum * factor);
    }
}

template <bool adds, bool relu>
inline void norm_pixels(const GroupNormImages& norm, int64_t first, const float* factors, const float* shifts) {
    for_each_chunk(norm.channels, [&](int64_t c, int64_t some) {
        const Vector factor = load_some(factors + c, some), shift = load_some(shifts + c, some);
        for (int64_t p = 0; p < norm.pixels; ++p) {
            const int64_t at = first + p * norm.channels + c;
            Vector y = load_some(norm.x + at, some) * factor + shift;
            if (adds) y += load_some(norm.added + at, some);
            if (relu) y = at_least(y, 0.0F);
            store_some(norm.y + at, y, some);
        }
    });
}

int64_t group_norm_scratch(int64_t channels) {
    return 4 * channels;
}

inline void find_statistics(const GroupNormImages& norm, int64_t sample, float* scratch) {
    const int64_t channels = norm.channels, groups = norm.groups;
    const double share =
        static_cast<double>(groups) / (static_cast<double>(channels) * static_cast<double>(norm.pixels));
    const float* x = norm.x + sample * norm.pixels * channels;
    float *sums = scratch, *means = scratch + channels, *variances = scratch + 2 * channels;
    for_each_chunk(channels, [&](int64_t c, int64_t some) {
        const auto value = [&](int64_t p) { return load_some(x + p * channels + c, some); };
        store_some(sums + c, sum_over_pixels(norm.pixels, value), some);
    });
    spread_group_sums(channels, groups, sums, nullptr, share, means);
    for_each_chunk(channels, [&](int64_t c, int64_t some) {
        const Vector mean = load_some(means + c, some);
        const auto square = [&](int64_t p) {
            const Vector difference = load_some(x + p * channels + c, some) - mean;
            return difference * difference;
        };
        store_some(sums + c, sum_over_pixels(norm.pixels, square), some);
    });
    spread_group_sums(channels, groups, sums, nullptr, share, variances);
    float* statistics = norm.statistics + 2 * groups * sample;
    for (int64_t g = 0; g < groups; ++g) {
        statistics[g] = means[g * (channels / groups)];
        statistics[groups + g] = 1.0F / sqrtf(variances[g * (channels / groups)] + norm.epsilon);
    }
}

inline void norm_sample(const GroupNormImages& norm, int64_t sample, float* scratch) {
    const int64_t channels = norm.channels, size = channels / norm.groups, first = sample * norm.pixels * channels;
    const float *means = norm.statistics + 2 * norm.groups * sample, *inverses = means + norm.groups;
    float *factors = scratch, *shifts = scratch + channels;
    for (int64_t c = 0; c < channels; ++c) {
        factors[c] = inverses[c / size] * norm.scale[c];
        shifts[c] = norm.shift[c] - means[c / size] * factors[c];
    }
    if (norm.added != nullptr) {
        norm.relu ? norm_pixels<true, true>(norm, first, factors, shifts)
                  : norm_pixels<true, false>(norm, first, factors, shifts);
    } else {
        norm.relu ? norm_pixels<false, true>(norm, first, factors, shifts)
                  : norm_pixels<false, false>(norm, first, factors, shifts);
    }
}

void group_norm_images(const GroupNormImages& norm, float* scratch) {
    for (int64_t sample = 0; sample < norm.samples; ++sample) {
        find_statistics(norm, sample, scratch);
        norm_sample(norm, sample, scratch);
    }
}

void group_norm_images_again(const GroupNormImages& norm, float* scratch) {
    for (int64_t sample = 0; sample < norm.samples; ++sample) norm_sample(norm, sample, scratch);
}

// The gradient before ReLU. As torch's: where y is NaN it passes.
template <bool relu>
inline Vector gradient_before_relu(const GroupNormImagesBackward& norm, int64_t at, int64_t some) {
    const Vector gradient = load_some(norm.gradient + at, some);
    if (!relu) return gradient;
    return load_some(norm.y + at, some) <= splat(0.0F) ? splat(0.0F) : gradient;
}

// sums = of the gradient, products = of the gradient times (x - mean), over the pixels.
template <bool relu>
inline void sum_gradients(const GroupNormImagesBackward& norm, int64_t first, const float* means, float* sums,
                          float* products) {
    for_each_chunk(norm.channels, [&](int64_t c, int64_t some) {
        const Vector mean = load_some(means + c, some);
        Vector sum[2]{}, product[2]{};
        const auto add = [&](int64_t p, int i) {
            const int64_t at = first + p * norm.channels + c;
            const Vector gradient = gradient_before_relu<relu>(norm, at, some);
            sum[i] += gradient;
            product[i] += gradient * (load_some(norm.x + at, some) - mean);
        };
        int64_t p = 0;
        for (; p + 2 <= norm.pixels; p += 2) {
            add(p, 0);
            add(p + 1, 1);
        }
        if (p < norm.pixels) add(p, 0);
        store_some(sums + c, sum[0] + sum[1], some);
        store_some(products + c, product[0] + product[1], some);
    });
}

// With n = (x - mean) inverse, g the gradient and m numbers in a group: the gradient of x is
// inverse (g scale - sum(g scale) / m - n sum(g scale n) / m) = g factor + x slope + rest.
template <bool relu>
inline void norm_sample_backward(const GroupNormImagesBackward& norm, int64_t sample, float* scratch) {
    const int64_t channels = norm.channels, size = channels / norm.groups, first = sample * norm.pixels * channels;
    const double share = 1.0 / (static_cast<double>(size) * static_cast<double>(norm.pixels));
    const float *means = norm.statistics + 2 * norm.groups * sample, *inverses = means + norm.groups;
    float *sums = scratch, *products = scratch + channels;
    float *rests = scratch + 2 * channels, *slopes = scratch + 3 * channels;
    for (int64_t c = 0; c < channels; ++c) rests[c] = means[c / size];
    sum_gradients<relu>(norm, first, rests, sums, products);
    for (int64_t c = 0; c < channels; ++c) {
        norm.grad_scale[c] += products[c] * inverses[c / size];
        norm.grad_shift[c] += sums[c];
    }
    spread_group_sums(channels, norm.groups, sums, norm.scale, -share, rests);
    spread_group_sums(channels, norm.groups, products, norm.scale, -share, slopes);
    float* factors = sums;
    for (int64_t c = 0; c < channels; ++c) {
        const float inverse = inverses[c / size];
        factors[c] = inverse * norm.scale[c];
        slopes[c] *= inverse * inverse * inverse;
        rests[c] = rests[c] * inverse - means[c / size] * slopes[c];
    }
    for_each_chunk(channels, [&](int64_t c, int64_t some) {
        const Vector factor = load_some(factors + c, some);
        const Vector slope = load_some(slopes + c, some), rest = load_some(rests + c, some);
        for (int64_t p = 0; p < norm.pixels; ++p) {
            const int64_t at = first + p * channels + c;
            const Vector gradient = gradient_before_relu<relu>(norm, at, some);
            if (norm.grad_added != nullptr) store_some(norm.grad_added + at, gradient, some);
            store_some(norm.grad_x + at, gradient * factor + (load_some(norm.x + at, some) * slope + rest), some);
        }
    });
}

void group_norm_images_backward(const GroupNormImagesBackward& norm, float* scratch) {
    for (int64_t sample = 0; sample < norm.samples; ++sample) {
        if (norm.y != nullptr) {
            norm_sample_backward<true>(norm, sample, scratch);
        } else {
            norm_sample_backward<false>(norm, sample, scratch);
        }
    }
}
