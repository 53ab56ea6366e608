// Products of a few rows with a weight, as it is stored: what a step of generating spends its time on.
#pragma once
#include <algorithm>
#include <vector>

#include "dots.h"

enum Format { FLOAT32, BFLOAT16, INT8, NIBBLES_FLOAT32, NIBBLES_BFLOAT16 };

// The weights: `multiply` gives y[b * y_row + r] for their rows r from `begin` to `end` and n rows of x, `expand`
// dequantizes a row, and `at` is where it lies.

// A weight in floating point.
template <class T> struct Plain {
    const T *w;

    const char *at(long r, long columns) const { return (const char *)(w + r * columns); }

    void multiply(long begin, long end, long columns, const float *x, long n, float *y, long y_row) const {
        if (n > 1) return dots(w + begin * columns, end - begin, columns, x, n, y + begin, y_row);
        for (long r = begin; r < end; r++) y[r] = dot(w + r * columns, x, columns);
    }
};

// Rounds n numbers to multiples of a step, of which the largest is `most`. Returns the step: NaN, if some are not
// finite.
inline float quantize_to_int16(const float *x, long n, float most, int16_t *to) {
    int32_t largest_bits = 0;  // without signs, bits are ordered as the numbers are
    for (long i = 0; i < n; i++) {
        int32_t bits;
        memcpy(&bits, x + i, 4);
        largest_bits = std::max(largest_bits, bits & 0x7fffffff);
    }
    float largest;
    memcpy(&largest, &largest_bits, 4);
    if (!(largest < INFINITY)) return NAN;
    float by = largest > 1e-30f ? most / largest : 0;
    for (long i = 0; i < n; i++) to[i] = (int16_t)(int32_t)(x[i] * by + std::copysign(0.5f, x[i]));
    return largest / most;
}

// n rows of x quantized to int16, a step for each block. Sums of a block's products with int8 fit 32 bits.
struct QuantizedRows {
    static constexpr long BLOCK = 512;
    long columns, blocks;
    std::vector<int16_t> numbers;
    std::vector<float> steps;  // one for each block

    QuantizedRows(const float *x, long n, long columns)
        : columns(columns), blocks((columns + BLOCK - 1) / BLOCK), numbers(n * columns), steps(n * blocks) {
        for (long i = 0; i < n * blocks; i++) {
            long from = i / blocks * columns + i % blocks * BLOCK, size = std::min(BLOCK, columns - i % blocks * BLOCK);
            steps[i] = quantize_to_int16(x + from, size, INT16_MAX, numbers.data() + from);
        }
    }

    // y[i * y_row] of B rows from b on, with a row of bytes
    template <int B> void dots(const int8_t *w, float scale, long b, float *y, long y_row) const {
        float totals[B] = {};
        for (long block = 0; block < blocks; block++) {
            int sums[B] = {};
            long end = std::min(columns, (block + 1) * BLOCK);
            for (long k = block * BLOCK; k < end; k += 64) prefetch(w, k + AHEAD);
            for (long k = block * BLOCK; k < end; k++)
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

    const char *at(long r, long columns) const { return (const char *)(w + r * columns); }

    void expand(long r, long columns, float *to) const {
        for (long k = 0; k < columns; k++) to[k] = scale[r] * w[r * columns + k];
    }

    void multiply(long begin, long end, long columns, const float *x, long n, float *y, long y_row) const {
        if (fast) return multiply_quantized(begin, end, columns, x, n, y, y_row);
        if (n > 1) return multiply_expanded(begin, end, columns, x, n, y, y_row);
        for (long r = begin; r < end; r++) y[r] = scale[r] * dot(w + r * columns, x, columns);
    }

    // A few rows at a time are made float32, and stay in the cache for all of x.
    void multiply_expanded(long begin, long end, long columns, const float *x, long n, float *y, long y_row) const {
        std::vector<float> few(4 * columns);
        for (long r = begin; r < end; r += 4) {
            long count = std::min(4l, end - r);
            for (long i = 0; i < count; i++) expand(r + i, columns, few.data() + i * columns);
            for (long i = 0; i < 4 * columns; i += 64) prefetch(w, (r + 4) * columns + i);
            dots(few.data(), count, columns, x, n, y + r, y_row);
        }
    }

    void multiply_quantized(long begin, long end, long columns, const float *x, long n, float *y, long y_row) const {
        QuantizedRows rows(x, n, columns);
        by_tiles(begin, end, columns, n,
                 [&](auto B, long b, long r) { rows.dots<B>(w + r * columns, scale[r], b, y + b * y_row + r, y_row); });
    }
};

// For each lane a word whose lowest bits are its code, from the words that hold those of the first 8 lanes and of
// others: bytes from the lowest on, of each first the upper half.
template <size_t... I> inline word_lanes codes_of_lanes(uint32_t a, uint32_t b, std::index_sequence<I...>) {
    return word_lanes{(I < 8 ? a : b)...} >> word_lanes{(uint32_t)(4 * (I % 8 ^ 1))...};
}

// LANES values of a table of 16 are looked up at once, by the lowest four bits of each code; and the scales of such
// codes are `a` for the first 8 and `b` for others.
#if defined __AVX2__ && !defined __AVX512F__  // a compiler would look up one after the other
inline Vectors<8>::floats look_up(const float *table, Vectors<8>::words codes) {
    __m256i lanes = (__m256i)codes;
    __m256 low = _mm256_permutevar8x32_ps(_mm256_loadu_ps(table), lanes),
           high = _mm256_permutevar8x32_ps(_mm256_loadu_ps(table + 8), lanes);
    return (Vectors<8>::floats)_mm256_blendv_ps(low, high, (__m256)_mm256_slli_epi32(lanes, 28));
}
#elif defined __ARM_NEON
inline Vectors<8>::floats look_up(const float *table, Vectors<8>::words codes) {
    Vectors<8>::words places = (codes & 15) * 0x04040404 + 0x03020100;  // of each value's four bytes
    uint8x16_t parts[2];
    memcpy(parts, &places, sizeof parts);
    for (uint8x16_t &part : parts) part = vqtbl4q_u8(vld1q_u8_x4((const uint8_t *)table), part);
    Vectors<8>::floats values;
    memcpy(&values, parts, sizeof parts);
    return values;
}
#else
inline v16 look_up(const float *table, v16u codes) {
#ifdef __clang__
    v16 values;
    for (int i = 0; i < 16; i++) values[i] = table[codes[i] & 15];
    return values;
#else
    return __builtin_shuffle(load<16>(table), codes);
#endif
}

#endif

inline lanes scales_of_lanes(float a, float b) {
    lanes scales;
    for (int i = 0; i < LANES; i++) scales[i] = i < 8 ? a : b;
    return scales;
}

// The values of a group's 64 codes as whole numbers, and their products with numbers of 16 bits in the order of
// `place`, whose sums fit 32 bits while no value is above UNIT.
#if defined __AVX512VNNI__
#define WHOLE_CODES
struct WholeCodes {
    typedef __m512 floats;
    static constexpr float UNIT = 16383;  // four products
    __m512i table, first, second;

    explicit WholeCodes(const int16_t *values) {
        int16_t twice[32];  // for the lowest five bits of a byte look them up
        for (int i = 0; i < 32; i++) twice[i] = values[i % 16];
        table = _mm512_loadu_si512(twice);
    }

    static int place(int k) { return k < 32 ? 2 * k : 2 * k - 63; }

    void look_up(const uint8_t *at) {
        __m512i bytes = _mm512_cvtepu8_epi16(_mm256_loadu_si256((const __m256i *)at));
        first = _mm512_permutexvar_epi16(_mm512_srli_epi16(bytes, 4), table);
        second = _mm512_permutexvar_epi16(bytes, table);
    }

    __m512 add_product(__m512 total, const int16_t *x, float by) const {
        __m512i sum = _mm512_dpwssd_epi32(_mm512_setzero_si512(), first, _mm512_loadu_si512(x));
        sum = _mm512_dpwssd_epi32(sum, second, _mm512_loadu_si512(x + 32));
        return _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum), _mm512_set1_ps(by), total);
    }
};
#elif defined __AVX2__
#define WHOLE_CODES
struct WholeCodes {
    typedef __m256 floats;
    static constexpr float UNIT = 8191;  // eight products
    __m256i low, high, values[4];        // the table's bytes; the values of 16 codes each

    explicit WholeCodes(const int16_t *table) {
        int8_t bytes[2][16];
        for (int i = 0; i < 16; i++) bytes[0][i] = (int8_t)table[i], bytes[1][i] = (int8_t)(table[i] >> 8);
        low = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)bytes[0]));
        high = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)bytes[1]));
    }

    // `look_up` spreads bytes within each half of a vector: the lower eight of both, then the upper eight.
    static int place(int k) { return 2 * (k % 16 / 8 * 16 + k / 16 % 2 * 8 + k % 8) + k / 32; }

    void look_up(const uint8_t *at) {
        __m256i bytes = _mm256_loadu_si256((const __m256i *)at), mask = _mm256_set1_epi8(15);
        __m256i codes[2] = {_mm256_and_si256(_mm256_srli_epi16(bytes, 4), mask), _mm256_and_si256(bytes, mask)};
        for (int i = 0; i < 2; i++) {
            __m256i l = _mm256_shuffle_epi8(low, codes[i]), h = _mm256_shuffle_epi8(high, codes[i]);
            values[2 * i] = _mm256_unpacklo_epi8(l, h), values[2 * i + 1] = _mm256_unpackhi_epi8(l, h);
        }
    }

    __m256 add_product(__m256 total, const int16_t *x, float by) const {
        __m256i sum = _mm256_setzero_si256();
        for (int i = 0; i < 4; i++)
            sum = _mm256_add_epi32(sum, _mm256_madd_epi16(values[i], _mm256_loadu_si256((const __m256i *)x + i)));
        return _mm256_fmadd_ps(_mm256_cvtepi32_ps(sum), _mm256_set1_ps(by), total);
    }
};
#endif

#ifdef WHOLE_CODES
constexpr bool WHOLE = true;
#else
constexpr bool WHOLE = false;
#endif

// Weights of 4 bits: w = scale * values[code] (+ zero), with a scale for each 64 of a row; two codes a byte, the first
// in the upper half. `fast`: x is rounded to 16 bits, and values that are not whole to WholeCodes::UNIT.
template <class S> struct Nibbles {
    const uint8_t *w;
    const S *scale, *zero;
    const float *pairs;  // the values of the codes of each byte
    bool fast;
    long groups;

    Nibbles(const void *codes, const void *scale, const void *zero, const float *pairs, long columns, bool fast)
        : w((const uint8_t *)codes), scale((const S *)scale), zero((const S *)zero), pairs(pairs), fast(fast && WHOLE),
          groups((columns + 63) / 64) {}

    const char *at(long r, long) const { return (const char *)(w + r * groups * 32); }

    void expand(long r, long columns, float *to) const {
        float table[16];
        for (int code = 0; code < 16; code++) table[code] = pairs[2 * code + 1];
        for (long k = 0; k < columns; k += 64) {
            long g = r * groups + k / 64;
            float by = to_float(scale[g]), from = zero ? to_float(zero[g]) : 0, values[64];
            uint32_t words[8];
            memcpy(words, w + g * 32, 32);
            for (int i = 0; i < 64; i += LANES) {
                auto codes =
                    codes_of_lanes(words[i / 8], words[(i + LANES - 1) / 8], std::make_index_sequence<LANES>());
                store<LANES>(values + i, by * look_up(table, codes) + from);
            }
            memcpy(to + k, values, 4 * std::min(64l, columns - k));
        }
    }

    // Each row of x is computed in the order in which it would be alone, so that its bits do not depend on the others.
    void multiply(long begin, long end, long columns, const float *x, long n, float *y, long y_row) const {
        std::vector<float> sums = sums_of_groups(x, n, columns);
        auto by_rows = [&](auto product) {
            by_tiles(begin, end, groups * 32, n, [&](auto B, long b, long r) {
                float *to = y + b * y_row + r;
                product(B, b, r, to);
                for (int i = 0; i < B; i++) to[i * y_row] += from_zeros(r, &sums[(b + i) * groups]);
            });
        };
        fast ? multiply_quantized(columns, x, n, y_row, by_rows) : multiply_exactly(columns, x, n, y_row, by_rows);
    }

    // The sums of the groups of n rows of x, for their products with the zeros.
    std::vector<float> sums_of_groups(const float *x, long n, long columns) const {
        std::vector<float> sums(n * groups);
        for (long i = 0; zero && i < n * groups; i++) {
            const float *from = x + i / groups * columns;
            float total = 0;
            for (long k = i % groups * 64; k < std::min(columns, i % groups * 64 + 64); k++) total += from[k];
            sums[i] = total;
        }
        return sums;
    }

    // What the groups' zeros add to a product.
    float from_zeros(long r, const float *sums) const { return zero ? dot(zero + r * groups, sums, groups) : 0; }

    template <class ByRows>
    void multiply_exactly(long columns, const float *x, long n, long y_row, ByRows by_rows) const {
        long size = (groups + 1) / 2 * 128;
        std::vector<float> ordered(n * size);
        for (long b = 0; b < n; b++) order(x + b * columns, columns, &ordered[b * size]);
        float table[16];
        for (int code = 0; code < 16; code++) table[code] = pairs[2 * code + 1];
        by_rows([&](auto B, long b, long r, float *to) { row<B>(r, table, &ordered[b * size], size, to, y_row); });
    }

    // Lays out a row of x in the order in which `row` meets the codes.
    void order(const float *x, long columns, float *ordered) const {
        const int block = 8 * LANES;
        float padded[block] = {};
        for (long k = 0; k < columns; k += block) {
            const float *from = x + k;
            if (columns - k < block) from = (const float *)memcpy(padded, from, 4 * (columns - k));
            for (int word = 0; word < LANES; word++)
                for (int i = 0; i < 8; i++) ordered[k + (i ^ 1) * LANES + word] = from[8 * word + i];
        }
    }

    // Multiplies row r of the weight with B rows of x: y[i * y_row].
    template <int B> void row(long r, const float *table, const float *x, long x_row, float *y, long y_row) const {
        const uint8_t *at = w + r * groups * 32;
        const S *by = scale + r * groups;
        lanes totals[B] = {};
        for (long g = 0; g < groups; g += LANES / 8, at += 4 * LANES, x += 8 * LANES) {
            bool both = g + 1 < groups;
            typename Vectors<LANES>::words c{};
            LANES == 8 || both ? memcpy(&c, at, 4 * LANES) : memcpy(&c, at, 32);
            auto scales = scales_of_lanes(to_float(by[g]), both ? to_float(by[g + 1]) : 0);
            lanes values[8];
            for (int s = 0; s < 8; s++) values[s] = look_up(table, c >> (4 * s));
            for (int i = 0; i < B; i++) {
                lanes even{}, odd{};
                for (int s = 0; s < 8; s += 2) {
                    even += values[s] * load<LANES>(x + i * x_row + LANES * s);
                    odd += values[s + 1] * load<LANES>(x + i * x_row + LANES * (s + 1));
                }
                totals[i] += (even + odd) * scales;
            }
        }
        for (int i = 0; i < B; i++) y[i * y_row] = sum<LANES>(totals[i]);
    }

    // In whole numbers.
    template <class ByRows>
    void multiply_quantized(long columns, const float *x, long n, long y_row, ByRows by_rows) const {
#ifdef WHOLE_CODES
        const float unit = zero ? 1 : WholeCodes::UNIT;
        std::vector<int16_t> numbers(64 * n * groups);
        std::vector<float> steps(n * groups);
        for (long i = 0; i < n * groups; i++) {
            long size = std::min(64l, columns - i % groups * 64);
            const float *from = x + i / groups * columns + i % groups * 64;
            int16_t quantized[64] = {};
            steps[i] = quantize_to_int16(from, size, INT16_MAX, quantized) / unit;
            for (int k = 0; k < 64; k++) numbers[64 * i + k] = quantized[WholeCodes::place(k)];
        }
        int16_t values[16];
        for (int i = 0; i < 16; i++) values[i] = (int16_t)std::nearbyint(pairs[2 * i + 1] * unit);
        WholeCodes codes(values);
        by_rows([&](auto B, long b, long r, float *to) {
            quantized_row<B>(r, codes, &numbers[64 * b * groups], &steps[b * groups], to, y_row);
        });
#endif
    }

#ifdef WHOLE_CODES
    template <int B> void quantized_row(long r, WholeCodes codes, const int16_t *numbers, const float *steps, float *y,
                                        long y_row) const {
        WholeCodes::floats totals[B] = {};
        for (long g = 0; g < groups; g++) {
            if (g % 2 == 0) prefetch(w, (r * groups + g) * 32 + AHEAD);
            codes.look_up(w + (r * groups + g) * 32);
            float by = to_float(scale[r * groups + g]);
            for (int i = 0; i < B; i++) {
                long at = i * groups + g;
                totals[i] = codes.add_product(totals[i], numbers + 64 * at, by * steps[at]);
            }
        }
        for (int i = 0; i < B; i++) {
            float lanes[sizeof totals[i] / 4], total = 0;
            memcpy(lanes, &totals[i], sizeof totals[i]);
            for (float lane : lanes) total += lane;
            y[i * y_row] = total;
        }
    }
#endif
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
