// LoRA's update of a linear layer's output, forward and backward, a few tokens at a time: what they need stays in the
// cache. Ranks are multiples of 8, and so are the sizes of x and of the parts of y.
#include <algorithm>
#include <omp.h>
#include <vector>

#include "vectors.h"

namespace {

const int TOKENS = 32;
typedef std::vector<float> Buffer;

// Which elements of x stay: those whose 16 random bits are below `kept`, by the formula of lit_gpt/kernels/dropout.py.
// Of 32 neighbors the first 16 have the lower halves of 16 words, the others the upper ones.
struct Dropout {
    const uint64_t *keys;  // of the rows; null where all stay
    uint32_t kept;         // out of 2^16

    // f(first of up to LANES elements, how many, which stay) for a row
    template <class F> void each(long row, int size, F f) const {
        uint64_t key = keys ? keys[row] : 0;
        word_lanes counts{};
        for (int i = 0; i < LANES; i++) counts[i] = i;
        auto part = [&](int j, word_lanes bits) {
            if (j < size) f(j, std::min(LANES, size - j), bits < kept);
        };
        for (int j = 0; j < size; j += 32)
            for (int i = 0; i < 16; i += LANES) {
                word_lanes h = counts + (uint32_t)(j / 2 + i) + (uint32_t)key;
                h = (h ^ h >> 16) * 0x7feb352d;  // the rounds of Wellons' lowbias32
                h = (h ^ h >> 15 ^ (uint32_t)(key >> 32)) * 0x846ca68b;
                h ^= h >> 16;
                part(j + i, h & 0xffff), part(j + 16 + i, h >> 16);
            }
    }
};

// Rows of x from `first` on as floats, 8 numbers longer than `size`, with zero for what is dropped.
template <class T> void dropped(const Dropout &dropout, long first, int rows, int size, const T *x, float *to) {
    for (int i = 0; i < rows; i++) {
        const T *row = x + (first + i) * size;
        dropout.each(first + i, size, [&](int j, int n, auto stays) {
            store<LANES>(to + i * (size + 8) + j, stays ? take(row + j, n) : lanes{});
        });
    }
}

template <class T> void drop(long rows, int size, const T *x, const Dropout &dropout, T *to) {
#pragma omp parallel for
    for (long row = 0; row < rows; row++)
        dropout.each(row, size, [&](int j, int n, auto stays) {
            put(to + row * size + j, stays ? take(x + row * size + j, n) : lanes{}, n);
        });
}

struct Parts {
    int count, r;
    const int *starts, *stops;

    int ranks() const { return count * r; }
    // f(part, first column, columns, row of B)
    template <class F> void each(F f) const {
        for (int p = 0, row = 0; p < count; row += stops[p] - starts[p], p++)
            f(p, starts[p], stops[p] - starts[p], row);
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

Buffer scaled_transpose(const float *B, int rows, int r, float factor) {
    Buffer transposed((long)rows * r);
    for (int i = 0; i < rows; i++)
        for (int j = 0; j < r; j++) transposed[(long)j * rows + i] = B[(long)i * r + j] * factor;
    return transposed;
}

// A: (ranks, in); B: (rows of B, r); low: (rows, ranks), becomes dropout(x) A^T
template <class T>
void lora(long rows, int in, const T *x, const float *A, const float *B, int B_rows, float factor, Dropout dropout,
          Parts parts, float *low, T *y, int out) {
    int ranks = parts.ranks();
    Buffer across = scaled_transpose(B, B_rows, parts.r, factor);
    tiles(rows, [&](long first, int n, int) {
        static thread_local Buffer X;
        X.resize(TOKENS * (in + 8));
        dropped(dropout, first, n, in, x, X.data());
        float *l = low + first * ranks;
        std::fill(l, l + n * ranks, 0.0f);
        add_dots(n, ranks, in, X.data(), in + 8, A, in, l, ranks);
        parts.each([&](int p, int column, int columns, int row) {
            T *to = y + first * out + column;
            add_product(n, columns, parts.r, l + p * parts.r, ranks, 1, across.data() + row, B_rows, to, out);
        });
    });
}

// The gradients of the threads, in order, so that their sum is always the same.
template <class F> void gather(const std::vector<Buffer> &by_thread, long size, F to) {
#pragma omp parallel for
    for (long i = 0; i < size; i++) {
        float total = 0;
        for (auto &part : by_thread) total += part.empty() ? 0 : part[i];
        to(i, total);
    }
}

// A_grad and B_grad have the shapes of A and B; x_grad is the gradient through the update alone. A_grad is null where A
// does not train, and x is not there then; nor has x a place if there are no rows
template <class T>
void lora_backward(long rows, int in, const T *grad, const T *x, const float *A, const float *B, int B_rows,
                   float factor, Dropout dropout, Parts parts, const float *low, int out, T *x_grad, float *A_grad,
                   float *B_grad) {
    int ranks = parts.ranks(), r = parts.r;
    Buffer across = scaled_transpose(B, B_rows, r, factor);
    std::vector<Buffer> A_grads(omp_get_max_threads()), B_grads(omp_get_max_threads());
    tiles(rows, [&](long first, int n, int thread) {
        static thread_local Buffer X, L;
        X.resize(TOKENS * (in + 8));
        L.assign(TOKENS * ranks, 0.0f);
        Buffer &a_grad = A_grads[thread], &b_grad = B_grads[thread];
        b_grad.resize((long)r * B_rows);
        parts.each([&](int p, int column, int columns, int row) {
            const T *g = grad + first * out + column;
            add_dots(n, r, columns, g, out, across.data() + row, B_rows, L.data() + p * r, ranks);
            add_product(r, columns, n, low + first * ranks + p * r, 1, ranks, g, out, b_grad.data() + row, B_rows);
        });
        if (A_grad) {
            a_grad.resize((long)ranks * in);
            dropped(dropout, first, n, in, x, X.data());
            add_product(ranks, in, n, L.data(), 1, ranks, X.data(), in + 8, a_grad.data(), in);
        }
        std::fill(X.begin(), X.end(), 0.0f);
        add_product(n, in, ranks, L.data(), ranks, 1, A, in, X.data(), in + 8);
        for (int i = 0; i < n; i++) {
            T *row = x_grad + (first + i) * in;
            dropout.each(first + i, in, [&](int j, int m, auto stays) {
                put(row + j, stays ? load<LANES>(&X[i * (in + 8) + j]) : lanes{}, m);
            });
        }
    });
    if (A_grad) gather(A_grads, (long)ranks * in, [&](long i, float total) { A_grad[i] = total; });
    gather(B_grads, (long)r * B_rows,
           [&](long i, float total) { B_grad[i % B_rows * r + i / B_rows] = total * factor; });
}

}  // namespace

#define BOTH(T, suffix)                                                                                            \
    void drop_##suffix(long rows, int size, const T *x, const uint64_t *keys, uint32_t kept, T *to) {              \
        drop(rows, size, x, {keys, kept}, to);                                                                     \
    }                                                                                                              \
    void lora_##suffix(long rows, int in, const T *x, const float *A, const float *B, int B_rows, float factor,    \
                       const uint64_t *keys, uint32_t kept, int parts, int r, const int *starts, const int *stops, \
                       float *low, T *y, int out) {                                                                \
        lora(rows, in, x, A, B, B_rows, factor, {keys, kept}, {parts, r, starts, stops}, low, y, out);             \
    }                                                                                                              \
    void lora_backward_##suffix(long rows, int in, const T *grad, const T *x, const float *A, const float *B,      \
                                int B_rows, float factor, const uint64_t *keys, uint32_t kept, int parts, int r,   \
                                const int *starts, const int *stops, const float *low, int out, T *x_grad,         \
                                float *A_grad, float *B_grad) {                                                    \
        lora_backward(rows, in, grad, x, A, B, B_rows, factor, {keys, kept}, {parts, r, starts, stops}, low, out,  \
                      x_grad, A_grad, B_grad);                                                                     \
    }

extern "C" {
BOTH(bf16, bf16)
BOTH(float, f32)
}
