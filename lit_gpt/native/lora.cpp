// LoRA's update of a linear layer's output, forward and backward, a few tokens at a time: what they need stays in the
// cache. Ranks are multiples of 8, and so are the sizes of x and of the parts of y.
#include <algorithm>
#include <omp.h>
#include <vector>

#include "vectors.h"

namespace {

const int TOKENS = 32, STRIP = 256;

// Which elements of x stay: those whose number in it, hashed with the seed, falls below the threshold.
struct Dropout {
    uint64_t seed;
    uint64_t threshold;  // of 2^32

    v16 apply(v16 x, uint32_t number) const {
        if (threshold >> 32) return x;
        u16 h = u16{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15} + number + (uint32_t)seed;
        h = (h ^ h >> 16) * 0x7feb352d;  // the rounds of Wellons' lowbias32
        h = (h ^ h >> 15 ^ (uint32_t)(seed >> 32)) * 0x846ca68b;
        h ^= h >> 16;
        return h < (uint32_t)threshold ? x : v16{};
    }
};

template <class T> void convert(int rows, int columns, const T *from, long from_row, float *to, long to_row) {
    for (int i = 0; i < rows; i++)
        for (int j = 0; j < columns; j += 8) store<8>(to + i * to_row + j, load<8>(from + i * from_row + j));
}

template <class T> void convert_back(int rows, int columns, const float *from, long from_row, T *to, long to_row) {
    for (int i = 0; i < rows; i++)
        for (int j = 0; j < columns; j += 8) store<8>(to + i * to_row + j, load<8>(from + i * from_row + j));
}

// Rows of x from `first` on as floats, some dropped. They are 8 numbers longer than `size`, so that 16 can be handled.
template <class T> void dropped(const Dropout &dropout, long first, int rows, int size, const T *x, float *to) {
    for (int i = 0; i < rows; i++)
        for (int j = 0; j < size; j += 16) {
            long number = (first + i) * size + j;
            v16 all = j + 16 <= size ? load<16>(x + number) : v16{};
            if (j + 16 > size)
                for (int n = 0; n < size - j; n++) all[n] = to_float(x[number + n]);
            store<16>(to + i * (size + 8) + j, dropout.apply(all, number));
        }
}

struct Parts {
    int count, r;
    const int *starts, *stops;

    int ranks() const { return count * r; }
    // f(part, first column, columns, row of B) for strips of columns
    template <class F> void each(F f) const {
        for (int p = 0, row = 0; p < count; row += stops[p] - starts[p], p++)
            for (int c = starts[p]; c < stops[p]; c += STRIP) f(p, c, std::min(STRIP, stops[p] - c), row + c - starts[p]);
    }
};

// f(tile's first row, rows, thread), each thread having its share of the tiles
template <class F> void tiles(long rows, F f) {
    long count = (rows + TOKENS - 1) / TOKENS;
#pragma omp parallel
    {
        int n = omp_get_num_threads(), thread = omp_get_thread_num();
        for (long i = count * thread / n; i < count * (thread + 1) / n; i++)
            f(i * TOKENS, (int)std::min<long>(TOKENS, rows - i * TOKENS), thread);
    }
}

// A_t: (in, ranks); B_t: (r, rows of B), scaled; low: (rows, ranks), becomes dropout(x) A^T
template <class T>
void lora(long rows, int in, const T *x, const float *A_t, const float *B_t, int B_rows, Dropout dropout, Parts parts, float *low,
          T *y, int out) {
    int ranks = parts.ranks();
    tiles(rows, [&](long first, int n, int) {
        static thread_local std::vector<float> X, S(TOKENS * STRIP);
        X.resize(TOKENS * (in + 8));
        dropped(dropout, first, n, in, x, X.data());
        float *l = low + first * ranks;
        std::fill(l, l + n * ranks, 0.0f);
        add_product(n, ranks, in, X.data(), in + 8, 1, A_t, ranks, l, ranks);
        parts.each([&](int p, int column, int columns, int row) {
            T *to = y + first * out + column;
            convert(n, columns, to, out, S.data(), STRIP);
            add_product(n, columns, parts.r, l + p * parts.r, ranks, 1, B_t + row, B_rows, S.data(), STRIP);
            convert_back(n, columns, S.data(), STRIP, to, out);
        });
    });
}

// A: (ranks, in); B: (rows of B, r), scaled; A_grad, B_grad: of their shapes for each thread, zero at first
template <class T>
void lora_backward(long rows, int in, const T *grad, const T *x, const float *A, const float *B, int B_rows, Dropout dropout,
                   Parts parts, const float *low, int out, T *x_grad, float *A_grad, float *B_grad) {
    int ranks = parts.ranks();
    tiles(rows, [&](long first, int n, int thread) {
        static thread_local std::vector<float> X, L, S(TOKENS * STRIP);
        X.resize(TOKENS * (in + 8));
        L.assign(TOKENS * ranks, 0.0f);
        float *a_grad = A_grad + (long)thread * ranks * in, *b_grad = B_grad + (long)thread * B_rows * parts.r;
        parts.each([&](int p, int column, int columns, int row) {
            convert(n, columns, grad + first * out + column, out, S.data(), STRIP);
            add_product(n, parts.r, columns, S.data(), STRIP, 1, B + row * parts.r, parts.r, L.data() + p * parts.r, ranks);
            const float *l = low + first * ranks + p * parts.r;
            add_product(columns, parts.r, n, S.data(), 1, STRIP, l, ranks, b_grad + row * parts.r, parts.r);
        });
        dropped(dropout, first, n, in, x, X.data());
        add_product(ranks, in, n, L.data(), 1, ranks, X.data(), in + 8, a_grad, in);
        if (!x_grad) return;
        std::fill(X.begin(), X.end(), 0.0f);
        add_product(n, in, ranks, L.data(), ranks, 1, A, in, X.data(), in + 8);
        for (int i = 0; i < n; i++)
            for (int j = 0; j < in; j += 16) {
                long number = (first + i) * in + j;
                v16 kept = dropout.apply(load<16>(&X[i * (in + 8) + j]), number);
                if (j + 16 <= in) store<16>(x_grad + number, kept);
                else for (int m = 0; m < in - j; m++) from_float(x_grad + number + m, kept[m]);
            }
    });
}

}  // namespace

#define BOTH(T, suffix)                                                                                                      \
    void lora_##suffix(long rows, int in, const T *x, const float *A_t, const float *B_t, int B_rows, uint64_t seed,         \
                       uint64_t threshold, int parts, int r, const int *starts, const int *stops, float *low, T *y, int out) { \
        lora(rows, in, x, A_t, B_t, B_rows, {seed, threshold}, {parts, r, starts, stops}, low, y, out);                      \
    }                                                                                                                        \
    void lora_backward_##suffix(long rows, int in, const T *grad, const T *x, const float *A, const float *B, int B_rows,    \
                                uint64_t seed, uint64_t threshold, int parts, int r, const int *starts, const int *stops,    \
                                const float *low, int out, T *x_grad, float *A_grad, float *B_grad) {                        \
        lora_backward(rows, in, grad, x, A, B, B_rows, {seed, threshold}, {parts, r, starts, stops}, low, out, x_grad,       \
                      A_grad, B_grad);                                                                                       \
    }

extern "C" {
BOTH(bf16, bf16)
BOTH(float, f32)
}
