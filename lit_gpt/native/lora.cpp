// LoRA's update of a linear layer's output, forward and backward, a few tokens at a time: what they need stays in the
// cache. Ranks are multiples of 8, and so are the sizes of x and of the parts of y.
#include <algorithm>
#include <omp.h>
#include <vector>

#include "vectors.h"

namespace {

const int TOKENS = 32;

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
    // f(part, first column, columns, row of B)
    template <class F> void each(F f) const {
        for (int p = 0, row = 0; p < count; row += stops[p] - starts[p], p++) f(p, starts[p], stops[p] - starts[p], row);
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

// A: (ranks, in); B: (r, rows of B), scaled; low: (rows, ranks), zero at first, becomes dropout(x) A^T
template <class T>
void lora(long rows, int in, const T *x, const float *A, const float *B, int B_rows, Dropout dropout, Parts parts, float *low,
          T *y, int out) {
    int ranks = parts.ranks();
    tiles(rows, [&](long first, int n, int) {
        static thread_local std::vector<float> X;
        X.resize(TOKENS * (in + 8));
        dropped(dropout, first, n, in, x, X.data());
        float *l = low + first * ranks;
        add_dots(n, ranks, in, X.data(), in + 8, A, in, l, ranks);
        parts.each([&](int p, int column, int columns, int row) {
            add_product(n, columns, parts.r, l + p * parts.r, ranks, 1, B + row, B_rows, y + first * out + column, out);
        });
    });
}

// A: (ranks, in); B: (r, rows of B), scaled; A_grad, B_grad: of their shapes for each thread, zero at first
template <class T>
void lora_backward(long rows, int in, const T *grad, const T *x, const float *A, const float *B, int B_rows, Dropout dropout,
                   Parts parts, const float *low, int out, T *x_grad, float *A_grad, float *B_grad) {
    int ranks = parts.ranks();
    tiles(rows, [&](long first, int n, int thread) {
        static thread_local std::vector<float> X, L;
        X.resize(TOKENS * (in + 8));
        L.assign(TOKENS * ranks, 0.0f);
        float *a_grad = A_grad + (long)thread * ranks * in, *b_grad = B_grad + (long)thread * parts.r * B_rows;
        parts.each([&](int p, int column, int columns, int row) {
            const T *g = grad + first * out + column;
            add_dots(n, parts.r, columns, g, out, B + row, B_rows, L.data() + p * parts.r, ranks);
            add_product(parts.r, columns, n, low + first * ranks + p * parts.r, 1, ranks, g, out, b_grad + row, B_rows);
        });
        dropped(dropout, first, n, in, x, X.data());
        add_product(ranks, in, n, L.data(), 1, ranks, X.data(), in + 8, a_grad, in);
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
    void lora_##suffix(long rows, int in, const T *x, const float *A, const float *B, int B_rows, uint64_t seed,             \
                       uint64_t threshold, int parts, int r, const int *starts, const int *stops, float *low, T *y, int out) { \
        lora(rows, in, x, A, B, B_rows, {seed, threshold}, {parts, r, starts, stops}, low, y, out);                      \
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
