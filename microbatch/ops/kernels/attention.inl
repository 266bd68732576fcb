// Attention of one head: softmax(scale Q K^T, the keys of the query) V, a block of queries at a time, and its gradient with the probabilities computed again from their logarithms' sum (Dao et al. 2022, arXiv:2205.14135,
// algorithms 2 and 4, without rescaling: a block's scores are whole rows).
//
// Whatever is read in a product's inner loop is copied first, without gaps: rows of the model's width lie a power of
// two apart, and would push each other out of the cache.

constexpr int64_t backward_queries = 16 * tile_rows;
constexpr int64_t backward_keys = 256;

inline int64_t least(int64_t left, int64_t right) {
    return left < right ? left : right;
}

inline int64_t most(int64_t left, int64_t right) {
    return left > right ? left : right;
}

// A query attends to the first so many keys.
inline int64_t keys_of(const AttentionHead& head, int64_t query) {
    return head.causal ? least(head.keys, query + 1) : head.keys;
}

// Rows of scores: room for a last vector, and not a power of two apart.
inline int64_t score_row(int64_t keys) {
    return round_up(keys, tile_columns) + lanes;
}

struct Sizes {
    int64_t tokens, size;  // of the head

    int64_t padded() const { return round_up(size, lanes); }
    int64_t rows() const { return tokens * padded(); }
    int64_t panels() const { return round_up(tokens, tile_columns) * size; }
};

void copy_rows(const float* from, int64_t row, const Sizes& sizes, float* to) {
    for (int64_t i = 0; i < sizes.tokens; ++i) {
        for (int64_t k = 0; k < sizes.size; ++k) to[i * sizes.padded() + k] = from[i * row + k];
        for (int64_t k = sizes.size; k < sizes.padded(); ++k) to[i * sizes.padded() + k] = 0;
    }
}

// Transposed: panels of tile_columns tokens, in each the numbers of these tokens, one component after the other.
void copy_panels(const float* from, int64_t row, const Sizes& sizes, float* to) {
    for (int64_t begin = 0; begin < sizes.tokens; begin += tile_columns, to += tile_columns * sizes.size) {
        const int64_t count = least(tile_columns, sizes.tokens - begin);
        for (int64_t j = 0; j < count; ++j) {
            for (int64_t k = 0; k < sizes.size; ++k) to[k * tile_columns + j] = from[(begin + j) * row + k];
        }
        for (int64_t j = count; j < tile_columns; ++j) {
            for (int64_t k = 0; k < sizes.size; ++k) to[k * tile_columns + j] = 0;
        }
    }
}

// scores(i, j) = left(i) . right(j) for `rows` rows and the keys from `first`, a multiple of tile_columns, to `end`.
void score_tile(int rows, const Left& left, const float* panels, const Sizes& sizes, int64_t first, int64_t end,
                Rows scores) {
    for (int64_t j = first; j < end; j += tile_columns) {
        const int vectors = static_cast<int>(round_up(least(tile_columns, end - j), lanes) / lanes);
        tile(rows, vectors, left, panels + j * sizes.size, tile_columns, {scores.values + (j - first), scores.row},
             sizes.size, false);
    }
}

// C of `rows` rows and the head's size.
void sum_rows(int rows, const Left& left, const float* right, const Sizes& sizes, Rows c, int64_t depth, bool add) {
    for (int64_t k = 0; k < sizes.padded(); k += tile_columns) {
        const int vectors = static_cast<int>(least(tile_columns, sizes.padded() - k) / lanes);
        tile(rows, vectors, left, right + k, sizes.padded(), {c.values + k, c.row}, depth, add);
    }
}

inline void clear(float* row, int64_t begin, int64_t end) {
    for (int64_t j = begin; j < end; ++j) row[j] = 0;
}

inline float largest_of(const float* values, int64_t count) {
    Vector largest = load(values);
    for (int64_t j = lanes; j < count; j += lanes) {
        const Vector next = load(values + j);
        largest = next > largest ? next : largest;
    }
    float result = largest[0];
    for (int i = 1; i < lanes; ++i) result = largest[i] > result ? largest[i] : result;
    return result;
}

// Scores become e^(scale (score - largest)); returns their sum. Infinity and NaN end as NaN.
inline float exponentials(float* scores, int64_t count, float scale, float* log_sum) {
    const int64_t whole = round_up(count, lanes);
    for (int64_t j = count; j < whole; ++j) scores[j] = -INFINITY;
    const float largest = largest_of(scores, whole);
    Vector sums{};
    for (int64_t j = 0; j < whole; j += lanes) {
        // Beyond the row's end nothing is left of e^(-infinity), which is not quite 0 here.
        const Vector differences = (load(scores + j) - largest) * scale;
        const Vector values = differences < splat(-87.0F) ? Vector{} : exp(differences);
        store(scores + j, values);
        sums += values;
    }
    const float sum = sum_of(sums);
    *log_sum = scale * largest + logf(sum);
    return sum;
}

int64_t attention_forward_scratch(int64_t tokens, int64_t size) {
    const Sizes sizes{tokens, size};
    return sizes.rows() + sizes.panels() + tile_rows * (score_row(tokens) + sizes.padded());
}

void attention_forward(const AttentionHead& head, float* scratch) {
    const Sizes sizes{head.tokens, head.size};
    float* values = scratch;
    float* keys = values + sizes.rows();
    float* scores = keys + sizes.panels();
    float* mixed = scores + tile_rows * score_row(head.tokens);
    copy_rows(head.v, head.kv_row, sizes, values);
    copy_panels(head.k, head.kv_row, sizes, keys);
    const int64_t row = score_row(head.tokens);
    for (int64_t i = 0; i < head.tokens; i += tile_rows) {
        const int rows = static_cast<int>(least(tile_rows, head.tokens - i));
        const int64_t end = keys_of(head, i + rows - 1);
        score_tile(rows, {head.q + i * head.row, head.row, 1}, keys, sizes, 0, end, {scores, row});
        float sums[tile_rows];
        for (int r = 0; r < rows; ++r) {
            const int64_t own = keys_of(head, i + r);
            sums[r] = exponentials(scores + r * row, own, head.scale, head.log_sums + i + r);
            clear(scores + r * row, own, end);
        }
        sum_rows(rows, {scores, row, 1}, values, sizes, {mixed, sizes.padded()}, end, false);
        for (int r = 0; r < rows; ++r) {
            for (int64_t k = 0; k < head.size; ++k) {
                head.out[(i + r) * head.out_row + k] = mixed[r * sizes.padded() + k] / sums[r];
            }
        }
    }
}

int64_t attention_backward_scratch(int64_t tokens, int64_t size) {
    const Sizes sizes{tokens, size};
    const int64_t scores = backward_queries * score_row(least(tokens, backward_keys));
    return 6 * sizes.rows() + 2 * sizes.panels() + 2 * scores + tokens;
}

// What backward works on: copies of the inputs, and the sums of the gradients.
struct Backward {
    const AttentionHead& head;
    Sizes sizes;
    int64_t row;  // of the scores
    float *queries, *keys, *gradients, *key_panels, *value_panels;
    float *grad_queries, *grad_keys, *grad_values;
    float* dots;  // of each token's output and its gradient
    float *probabilities, *grad_scores;

    Backward(const AttentionHead& one, float* scratch)
        : head(one), sizes{one.tokens, one.size}, row(score_row(least(one.tokens, backward_keys))) {
        float* next = scratch;
        const auto take = [&](int64_t count) {
            float* taken = next;
            next += count;
            return taken;
        };
        queries = take(sizes.rows());
        keys = take(sizes.rows());
        gradients = take(sizes.rows());
        grad_queries = take(3 * sizes.rows());
        grad_keys = grad_queries + sizes.rows();
        grad_values = grad_keys + sizes.rows();
        key_panels = take(sizes.panels());
        value_panels = take(sizes.panels());
        probabilities = take(backward_queries * row);
        grad_scores = take(backward_queries * row);
        dots = take(one.tokens);
    }
};

void copy_inputs(const Backward& work) {
    const AttentionHead& head = work.head;
    copy_rows(head.q, head.row, work.sizes, work.queries);
    copy_rows(head.k, head.kv_row, work.sizes, work.keys);
    copy_rows(head.gradient, head.out_row, work.sizes, work.gradients);
    copy_panels(head.k, head.kv_row, work.sizes, work.key_panels);
    copy_panels(head.v, head.kv_row, work.sizes, work.value_panels);
    clear(work.grad_queries, 0, 3 * work.sizes.rows());
    for (int64_t i = 0; i < head.tokens; ++i) {
        float dot = 0;
        for (int64_t k = 0; k < head.size; ++k)
            dot += head.out[i * head.out_row + k] * head.gradient[i * head.out_row + k];
        work.dots[i] = dot;
    }
}

// A row of scores and one of the probabilities' gradients become the probabilities and the scores' gradients.
inline void differentiate_row(float* scores, float* gradients, int64_t count, float scale, float log_sum, float dot) {
    for (int64_t j = 0; j < count; j += lanes) {
        const Vector exponents = at_most(scale * load(scores + j) - log_sum, 88.0F);
        const Vector p = exponents < splat(-87.0F) ? Vector{} : exp(exponents);
        store(scores + j, p);
        store(gradients + j, scale * p * (load(gradients + j) - dot));
    }
}

// The queries from i to `queries_end` and the keys from `first` to `end`: probabilities, the scores' gradients, and
// with them the queries' gradients.
void score_block(const Backward& work, int64_t i, int64_t queries_end, int64_t first, int64_t end) {
    const int64_t row = work.row, width = work.sizes.padded();
    for (int64_t block = i; i < queries_end; i += tile_rows) {
        const int rows = static_cast<int>(least(tile_rows, queries_end - i));
        const int64_t keys_end = least(end, keys_of(work.head, i + rows - 1));
        const int64_t count = keys_end - first;
        float* p = work.probabilities + (i - block) * row;
        float* ds = work.grad_scores + (i - block) * row;
        score_tile(rows, {work.queries + i * width, width, 1}, work.key_panels, work.sizes, first, keys_end, {p, row});
        score_tile(rows, {work.gradients + i * width, width, 1}, work.value_panels, work.sizes, first, keys_end,
                   {ds, row});
        for (int r = 0; r < rows; ++r) {
            const int64_t own = least(count, keys_of(work.head, i + r) - first);
            differentiate_row(p + r * row, ds + r * row, own, work.head.scale, work.head.log_sums[i + r],
                              work.dots[i + r]);
            // The tiles beside the diagonal reach a few keys beyond it.
            const int64_t reach = least(row, round_up(count, lanes) + tile_rows);
            clear(p + r * row, own, reach);
            clear(ds + r * row, own, reach);
        }
        sum_rows(rows, {ds, row, 1}, work.keys + first * width, work.sizes, {work.grad_queries + i * width, width},
                 count, true);
    }
}

// What these queries add to the gradients of these keys and values; a causal query has none for later keys.
void add_to_keys(const Backward& work, int64_t block, int64_t queries_end, int64_t first, int64_t end) {
    const int64_t row = work.row, width = work.sizes.padded();
    for (int64_t j = first; j < end; j += tile_rows) {
        const int rows = static_cast<int>(least(tile_rows, end - j));
        const int64_t from = work.head.causal ? most(block, j) : block;
        if (from >= queries_end) break;
        const int64_t depth = queries_end - from;
        const int64_t offset = (from - block) * row + (j - first);
        sum_rows(rows, {work.grad_scores + offset, 1, row}, work.queries + from * width, work.sizes,
                 {work.grad_keys + j * width, width}, depth, true);
        sum_rows(rows, {work.probabilities + offset, 1, row}, work.gradients + from * width, work.sizes,
                 {work.grad_values + j * width, width}, depth, true);
    }
}

void copy_back(const float* from, const Sizes& sizes, float* to, int64_t row) {
    for (int64_t i = 0; i < sizes.tokens; ++i) {
        for (int64_t k = 0; k < sizes.size; ++k) to[i * row + k] = from[i * sizes.padded() + k];
    }
}

void add_back(const float* from, const Sizes& sizes, float* to, int64_t row) {
    for (int64_t i = 0; i < sizes.tokens; ++i) {
        for (int64_t k = 0; k < sizes.size; ++k) to[i * row + k] += from[i * sizes.padded() + k];
    }
}

void attention_backward(const AttentionHead& head, float* scratch) {
    const Backward work(head, scratch);
    copy_inputs(work);
    for (int64_t first = 0; first < head.keys; first += backward_keys) {
        const int64_t end = least(head.keys, first + backward_keys);
        for (int64_t i = head.causal ? first : 0; i < head.tokens; i += backward_queries) {
            const int64_t queries_end = least(head.tokens, i + backward_queries);
            score_block(work, i, queries_end, first, end);
            add_to_keys(work, i, queries_end, first, end);
        }
    }
    copy_back(work.grad_queries, work.sizes, head.grad_q, head.row);
    const auto put = head.add_to_keys ? add_back : copy_back;
    put(work.grad_keys, work.sizes, head.grad_k, head.kv_row);
    put(work.grad_values, work.sizes, head.grad_v, head.kv_row);
}
