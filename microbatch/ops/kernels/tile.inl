// Products of small matrices that stay in the cache: C = A B, or C += A B, a tile of C in registers at a time.

constexpr int tile_rows = 6;
#if MICROBATCH_LANES == 16
constexpr int tile_vectors = 4;  // 24 of 32 registers hold the tile
#else
constexpr int tile_vectors = 2;  // 12 of 16
#endif
constexpr int64_t tile_columns = tile_vectors * lanes;

// A(i, k) = values[i * row + k * column]: any layout, transposed ones too.
struct Left {
    const float* values;
    int64_t row;
    int64_t column;

    Left from(int64_t i, int64_t k) const { return {values + i * row + k * column, row, column}; }
};

// Rows of whole vectors.
struct Rows {
    float* values;
    int64_t row;
};

template <int rows, int vectors>
inline void tile_product(const Left& a, const float* b, int64_t b_row, Rows c, int64_t depth, bool add) {
    Vector sums[rows][vectors] = {};
    for (int64_t k = 0; k < depth; ++k) {
        Vector right[vectors];
        for (int v = 0; v < vectors; ++v) right[v] = load(b + k * b_row + v * lanes);
        for (int i = 0; i < rows; ++i) {
            const Vector left = splat(a.values[i * a.row + k * a.column]);
            for (int v = 0; v < vectors; ++v) sums[i][v] += left * right[v];
        }
    }
    // In a loop that is not unrolled the sums would be an array in memory, from the beginning.
#pragma GCC unroll 8
    for (int i = 0; i < rows; ++i) {
#pragma GCC unroll 8
        for (int v = 0; v < vectors; ++v) {
            float* to = c.values + i * c.row + v * lanes;
            store(to, add ? load(to) + sums[i][v] : sums[i][v]);
        }
    }
}

template <int rows>
inline void tile_of(int vectors, const Left& a, const float* b, int64_t b_row, Rows c, int64_t depth, bool add) {
    switch (vectors) {
        case 1:
            return tile_product<rows, 1>(a, b, b_row, c, depth, add);
        case 2:
            return tile_product<rows, 2>(a, b, b_row, c, depth, add);
#if MICROBATCH_LANES == 16
        case 3:
            return tile_product<rows, 3>(a, b, b_row, c, depth, add);
        default:
            return tile_product<rows, 4>(a, b, b_row, c, depth, add);
#else
        default:
            return;
#endif
    }
}

// At most tile_rows rows and tile_vectors vectors.
void tile(int rows, int vectors, const Left& a, const float* b, int64_t b_row, Rows c, int64_t depth, bool add) {
    switch (rows) {
        case 1:
            return tile_of<1>(vectors, a, b, b_row, c, depth, add);
        case 2:
            return tile_of<2>(vectors, a, b, b_row, c, depth, add);
        case 3:
            return tile_of<3>(vectors, a, b, b_row, c, depth, add);
        case 4:
            return tile_of<4>(vectors, a, b, b_row, c, depth, add);
        case 5:
            return tile_of<5>(vectors, a, b, b_row, c, depth, add);
        default:
            return tile_of<6>(vectors, a, b, b_row, c, depth, add);
    }
}
