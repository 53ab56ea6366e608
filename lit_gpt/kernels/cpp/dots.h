// Products of a few rows of numbers with those of a weight in floating point.
#pragma once
#ifdef __AVX2__
#include <immintrin.h>
#elif defined __ARM_NEON
#include <arm_neon.h>
#endif

#include <type_traits>
#include <vector>

#include "vectors.h"

inline float to_float(int8_t x) { return x; }

// p[i] will be read; it may lie beyond what is there
template <class T> inline void prefetch(const T *p, long i) {
    __builtin_prefetch((const void *)((uintptr_t)p + i * sizeof(T)), 0, 2);
}

constexpr long AHEAD = 4096;  // bytes: what the processor reads ahead of one stream by itself ends with its page

// One row at a time, as a plain loop: the processor reads ahead of one stream better than of several. Written by
// hand for int8 it takes two thirds of the time from a cache, and a quarter more from memory.
template <class T> inline float dot(const T *w, const float *x, long n) {
    float total = 0;
    for (long k = 0; k < n; k += 64 / sizeof(T)) prefetch(w, k + AHEAD / sizeof(T));
    for (long k = 0; k < n; k++) total += to_float(w[k]) * x[k];
    return total;
}

// Multiplies R rows of a weight with B of x at once, of which each number is loaded once: y[b * y_row + r]. What the
// rows after them hold is asked for early, for the processor does not read ahead of so many streams by itself.
template <int R, int B, class T>
inline void dots(const T *w, long columns, const float *x, float *y, long y_row) {
    lanes sums[R][B] = {};
    long k = 0;
    for (; k + LANES <= columns; k += LANES) {
        lanes a[R];
        for (int r = 0; r < R; r++) {
            a[r] = load<LANES>(w + r * columns + k);
            if (k % (64 / sizeof(T)) == 0) prefetch(w, (r + R) * columns + k);
        }
        for (int b = 0; b < B; b++) {
            lanes c = load<LANES>(x + b * columns + k);
            for (int r = 0; r < R; r++) sums[r][b] += a[r] * c;
        }
    }
    for (int r = 0; r < R; r++)
        for (int b = 0; b < B; b++)
            y[b * y_row + r] = sum<LANES>(sums[r][b]) + dot(w + r * columns + k, x + b * columns + k, columns - k);
}

// f(how many, the first) for n rows of x, four at a time and then one
template <class F> inline void by_fours(long n, F f) {
    long b = 0;
    for (; b + 4 <= n; b += 4) f(std::integral_constant<int, 4>{}, b);
    for (; b < n; b++) f(std::integral_constant<int, 1>{}, b);
}

// f(how many, the first, r) for n rows of x by fours with each row r of a weight, of which a few stay in the cache
template <class F> inline void by_tiles(long begin, long end, long row_bytes, long n, F f) {
    long few = std::max(1l, 16384 / row_bytes);
    for (long from = begin; from < end; from += few)
        by_fours(n, [&](auto B, long b) {
            for (long r = from; r < std::min(end, from + few); r++) f(B, b, r);
        });
}

template <int R, class T> inline void dots(const T *w, long columns, const float *x, long n, float *y, long y_row) {
    by_fours(n, [=](auto B, long b) { dots<R, B>(w, columns, x + b * columns, y + b * y_row, y_row); });
}

template <class T> inline void dots(const T *w, long rows, long columns, const float *x, long n, float *y, long y_row) {
    by_fours(rows, [=](auto R, long r) { dots<R>(w + r * columns, columns, x, n, y + r, y_row); });
}

#ifdef __AVX512BF16__
// n rows of x as sums of two numbers of bfloat16, which keeps 16 bits, each filled up with zeros to whole 32 columns.
struct Halves {
    long columns, row;
    std::vector<bf16> high, low;

    Halves(const float *x, long n, long columns)
        : columns(columns), row((columns + 31) / 32 * 32), high(n * row), low(n * row) {
        for (long b = 0; b < n; b++)
            for (long k = 0; k < columns; k++) {
                long i = b * row + k;
                from_float(&high[i], x[b * columns + k]);
                float left = x[b * columns + k] - to_float(high[i]);  // NaN beside what is infinite
                from_float(&low[i], left == left ? left : 0);
            }
    }

    // products of R rows of a weight with B of x, like the function `dots`
    template <int R, int B> void dots(const bf16 *w, long b, float *y, long y_row) const {
        v16 sums[R][B] = {};
        const bf16 *high = this->high.data() + b * row, *low = this->low.data() + b * row;
        for (long k = 0; k < columns; k += 32) {
            __mmask32 there = columns - k < 32 ? (1u << (columns - k)) - 1 : ~0u;
            __m512bh a[R];
            for (int r = 0; r < R; r++) {
                a[r] = (__m512bh)_mm512_maskz_loadu_epi16(there, w + r * columns + k);
                prefetch(w, (r + R) * columns + k);
            }
            for (int i = 0; i < B; i++) {
                __m512bh h = (__m512bh)_mm512_loadu_si512(high + i * row + k),
                         l = (__m512bh)_mm512_loadu_si512(low + i * row + k);
                for (int r = 0; r < R; r++) sums[r][i] = (v16)_mm512_dpbf16_ps((__m512)sums[r][i], a[r], h);
                for (int r = 0; r < R; r++) sums[r][i] = (v16)_mm512_dpbf16_ps((__m512)sums[r][i], a[r], l);
            }
        }
#pragma GCC unroll 4  // lest the compiler keep the sums in memory, to index them
        for (int r = 0; r < R; r++)
#pragma GCC unroll 4
            for (int i = 0; i < B; i++) y[i * y_row + r] = sum(sums[r][i]);
    }
};

inline void dots(const bf16 *w, long rows, long columns, const float *x, long n, float *y, long y_row) {
    Halves halves(x, n, columns);
    by_fours(rows, [=, &halves](auto R, long r) {
        by_fours(n, [=, &halves](auto B, long b) { halves.dots<R, B>(w + r * columns, b, y + b * y_row + r, y_row); });
    });
}
#endif
