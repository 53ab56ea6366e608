// Causal attention within the samples of a row, forward and backward, a block of queries at a time (Dao et al. 2022,
// FlashAttention: probabilities are not kept but computed again). Scores, softmax and all sums are floats.
#include <algorithm>
#include <vector>

#include "attention.h"
#include "vectors.h"
#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

namespace {

const int QUERIES = 32;

inline int up(int n, int multiple) { return (n + multiple - 1) / multiple * multiple; }

// A matrix product takes STEP elements of its depth at once, which lie together in a word.
template <class T> struct Words;

template <> struct Words<float> {
    typedef float word;
    typedef lanes vector;
    enum { STEP = 1 };

    static word of(float first, float) { return first; }
    static lanes of(lanes first, lanes) { return first; }
    static void add(lanes &sum, word a, vector b) { sum += a * b; }
};

template <> struct Words<bf16> {
    typedef uint32_t word;
    typedef word_lanes vector;
    enum { STEP = 2 };

    static word of(bf16 first, bf16 second) { return first.bits | (word)second.bits << 16; }
    static word_lanes of(lanes first, lanes second) {
        word_lanes low = (word_lanes)first, high = (word_lanes)second;
        low = low + 0x7fff + (low >> 16 & 1), high = high + 0x7fff + (high >> 16 & 1);
        return low >> 16 | (high & 0xffff0000);
    }
    static void add(lanes &sum, word a, vector b) {
#ifdef __AVX512BF16__
        sum = (lanes)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_epi32(a), (__m512bh)b);
#else
        word low = a << 16, high = a & 0xffff0000;
        float first, second;
        memcpy(&first, &low, 4), memcpy(&second, &high, 4);
        sum += first * (lanes)(b << 16) + second * (lanes)(b & 0xffff0000);
#endif
    }
};

template <class T, int ROWS, int VECTORS, class word = typename Words<T>::word>
inline void tile(int steps, const word *A, long a_row, long a_step, const word *B, long b_step, float *C, long c_row) {
    lanes sums[ROWS][VECTORS];
    for (int i = 0; i < ROWS; i++)
        for (int j = 0; j < VECTORS; j++) sums[i][j] = load<LANES>(C + i * c_row + j * LANES);
    for (int k = 0; k < steps; k++) {
        typename Words<T>::vector b[VECTORS];
        for (int j = 0; j < VECTORS; j++) memcpy(&b[j], B + k * b_step + j * LANES, sizeof b[j]);
        for (int i = 0; i < ROWS; i++)
            for (int j = 0; j < VECTORS; j++) Words<T>::add(sums[i][j], A[i * a_row + k * a_step], b[j]);
    }
    for (int i = 0; i < ROWS; i++)
        for (int j = 0; j < VECTORS; j++) store<LANES>(C + i * c_row + j * LANES, sums[i][j]);
}

// C (rows, columns) += A B over `depth` elements; columns a multiple of 16.
template <class T, class word = typename Words<T>::word>
void multiply(int rows, int columns, int depth, const word *A, long a_row, long a_step, const word *B, long b_step,
              float *C, long c_row) {
    int steps = up(depth, Words<T>::STEP) / Words<T>::STEP, i;
    for (int j = 0; j < columns; j += 2 * LANES) {
        bool two = j + 2 * LANES <= columns;
        for (i = 0; i + TILE_ROWS <= rows; i += TILE_ROWS)
            (two ? tile<T, TILE_ROWS, 2> : tile<T, TILE_ROWS, 1>)(steps, A + i * a_row, a_row, a_step, B + j, b_step,
                                                                  C + i * c_row + j, c_row);
        for (; i < rows; i++)
            (two ? tile<T, 1, 2> : tile<T, 1, 1>)(steps, A + i * a_row, a_row, a_step, B + j, b_step, C + i * c_row + j,
                                                  c_row);
    }
}

// Makes of 16 rows of words their transpose; in wide registers by exchanging one bit of the numbers of row and
// column after another.
template <class word> inline void transpose(word (*rows)[16]) {
#ifdef __AVX512F__
    v16u vectors[16];
    memcpy(vectors, rows, sizeof vectors);
    const v16u lane{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    for (int bit = 1; bit < 16; bit *= 2)
        for (int i = 0; i < 16; i++)
            if (!(i & bit)) {
                v16u a = vectors[i], b = vectors[i + bit], upper = (lane & bit) != 0 ? v16u{} + 16 : v16u{};
                vectors[i] = __builtin_shuffle(a, b, (lane & ~bit) + upper);
                vectors[i + bit] = __builtin_shuffle(a, b, (lane | bit) + upper);
            }
    memcpy(rows, vectors, sizeof vectors);
#else  // shuffles wider than the machine's registers are taken apart into single words
    for (int i = 0; i < 16; i++)
        for (int j = 0; j < i; j++) std::swap(rows[i][j], rows[j][i]);
#endif
}

template <class E> struct Zeros : std::vector<E> {
    E *of(size_t n) {
        this->assign(n, E{});
        return this->data();
    }
};

// The rows of a sample's head, or of a block of its queries, as words; each function for one place in a product.
template <class T> struct Rows {
    typedef typename Words<T>::word word;
    enum { STEP = Words<T>::STEP };
    Heads<const T> x;
    int b, h, first, rows, size;

    // (rows, steps of the head): the left matrix, depth along the head
    void pack_left(word *to, int width) const {
        for (int i = 0; i < rows; i++) memcpy(to + (long)i * width, x.at(b, h, first + i), size * sizeof(T));
    }
    // (steps of the head, rows): the right matrix, depth along the head; `width` is a multiple of 16
    void pack_transposed(word *to, int width) const {
        int steps = up(size, STEP) / STEP;
        for (int i = 0; i < rows; i += 16) {
            word part[16][16];
            for (int j = 0; j < steps; j += 16) {
                int count = std::min(16, steps - j);
                memset(part, 0, sizeof part);
                for (int r = 0; r < 16 && i + r < rows; r++)
                    memcpy(part[r], x.at(b, h, first + i + r) + j * STEP,
                           std::min<int>(64, (size - j * STEP) * sizeof(T)));
                transpose(part);
                for (int k = 0; k < count; k++) memcpy(to + (long)(j + k) * width + i, part[k], 64);
            }
        }
    }
    // (steps of the rows, head): the right matrix, depth along the rows
    void pack_right(word *to, int width) const {
        for (int i = 0; i < rows; i += STEP) {
            const T *one = x.at(b, h, first + i), *other = x.at(b, h, first + std::min(i + STEP - 1, rows - 1));
            bool there = i + STEP <= rows;
            for (int j = 0; j < size; j++)
                to[(long)(i / STEP) * width + j] = Words<T>::of(one[j], there ? other[j] : T{});
        }
    }
};

// Floats (rows, columns) as the left matrix of a product: of itself, and of its transpose. Rows are added up to a step.
template <class T>
void split(int rows, int columns, const float *from, typename Words<T>::word *left,
           typename Words<T>::word *left_transposed) {
    enum { STEP = Words<T>::STEP };
    for (int i = 0; i < rows; i += STEP) {
        for (int r = 0; left && r < STEP && i + r < rows; r++)
            for (int j = 0; j < columns; j += LANES)
                store<LANES>((T *)(left + (long)(i + r) * columns / STEP) + j,
                             load<LANES>(from + (i + r) * columns + j));
        for (int j = 0; left_transposed && j < columns; j += LANES) {
            lanes other = i + STEP <= rows ? load<LANES>(from + (i + STEP - 1) * columns + j) : lanes{};
            auto words = Words<T>::of(load<LANES>(from + i * columns + j), other);
            memcpy(left_transposed + (long)(i / STEP) * columns + j, &words, sizeof words);
        }
    }
}

// One head of one sample; of its queries `begin` to `begin + n`, and the keys `first` to `last` that any of them sees.
struct Item {
    const Sizes &s;
    int b, h, group, start, length, keys, width;
    int begin, n, first, last;

    Item(const Sizes &s, long i)
        : s(s), b(i / (s.samples * s.heads)), h(i % s.heads), group(h / (s.heads / s.groups)),
          start(s.offsets[i / s.heads % s.samples]), length(s.offsets[i / s.heads % s.samples + 1] - start),
          keys(up(length, 16)), width(up(s.size, 16)) {}
    void block(int at) {
        begin = at, n = std::min(QUERIES, length - at);
        first = std::max(0, begin - s.window + 1) / 16 * 16, last = up(begin + n, 16);
    }
    int seen() const { return last - first; }
    template <class T> Rows<T> all(const Heads<const T> &x) const { return {x, b, group, start, length, s.size}; }
    int query(int i) const { return start + begin - s.before + i; }  // of the block
    template <class T> Rows<T> queries(const Heads<const T> &x) const { return {x, b, h, query(0), n, s.size}; }
    long place() const { return ((long)b * s.heads + h) * (s.total() - s.before) + start; }
    // -1e30 in the place of scores of query i of the block that it does not see
    void mask(int i, float *scores) const {
        std::fill(scores + begin + i + 1 - first, scores + seen(), -1e30f);
        std::fill(scores, scores + std::max(0, begin + i - s.window + 1 - first), -1e30f);
    }
};

inline float largest(const float *row, int n) {
    lanes most = load<LANES>(row);
    for (int j = LANES; j < n; j += LANES) most = most > load<LANES>(row + j) ? most : load<LANES>(row + j);
    float maximum = most[0];
    for (int j = 1; j < LANES; j++) maximum = std::max(maximum, most[j]);
    return maximum;
}

template <class T> void put_row(T *to, const float *from, int size, float factor) {
    for (int j = 0; j < size; j += LANES) put(to + j, load<LANES>(from + j) * factor, std::min(LANES, size - j));
}

template <class T> void attention(const Sizes &s, Heads<const T> q, Heads<const T> k, Heads<const T> v, Heads<T> y,
                                  float *log_sums) {
    typedef typename Words<T>::word word;
    enum { STEP = Words<T>::STEP };
#pragma omp parallel for schedule(dynamic)
    for (long i = 0; i < s.items(); i++) {
        Item item(s, i);
        int width = item.width, keys = item.keys;
        static thread_local Zeros<word> key_words, value_words, query_words, score_words;
        static thread_local Zeros<float> scores, outputs;
        word *K = key_words.of((long)width * keys), *V = value_words.of((long)keys * width);
        item.all(k).pack_transposed(K, keys);
        item.all(v).pack_right(V, width);
        for (int begin = s.before; begin < item.length; begin += QUERIES) {
            item.block(begin);
            int n = item.n, seen = item.seen();
            word *Q = query_words.of(QUERIES * width), *P = score_words.of(QUERIES * seen);
            float *S = scores.of(QUERIES * seen), *O = outputs.of(QUERIES * width), sums[QUERIES];
            item.queries(q).pack_left(Q, width);
            multiply<T>(n, seen, s.size, Q, width, 1, K + item.first, keys, S, seen);
            for (int r = 0; r < n; r++) {
                float *row = S + r * seen;
                item.mask(r, row);
                float most = largest(row, seen);
                lanes total{};
                for (int j = 0; j < seen; j += LANES) {
                    lanes p = exponential((load<LANES>(row + j) - most) * s.scale);
                    total += p;
                    store<LANES>(row + j, p);
                }
                sums[r] = sum(total);
                log_sums[item.place() + begin - s.before + r] = most * s.scale + std::log(sums[r]);
            }
            split<T>(n, seen, S, P, nullptr);
            multiply<T>(n, width, seen, P, seen / STEP, 1, V + (long)item.first / STEP * width, width, O, width);
            for (int r = 0; r < n; r++)
                put_row(y.at(item.b, item.h, item.query(r)), O + r * width, s.size, 1 / sums[r]);
        }
    }
}

// k_heads, v_heads: gradients of keys and values by head, float (B, heads, T, size)
template <class T>
void attention_backward(const Sizes &s, Heads<const T> q, Heads<const T> k, Heads<const T> v, Heads<const T> grad,
                        const float *log_sums, Heads<T> q_grad, float *k_heads, float *v_heads) {
    typedef typename Words<T>::word word;
    enum { STEP = Words<T>::STEP };
#pragma omp parallel for schedule(dynamic)
    for (long i = 0; i < s.items(); i++) {
        Item item(s, i);
        int width = item.width, keys = item.keys;
        static thread_local Zeros<word> words[10];
        static thread_local Zeros<float> floats[5];
        word *K_transposed = words[0].of((long)width * keys), *V_transposed = words[1].of((long)width * keys);
        word *K = words[2].of((long)keys * width);
        float *dK = floats[0].of((long)keys * width), *dV = floats[1].of((long)keys * width);
        item.all(k).pack_transposed(K_transposed, keys);
        item.all(v).pack_transposed(V_transposed, keys);
        item.all(k).pack_right(K, width);
        for (int begin = 0; begin < item.length; begin += QUERIES) {
            item.block(begin);
            int n = item.n, seen = item.seen();
            word *Q = words[3].of(QUERIES * width), *Q_right = words[4].of(QUERIES * width);
            word *G = words[5].of(QUERIES * width), *G_right = words[6].of(QUERIES * width);
            word *P_transposed = words[7].of(QUERIES * seen), *D_left = words[8].of(QUERIES * seen),
                 *D_transposed = words[9].of(QUERIES * seen);
            float *P = floats[2].of(QUERIES * seen), *D = floats[3].of(QUERIES * seen),
                  *dQ = floats[4].of(QUERIES * width);
            item.queries(q).pack_left(Q, width), item.queries(q).pack_right(Q_right, width);
            item.queries(grad).pack_left(G, width), item.queries(grad).pack_right(G_right, width);
            multiply<T>(n, seen, s.size, Q, width, 1, K_transposed + item.first, keys, P, seen);
            multiply<T>(n, seen, s.size, G, width, 1, V_transposed + item.first, keys, D, seen);
            for (int r = 0; r < n; r++) {
                float *p = P + r * seen, *d = D + r * seen, log_sum = log_sums[item.place() + begin + r];
                item.mask(r, p);
                lanes along{};
                for (int j = 0; j < seen; j += LANES) {
                    lanes x = exponential(load<LANES>(p + j) * s.scale - log_sum);
                    along += x * load<LANES>(d + j);
                    store<LANES>(p + j, x);
                }
                float mean = sum(along);
                for (int j = 0; j < seen; j += LANES)
                    store<LANES>(d + j, load<LANES>(p + j) * (load<LANES>(d + j) - mean));
            }
            split<T>(n, seen, P, nullptr, P_transposed);
            split<T>(n, seen, D, D_left, D_transposed);
            long from = (long)item.first * width;
            multiply<T>(n, width, seen, D_left, seen / STEP, 1, K + from / STEP, width, dQ, width);
            multiply<T>(seen, width, n, P_transposed, 1, seen, G_right, width, dV + from, width);
            multiply<T>(seen, width, n, D_transposed, 1, seen, Q_right, width, dK + from, width);
            for (int r = 0; r < n; r++)
                put_row(q_grad.at(item.b, item.h, item.start + begin + r), dQ + r * width, s.size, s.scale);
        }
        for (int t = 0; t < item.length; t++) {
            put_row(k_heads + (item.place() + t) * s.size, dK + (long)t * width, s.size, s.scale);
            put_row(v_heads + (item.place() + t) * s.size, dV + (long)t * width, s.size, 1);
        }
    }
}

// Sums over the heads of each group
template <class T> void gather(const Sizes &s, const float *by_head, Heads<T> to) {
    int total = s.total(), n = s.heads / s.groups;
#pragma omp parallel for
    for (long item = 0; item < (long)s.batch * s.groups * total; item++) {
        int b = item / ((long)s.groups * total), group = item / total % s.groups, t = item % total;
        const float *first = by_head + (((long)b * s.heads + group * n) * total + t) * s.size;
        T *out = to.at(b, group, t);
        for (int j = 0; j < s.size; j += LANES) {
            int count = std::min(LANES, s.size - j);
            lanes x{};
            for (int h = 0; h < n; h++) x += take(first + (long)h * total * s.size + j, count);
            put(out + j, x, count);
        }
    }
}

}  // namespace

#define BOTH(T, suffix)                                                                                                \
    void attention_##suffix(const Sizes *s, const Heads<const T> *q, const Heads<const T> *k, const Heads<const T> *v, \
                            const Heads<T> *y, float *log_sums) {                                                      \
        attention(*s, *q, *k, *v, *y, log_sums);                                                                       \
    }                                                                                                                  \
    void attention_backward_##suffix(const Sizes *s, const Heads<const T> *q, const Heads<const T> *k,                 \
                                     const Heads<const T> *v, const Heads<const T> *grad, const float *log_sums,       \
                                     const Heads<T> *q_grad, const Heads<T> *k_grad, const Heads<T> *v_grad,           \
                                     float *k_heads, float *v_heads) {                                                 \
        attention_backward(*s, *q, *k, *v, *grad, log_sums, *q_grad, k_heads, v_heads);                                \
        gather(*s, k_heads, *k_grad);                                                                                  \
        gather(*s, v_heads, *v_grad);                                                                                  \
    }

extern "C" {
BOTH(bf16, bf16)
BOTH(float, f32)
}
