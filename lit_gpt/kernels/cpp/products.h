// Products of a few rows with a weight, as it is stored: what a step of generating spends its time on.
#pragma once
#include <algorithm>
#include <vector>

#include "dots.h"

#ifdef __AVX512VNNI__
constexpr bool VNNI = true;
#else
constexpr bool VNNI = false;
#endif

enum Format { FLOAT32, BFLOAT16, INT8, NIBBLES_FLOAT32, NIBBLES_BFLOAT16 };

// Multiplies like `dots` a weight's rows from `begin` to `end`: y[b * y_row + r]. A few rows at a time are made
// float32, and stay in the cache for all of x.
template <class Weight>
inline void multiply_expanded(const Weight &weight, long begin, long end, long columns, const float *x, long n,
                              float *y, long y_row) {
    std::vector<float> few(4 * columns);
    for (long r = begin; r < end; r += 4) {
        long count = std::min(4l, end - r), bytes = weight.row_bytes(columns);
        for (long i = 0; i < count; i++) weight.expand(r + i, columns, few.data() + i * columns);
        for (long i = 0; i < 4 * bytes; i += 64) prefetch((const char *)weight.w, (r + 4) * bytes + i);
        dots(few.data(), count, columns, x, n, y + r, y_row);
    }
}

// The weights: `multiply` gives y[b * y_row + r] for their rows r from `begin` to `end` and n rows of x, and `expand` a
// row of what is not floating point.

// A weight in floating point.
template <class T> struct Plain {
    const T *w;

    void multiply(long begin, long end, long columns, const float *x, long n, float *y, long y_row) const {
        if (n > 1) return dots(w + begin * columns, end - begin, columns, x, n, y + begin, y_row);
        for (long r = begin; r < end; r++) y[r] = dot(w + r * columns, x, columns);
    }
};

// Rounds n numbers to int16, whose range the largest fills. Returns the step between two of them: NaN, if some are not
// finite.
inline float quantize_to_int16(const float *x, long n, int16_t *to) {
    int32_t most = 0;  // of the numbers without their signs, whose bits are ordered as they are
    for (long i = 0; i < n; i++) {
        int32_t bits;
        memcpy(&bits, x + i, 4);
        most = std::max(most, bits & 0x7fffffff);
    }
    float largest;
    memcpy(&largest, &most, 4);
    if (!(largest < INFINITY)) return NAN;
    float by = largest > 1e-30f ? 32767 / largest : 0;
    for (long i = 0; i < n; i++) to[i] = (int16_t)(int32_t)(x[i] * by + std::copysign(0.5f, x[i]));
    return largest / 32767;
}

// n rows of x quantized to int16, a step for each block. Sums of a block's products with int8 fit 32 bits.
struct QuantizedRows {
    static constexpr long BLOCK = 512;
    long columns, blocks;
    std::vector<int16_t> numbers;
    std::vector<float> steps;  // of each block

    QuantizedRows(const float *x, long n, long columns)
        : columns(columns), blocks((columns + BLOCK - 1) / BLOCK), numbers(n * columns), steps(n * blocks) {
        for (long i = 0; i < n * blocks; i++) {
            long from = i / blocks * columns + i % blocks * BLOCK, size = std::min(BLOCK, columns - i % blocks * BLOCK);
            steps[i] = quantize_to_int16(x + from, size, numbers.data() + from);
        }
    }

    // y[i * y_row] of B rows from b on, with a row of bytes
    template <int B> void dots(const int8_t *w, float scale, long b, float *y, long y_row) const {
        float totals[B] = {};
        for (long block = 0; block < blocks; block++) {
            int sums[B] = {};
            for (long k = block * BLOCK, end = std::min(columns, k + BLOCK); k < end; k++)
                for (int i = 0; i < B; i++) sums[i] += (int16_t)w[k] * numbers[(b + i) * columns + k];
            for (int i = 0; i < B; i++)
                totals[i] = std::fma(steps[(b + i) * blocks + block], (float)sums[i], totals[i]);
        }
        for (int i = 0; i < B; i++) y[i * y_row] = scale * totals[i];
    }
};

// A weight of bytes, with a scale for each row. `fast`: x is rounded to 16 bits.
struct Bytes {
    const int8_t *w;
    const float *scale;
    bool fast;

    long row_bytes(long columns) const { return columns; }

    void expand(long r, long columns, float *to) const {
        for (long k = 0; k < columns; k++) to[k] = scale[r] * w[r * columns + k];
    }

    void multiply(long begin, long end, long columns, const float *x, long n, float *y, long y_row) const {
        if (fast) return multiply_quantized(begin, end, columns, x, n, y, y_row);
        if (n > 1) return multiply_expanded(*this, begin, end, columns, x, n, y, y_row);
        for (long r = begin; r < end; r++) y[r] = scale[r] * dot(w + r * columns, x, columns);
    }

    void multiply_quantized(long begin, long end, long columns, const float *x, long n, float *y, long y_row) const {
        QuantizedRows rows(x, n, columns);
        by_tiles(begin, end, columns, n,
                 [&](auto B, long b, long r) { rows.dots<B>(w + r * columns, scale[r], b, y + b * y_row + r, y_row); });
    }
};

// Weights of 4 bits: w = scale * values[code] (+ zero), with a scale for each 64 of a row; two codes a byte, the first
// in the upper half. `fast`: x is rounded to 16 bits, and values that are not whole to 15.
template <class S> struct Nibbles {
    const uint8_t *w;
    const S *scale, *zero;
    const float *pairs;  // the values of the codes of each byte
    bool fast;
    long groups;
    typedef Vectors<16>::words words;

    Nibbles(const void *codes, const void *scale, const void *zero, const float *pairs, long columns, bool fast)
        : w((const uint8_t *)codes), scale((const S *)scale), zero((const S *)zero), pairs(pairs), fast(fast && VNNI),
          groups((columns + 63) / 64) {}

    long row_bytes(long) const { return groups * 32; }

    void expand(long r, long columns, float *to) const {
        const uint8_t *at = w + r * groups * 32;
        for (long k = 0; k < columns; k += 64, at += 32) {
            float by = to_float(scale[r * groups + k / 64]), from = zero ? to_float(zero[r * groups + k / 64]) : 0,
                  values[64];
            for (int i = 0; i < 32; i++) memcpy(values + 2 * i, pairs + 2 * at[i], 8);
            long n = std::min(64l, columns - k);
            for (long i = 0; i < n; i++) to[k + i] = by * values[i] + from;
        }
    }

    void multiply(long begin, long end, long columns, const float *x, long n, float *y, long y_row) const {
        if (fast) return multiply_quantized(begin, end, columns, x, n, y, y_row);
        if (n > 1) return multiply_expanded(*this, begin, end, columns, x, n, y, y_row);
        auto ordered = order(x, columns), sums = sums_of_groups(x, columns);
        v16 table;
        for (int code = 0; code < 16; code++) table[code] = pairs[2 * code + 1];
        for (long r = begin; r < end; r++) y[r] = row(r, table, ordered.data()) + from_zeros(r, sums.data());
    }

    // of a row of x, for its products with the zeros
    std::vector<float> sums_of_groups(const float *x, long columns) const {
        std::vector<float> sums(groups);
        for (long g = 0; zero && g < groups; g++) {
            float total = 0;
            for (long k = 64 * g; k < std::min(columns, 64 * g + 64); k++) total += x[k];
            sums[g] = total;
        }
        return sums;
    }

    // what the groups' zeros add to a product
    float from_zeros(long r, const float *sums) const { return zero ? dot(zero + r * groups, sums, groups) : 0; }

    // x in the order in which `row` meets the codes
    std::vector<float> order(const float *x, long columns) const {
        long blocks = (groups + 1) / 2;
        std::vector<float> ordered(128 * blocks);
        float padded[128] = {};
        for (long b = 0; b < blocks; b++) {
            const float *from = x + 128 * b;
            if (long left = columns - 128 * b; left < 128) from = (const float *)memcpy(padded, from, 4 * left);
            for (int word = 0; word < 16; word++)
                for (int i = 0; i < 8; i++) ordered[128 * b + (i ^ 1) * 16 + word] = from[8 * word + i];
        }
        return ordered;
    }

    float row(long r, v16 table, const float *x) const {
        const uint8_t *at = w + r * groups * 32;
        const S *by = scale + r * groups;
        v16 total{};
        for (long g = 0; g < groups; g += 2, at += 64, x += 128) {
            bool both = g + 1 < groups;
            words c{};
            both ? memcpy(&c, at, 64) : memcpy(&c, at, 32);
            v16 even{}, odd{};
            for (int s = 0; s < 8; s += 2) {
                even += look_up(table, c >> (4 * s)) * load<16>(x + 16 * s);
                odd += look_up(table, c >> (4 * s + 4)) * load<16>(x + 16 * s + 16);
            }
            float a = to_float(by[g]), b = both ? to_float(by[g + 1]) : 0;
            total += (even + odd) * v16{a, a, a, a, a, a, a, a, b, b, b, b, b, b, b, b};
        }
        return sum(total);
    }

    // In whole numbers, a group's places of even number before the others.
    void multiply_quantized(long begin, long end, long columns, const float *x, long n, float *y, long y_row) const {
#ifdef __AVX512VNNI__
        const float unit = zero ? 1 : 16383;  // four products fit 32 bits
        std::vector<int16_t> numbers(64 * n * groups);
        std::vector<float> steps(n * groups);
        std::vector<std::vector<float>> sums;
        for (long b = 0; b < n; b++) sums.push_back(sums_of_groups(x + b * columns, columns));
        for (long i = 0; i < n * groups; i++) {
            long size = std::min(64l, columns - i % groups * 64);
            const float *from = x + i / groups * columns + i % groups * 64;
            int16_t quantized[64] = {}, *to = &numbers[64 * i];
            steps[i] = quantize_to_int16(from, size, quantized) / unit;
            for (int k = 0; k < 32; k++) to[k] = quantized[2 * k], to[k + 32] = quantized[2 * k + 1];
        }
        int16_t values[32];  // twice, for the lowest five bits of a byte look them up
        for (int i = 0; i < 32; i++) values[i] = (int16_t)std::nearbyint(pairs[2 * (i % 16) + 1] * unit);
        __m512i table = _mm512_loadu_si512(values);
        by_tiles(begin, end, row_bytes(columns), n, [&](auto B, long b, long r) {
            float *to = y + b * y_row + r;
            quantized_row<B>(r, table, &numbers[64 * b * groups], &steps[b * groups], to, y_row);
            for (int i = 0; i < B; i++) to[i * y_row] += from_zeros(r, sums[b + i].data());
        });
#endif
    }

#ifdef __AVX512VNNI__
    template <int B> void quantized_row(long r, __m512i table, const int16_t *numbers, const float *steps, float *y,
                                        long y_row) const {
        __m512 totals[B] = {};
        for (long g = 0; g < groups; g++) {
            __m512i bytes = _mm512_cvtepu8_epi16(_mm256_loadu_si256((const __m256i *)(w + (r * groups + g) * 32)));
            __m512i first = _mm512_permutexvar_epi16(_mm512_srli_epi16(bytes, 4), table),
                    second = _mm512_permutexvar_epi16(bytes, table);
            float by = to_float(scale[r * groups + g]);
            for (int i = 0; i < B; i++) {
                const int16_t *x = numbers + 64 * (i * groups + g);
                __m512i sum = _mm512_dpwssd_epi32(_mm512_setzero_si512(), first, _mm512_loadu_si512(x));
                sum = _mm512_dpwssd_epi32(sum, second, _mm512_loadu_si512(x + 32));
                totals[i] =
                    _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum), _mm512_set1_ps(by * steps[i * groups + g]), totals[i]);
            }
        }
        for (int i = 0; i < B; i++) y[i * y_row] = _mm512_reduce_add_ps(totals[i]);
    }
#endif

    // the values of the codes in the lowest bits
    static v16 look_up(v16 table, words c) {
#ifdef __clang__
        v16 values;
        for (int i = 0; i < 16; i++) values[i] = table[c[i] & 15];
        return values;
#else
        return __builtin_shuffle(table, c);
#endif
    }
};

// `use` of the weight (rows, columns) in its format; `scale`, `zero` and `pairs` as the format has them.
template <class Use>
void with_quantized(long format, const void *w, const void *scale, const void *zero, const float *pairs, bool fast,
                    long columns, Use use) {
    switch (format) {
    case INT8: return use(Bytes{(const int8_t *)w, (const float *)scale, fast});
    case NIBBLES_FLOAT32: return use(Nibbles<float>(w, scale, zero, pairs, columns, fast));
    case NIBBLES_BFLOAT16: return use(Nibbles<bf16>(w, scale, zero, pairs, columns, fast));
    }
}

template <class Use>
void with_weight(long format, const void *w, const void *scale, const void *zero, const float *pairs, bool fast,
                 long columns, Use use) {
    switch (format) {
    case FLOAT32: return use(Plain<float>{(const float *)w});
    case BFLOAT16: return use(Plain<bf16>{(const bf16 *)w});
    default: with_quantized(format, w, scale, zero, pairs, fast, columns, use);
    }
}
