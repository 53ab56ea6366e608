// Vectors of floats, what they are loaded from and stored to, and a product of small matrices.
// The vectors are GCC's and Clang's extension: on a processor with narrower ones, each becomes several.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

struct bf16 {
    uint16_t bits;
};

template <int N> struct Vectors {
    typedef float floats __attribute__((vector_size(4 * N)));
    typedef uint32_t words __attribute__((vector_size(4 * N)));
    typedef uint16_t halves __attribute__((vector_size(2 * N)));
};
typedef Vectors<16>::floats v16;
typedef Vectors<16>::words v16u;  // 16 words of 32 bits

// As many numbers as are computed with at once, and rows of two such vectors that a product sums up in registers. GCC
// takes vectors apart that are wider, conversions one by one, and sums that find no register cost a product its speed.
#if defined __AVX2__ && !defined __AVX512F__ || defined __ARM_NEON
constexpr int LANES = 8, TILE_ROWS = 4;
#else
constexpr int LANES = 16, TILE_ROWS = 8;
#endif
typedef Vectors<LANES>::floats lanes;
typedef Vectors<LANES>::words word_lanes;  // of 32 bits

template <int N> inline typename Vectors<N>::floats load(const float *p) {
    typename Vectors<N>::floats x;
    memcpy(&x, p, sizeof x);
    return x;
}

template <int N> inline typename Vectors<N>::floats load(const bf16 *p) {
    typename Vectors<N>::halves half;
    memcpy(&half, p, sizeof half);
    return (typename Vectors<N>::floats)(__builtin_convertvector(half, typename Vectors<N>::words) << 16);
}

template <int N> inline void store(float *p, typename Vectors<N>::floats x) { memcpy(p, &x, sizeof x); }

// to the nearest, ties to even
template <int N> inline void store(bf16 *p, typename Vectors<N>::floats x) {
    typedef typename Vectors<N>::words words;
    words bits = (words)x;
    bits = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    typename Vectors<N>::halves half = __builtin_convertvector(bits, typename Vectors<N>::halves);
    memcpy(p, &half, sizeof half);
}

inline float to_float(float x) { return x; }
inline float to_float(bf16 x) {
    uint32_t bits = (uint32_t)x.bits << 16;
    float value;
    memcpy(&value, &bits, 4);
    return value;
}
inline void from_float(float *p, float x) { *p = x; }
inline void from_float(bf16 *p, float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    p->bits = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}
template <class T> inline lanes rounded(lanes x) {
    T kept[LANES];
    store<LANES>(kept, x);
    return load<LANES>(kept);
}

// up to LANES numbers, the others zero
template <class T> inline lanes take(const T *p, int count) {
    if (count == LANES) return load<LANES>(p);
    lanes x{};
    for (int i = 0; i < count; i++) x[i] = to_float(p[i]);
    return x;
}

template <class T> inline void put(T *p, lanes x, int count) {
    if (count == LANES) return store<LANES>(p, x);
    for (int i = 0; i < count; i++) from_float(p + i, x[i]);
}

template <int N> inline float sum(typename Vectors<N>::floats x) {
    if constexpr (N == 4)
        return (x[0] + x[2]) + (x[1] + x[3]);
    else {
        typename Vectors<N / 2>::floats halves[2];
        memcpy(halves, &x, sizeof x);
        return sum<N / 2>(halves[0] + halves[1]);
    }
}

inline float sum(lanes x) { return sum<LANES>(x); }

#if __GNUC__ >= 12 && !defined(__clang__)
#define IN_THIS_ORDER(x) __builtin_assoc_barrier(x)
#else
#define IN_THIS_ORDER(x) (x)
#endif

// 2^n e^t, where n is whole and t small, so that a polynomial gives e^t; 0 below the normal numbers. ln 2 is taken off
// x in two parts (Cody & Waite 1980), for a rounded multiple of it would be off by more than the result may be.
inline lanes exponential(lanes x) {
    lanes power = x * 1.442695041f;
    power = power < -126.0f ? lanes{} - 126.5f : power;
    power = power > 127.0f ? lanes{} + 127.0f : power;
    typedef int32_t integers __attribute__((vector_size(4 * LANES)));
    integers whole = __builtin_convertvector(power + (power < 0.0f ? lanes{} - 0.5f : lanes{} + 0.5f), integers);
    lanes n = __builtin_convertvector(whole, lanes), t = IN_THIS_ORDER(x - n * 0.693359375f) + n * 2.12194440e-4f;
    lanes series =
        1.0f +
        t * (1.0f + t * (0.5f + t * (1.66666667e-1f + t * (4.16666667e-2f + t * (8.3333333e-3f + t * 1.3888889e-3f)))));
    lanes scale = (lanes)((whole + 127) << 23);
    return x < -87.3f ? lanes{} : x > 88.0f ? lanes{} + 1.7014118e38f : series * scale;
}

// A part of C, ROWS x (VECTORS * N): C += A B. A's elements are `a_row` and `a_column` apart, so that it may be
// transposed.
template <int N, int ROWS, int VECTORS, class TB, class TC>
inline void product_tile(int depth, const float *A, long a_row, long a_column, const TB *B, long b_row, TC *C,
                         long c_row) {
    typename Vectors<N>::floats sums[ROWS][VECTORS];
    for (int i = 0; i < ROWS; i++)
        for (int j = 0; j < VECTORS; j++) sums[i][j] = load<N>(C + i * c_row + j * N);
    for (int k = 0; k < depth; k++) {
        typename Vectors<N>::floats b[VECTORS];
        for (int j = 0; j < VECTORS; j++) b[j] = load<N>(B + k * b_row + j * N);
        for (int i = 0; i < ROWS; i++)
            for (int j = 0; j < VECTORS; j++) sums[i][j] += A[i * a_row + k * a_column] * b[j];
    }
    for (int i = 0; i < ROWS; i++)
        for (int j = 0; j < VECTORS; j++) store<N>(C + i * c_row + j * N, sums[i][j]);
}

template <int N, int VECTORS, class TB, class TC>
inline void product_strip(int rows, int depth, const float *A, long a_row, long a_column, const TB *B, long b_row,
                          TC *C, long c_row) {
    int i = 0;
    for (; i + TILE_ROWS <= rows; i += TILE_ROWS)
        product_tile<N, TILE_ROWS, VECTORS>(depth, A + i * a_row, a_row, a_column, B, b_row, C + i * c_row, c_row);
    for (; i + 4 <= rows; i += 4)
        product_tile<N, 4, VECTORS>(depth, A + i * a_row, a_row, a_column, B, b_row, C + i * c_row, c_row);
    for (; i < rows; i++)
        product_tile<N, 1, VECTORS>(depth, A + i * a_row, a_row, a_column, B, b_row, C + i * c_row, c_row);
}

// C (rows, columns) += A (rows, depth) B (depth, columns); columns a multiple of 8.
template <class TB, class TC>
inline void add_product(int rows, int columns, int depth, const float *A, long a_row, long a_column, const TB *B,
                        long b_row, TC *C, long c_row) {
    int j = 0;
    for (; j + 2 * LANES <= columns; j += 2 * LANES)
        product_strip<LANES, 2>(rows, depth, A, a_row, a_column, B + j, b_row, C + j, c_row);
    for (; j + LANES <= columns; j += LANES)
        product_strip<LANES, 1>(rows, depth, A, a_row, a_column, B + j, b_row, C + j, c_row);
    for (; j < columns; j += 8) product_strip<8, 1>(rows, depth, A, a_row, a_column, B + j, b_row, C + j, c_row);
}

template <int N, int ROWS, class TA>
inline void dots_tile(int depth, const TA *A, long a_row, const float *B, long b_row, float *C, long c_row) {
    typename Vectors<N>::floats sums[ROWS][8] = {};
    for (int k = 0; k < depth; k += N) {
        typename Vectors<N>::floats a[ROWS];
        for (int i = 0; i < ROWS; i++) a[i] = load<N>(A + i * a_row + k);
        for (int j = 0; j < 8; j++) {
            typename Vectors<N>::floats b = load<N>(B + j * b_row + k);
            for (int i = 0; i < ROWS; i++) sums[i][j] += a[i] * b;
        }
    }
    for (int i = 0; i < ROWS; i++)
        for (int j = 0; j < 8; j++) C[i * c_row + j] += sum<N>(sums[i][j]);
}

// C (rows, columns) += A (rows, depth) B (columns, depth)^T, for few columns; they and the depth are multiples of 8.
template <class TA>
inline void add_dots(int rows, int columns, int depth, const TA *A, long a_row, const float *B, long b_row, float *C,
                     long c_row) {
    constexpr int ROWS = TILE_ROWS / 4;
    int whole = depth / LANES * LANES;
    for (int j = 0; j < columns; j += 8) {
        const float *b = B + j * b_row;
        int i = 0;
        for (; i + ROWS <= rows; i += ROWS)
            dots_tile<LANES, ROWS>(whole, A + i * a_row, a_row, b, b_row, C + i * c_row + j, c_row);
        for (; i < rows; i++) dots_tile<LANES, 1>(whole, A + i * a_row, a_row, b, b_row, C + i * c_row + j, c_row);
        if (whole < depth)
            for (i = 0; i < rows; i++)
                dots_tile<8, 1>(8, A + i * a_row + whole, a_row, b + whole, b_row, C + i * c_row + j, c_row);
    }
}
