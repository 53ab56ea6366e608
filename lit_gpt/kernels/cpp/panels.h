// Products of many rows with a weight as it is stored: what reading a prompt spends its time on. A panel, a few rows of
// the weight, is made what the processor multiplies fastest, and stays in the cache for all rows of x.
#pragma once
#include "products.h"

// What panels and rows of x are made of: `number`, of which a vector holds STEP; sums of products within a block of at
// most BLOCK columns; and whether blocks have a step, of which their numbers are multiples.

#ifdef __AVX512BF16__
struct BFloats {  // weights rounded to bfloat16, sums as floats
    typedef bf16 number;
    typedef __m512bh vector;
    typedef v16 total;
    static constexpr long STEP = 32, BLOCK = 1024;
    static constexpr bool STEPS = false;
    static constexpr float X_MOST = 0, WEIGHT_MOST = 0;

    static vector load(const bf16 *p) { return (vector)_mm512_loadu_si512(p); }
    static void add(total &sum, vector a, vector b) { sum = (total)_mm512_dpbf16_ps((__m512)sum, a, b); }
    static v16 to_floats(total sum) { return sum; }
    static float convert(bf16 *to, const float *from, long n, float) {
        for (long k = 0; k < n; k++) from_float(to + k, from[k]);
        return 1;
    }
};
#endif

struct Floats {
    typedef float number;
    typedef lanes vector, total;
    static constexpr long STEP = LANES, BLOCK = 512;
    static constexpr bool STEPS = false;
    static constexpr float X_MOST = 0, WEIGHT_MOST = 0;

    static vector load(const float *p) { return ::load<LANES>(p); }
    static void add(total &sum, vector a, vector b) { sum += a * b; }
    static lanes to_floats(total sum) { return sum; }
    static float convert(float *to, const float *from, long n, float) {
        std::copy(from, from + n, to);
        return 1;
    }
};

#ifdef __AVX2__
struct Integers {  // multiples of a step for each block: finer than bfloat16's, but for numbers far below the largest
    typedef int16_t number;
    static constexpr long STEP = 2 * LANES, BLOCK = 512;
    static constexpr bool STEPS = true;
    static constexpr float X_MOST = 16383, WEIGHT_MOST = 2047;  // sums of BLOCK / 8 products fit 32 bits
#ifdef __AVX512BW__
    typedef __m512i vector, total;

    static vector load(const int16_t *p) { return _mm512_loadu_si512(p); }
    static void add(total &sum, vector a, vector b) {
#ifdef __AVX512VNNI__
        sum = _mm512_dpwssd_epi32(sum, a, b);
#else
        sum = _mm512_add_epi32(sum, _mm512_madd_epi16(a, b));
#endif
    }
    static lanes to_floats(total sum) { return (lanes)_mm512_cvtepi32_ps(sum); }
#else
    typedef __m256i vector, total;

    static vector load(const int16_t *p) { return _mm256_loadu_si256((const __m256i *)p); }
    static void add(total &sum, vector a, vector b) {
#ifdef __AVXVNNI__
        sum = _mm256_dpwssd_avx_epi32(sum, a, b);
#else
        sum = _mm256_add_epi32(sum, _mm256_madd_epi16(a, b));
#endif
    }
    static lanes to_floats(total sum) { return (lanes)_mm256_cvtepi32_ps(sum); }
#endif
    // Returns the step.
    static float convert(int16_t *to, const float *from, long n, float most) {
        return quantize_to_int16(from, n, most, to);
    }
};
#endif

// A vector whose lane i is the sum of sums[i]: with each step half as many vectors, in which lanes that differ in one
// more bit of their number are added.
template <long BIT, size_t... I> inline lanes merged(lanes a, lanes b, std::index_sequence<I...>) {
#ifdef __clang__
    return __builtin_shufflevector(a, b, (I & BIT ? LANES + I : I)...) +
           __builtin_shufflevector(a, b, (I & BIT ? LANES + (I ^ BIT) : I ^ BIT)...);
#else
    typedef Vectors<LANES>::words words;
    return __builtin_shuffle(a, b, words{(uint32_t)(I & BIT ? LANES + I : I)...}) +
           __builtin_shuffle(a, b, words{(uint32_t)(I & BIT ? LANES + (I ^ BIT) : I ^ BIT)...});
#endif
}

template <long BIT = 1> inline lanes sums_of(const lanes *sums) {
    lanes half[LANES / BIT / 2];
#pragma GCC unroll 8
    for (long i = 0; i < LANES / BIT / 2; i++)
        half[i] = merged<BIT>(sums[2 * i], sums[2 * i + 1], std::make_index_sequence<LANES>());
    if constexpr (2 * BIT < LANES)
        return sums_of<2 * BIT>(half);
    else
        return half[0];
}

constexpr long TILE = 4, X_TILE = LANES / TILE;  // rows of the weight and of x that are multiplied at once
constexpr long PANEL = 16;                       // rows of the weight

inline long padded(long n, long multiple) { return (n + multiple - 1) / multiple * multiple; }

// How the columns are cut into blocks, filled up with zeros to whole vectors.
template <class A> struct Blocks {
    long columns = 0, count = 0, size = 0;

    Blocks() = default;
    explicit Blocks(long columns)
        : columns(columns), count((columns + A::BLOCK - 1) / A::BLOCK),
          size(padded((columns + count - 1) / count, A::STEP)) {}
    long begin(long block) const { return block * size; }
    long width(long block) const { return std::max(0l, std::min(size, columns - block * size)); }
};

// Rows of numbers, block by block, each block's rows next to each other, and each row's step in a block.
template <class A> struct Rows {
    Blocks<A> blocks;
    long n;
    std::vector<typename A::number> memory;
    typename A::number *numbers;  // in it, where a line of the cache begins
    std::vector<float> steps;

    // Makes room for n rows; what is in it stays as it was.
    void prepare(const Blocks<A> &blocks, long n) {
        this->blocks = blocks, this->n = n;
        size_t size = n * blocks.count * blocks.size + 64 / sizeof(typename A::number);
        if (memory.size() < size) memory.resize(size);
        numbers = (typename A::number *)(((uintptr_t)memory.data() + 63) / 64 * 64);
        if ((long)steps.size() < n * blocks.count) steps.resize(n * blocks.count);
    }
    typename A::number *at(long block, long row) { return numbers + (block * n + row) * blocks.size; }
    float &step(long block, long row) { return steps[block * n + row]; }

    void set(long row, const float *from, float most) {
        for (long block = 0; block < blocks.count; block++) {
            const float *part = from + blocks.begin(block);
            step(block, row) = A::convert(at(block, row), part, blocks.width(block), most);
            fill(block, row);
        }
    }
    void copy(long row, const typename A::number *from) {
        for (long block = 0; block < blocks.count; block++) {
            std::copy_n(from + blocks.begin(block), blocks.width(block), at(block, row));
            fill(block, row);
        }
    }
    void fill(long block, long row) {
        std::fill(at(block, row) + blocks.width(block), at(block, row) + blocks.size, typename A::number{});
    }
};

// The sums of products of TILE rows of a weight and X_TILE of x over a block; lane i is that of row i % TILE of the
// weight and i / TILE of x.
template <class A> inline lanes tile(const typename A::number *w, const typename A::number *x, long size) {
    typename A::total sums[LANES];
    lanes floats[LANES];
#pragma GCC unroll 16  // as below, lest the compiler keep the sums in memory, to index them
    for (long i = 0; i < LANES; i++) sums[i] = typename A::total{};
    for (long k = 0; k < size; k += A::STEP) {
        typename A::vector a[TILE];
#pragma GCC unroll 4
        for (long r = 0; r < TILE; r++) a[r] = A::load(w + r * size + k);
#pragma GCC unroll 4
        for (long b = 0; b < X_TILE; b++) {
            typename A::vector c = A::load(x + b * size + k);
#pragma GCC unroll 4
            for (long r = 0; r < TILE; r++) A::add(sums[b * TILE + r], a[r], c);
        }
    }
#pragma GCC unroll 16
    for (long i = 0; i < LANES; i++) floats[i] = A::to_floats(sums[i]);
    return sums_of(floats);
}

// totals (rows of x, PANEL) = x panel^T; meanwhile the bytes from `ahead` to `end` are fetched, which come next.
template <class A> void multiply(Rows<A> &panel, Rows<A> &x, float *totals, const char *ahead, const char *end) {
    long share = padded((end - ahead) / (panel.blocks.count * ((x.n + X_TILE - 1) / X_TILE)) + 1, 64);
    for (long block = 0; block < panel.blocks.count; block++)
        for (long b = 0; b < x.n; b += X_TILE) {
            for (const char *stop = std::min(end, ahead + share); ahead < stop; ahead += 64) prefetch(ahead, 0);
            for (long r = 0; r < PANEL; r += TILE) {
                float part[LANES];
                store<LANES>(part, tile<A>(panel.at(block, r), x.at(block, b), panel.blocks.size));
                for (long i = 0; i < X_TILE; i++) {
                    float *to = totals + (b + i) * PANEL + r;
                    auto sums = load<TILE>(part + i * TILE);
                    if (A::STEPS) sums *= x.step(block, b + i) * load<TILE>(&panel.step(block, r));
                    store<TILE>(to, block ? load<TILE>(to) + sums : sums);
                }
            }
        }
}
