// Causal attention within the samples of a row, forward and backward, a block of queries at a time (Dao et al. 2022,
// FlashAttention: probabilities are not kept but computed again). All sums and products are of floats.
#include <algorithm>
#include <vector>

#include "vectors.h"

namespace {

const int QUERIES = 32;

inline int up(int n, int multiple) { return (n + multiple - 1) / multiple * multiple; }

// (B, heads, T, size) with elements of a head next to each other
template <class T> struct Heads {
    T *data;
    long batch, head, token;

    T *at(long b, long h, long t) const { return data + b * batch + h * head + t * token; }
};

struct Sizes {
    int batch, heads, groups, size, samples;
    const int *offsets;  // of the samples in a row
    float scale;
    int window;  // positions that a query sees, its own included

    int padded() const { return up(size, 16); }
    long items() const { return (long)batch * samples * heads; }
};

// Rows of a head as floats, (rows, width); beyond `size` they stay as they are.
template <class T> void rows_of(const Heads<T> &x, int b, int h, int first, int rows, int size, float scale, float *to, int width) {
    for (int i = 0; i < rows; i++) {
        const T *from = x.at(b, h, first + i);
        for (int j = 0; j < size; j++) to[(long)i * width + j] = to_float(from[j]) * scale;
    }
}

// The same, (size, width)
template <class T> void columns_of(const Heads<T> &x, int b, int h, int first, int rows, int size, float *to, int width) {
    for (int i = 0; i < rows; i++) {
        const T *from = x.at(b, h, first + i);
        for (int j = 0; j < size; j++) to[(long)j * width + i] = to_float(from[j]);
    }
}

struct Zeros : std::vector<float> {
    float *of(size_t n) {
        assign(n, 0.0f);
        return data();
    }
};

// Queries `begin` to `begin + n` of a sample; the keys `first` to `last` that any of them sees, on multiples of 16.
struct Block {
    int begin, n, first, last;

    Block(const Sizes &s, int begin, int length)
        : begin(begin), n(std::min(QUERIES, length - begin)), first(std::max(0, begin - s.window + 1) / 16 * 16),
          last(up(begin + n, 16)) {}
    int keys() const { return last - first; }
};

// Makes the scores of query i those of the keys that it sees, and -1e30 elsewhere.
inline void hide(const Sizes &s, const Block &block, int i, float *scores) {
    int position = block.begin + i;
    std::fill(scores + position + 1 - block.first, scores + block.keys(), -1e30f);
    std::fill(scores, scores + std::max(0, position - s.window + 1 - block.first), -1e30f);
}

template <class T> void attention(const Sizes &s, Heads<const T> q, Heads<const T> k, Heads<const T> v, Heads<T> y, float *log_sums) {
    int width = s.padded(), total = s.offsets[s.samples];
#pragma omp parallel for schedule(dynamic)
    for (long item = 0; item < s.items(); item++) {
        int b = item / (s.samples * s.heads), sample = item / s.heads % s.samples, h = item % s.heads;
        int group = h / (s.heads / s.groups), start = s.offsets[sample], length = s.offsets[sample + 1] - start;
        int all = up(length, 16);
        static thread_local Zeros keys, values, queries, scores, found;
        float *K = keys.of((long)width * all), *V = values.of((long)all * width), *S = scores.of(QUERIES * all);
        columns_of(k, b, group, start, length, s.size, K, all);
        rows_of(v, b, group, start, length, s.size, 1, V, width);
        for (int begin = 0; begin < length; begin += QUERIES) {
            Block block(s, begin, length);
            float *Q = queries.of(QUERIES * width), *O = found.of(QUERIES * width);
            rows_of(q, b, h, start + begin, block.n, s.size, s.scale, Q, width);
            int seen = block.keys();
            std::fill(S, S + block.n * seen, 0.0f);
            add_product(block.n, seen, s.size, Q, width, 1, K + block.first, all, S, seen);
            float sums[QUERIES];
            for (int i = 0; i < block.n; i++) {
                float *row = S + i * seen;
                hide(s, block, i, row);
                v16 most = load<16>(row), total_{};
                for (int j = 16; j < seen; j += 16) most = most > load<16>(row + j) ? most : load<16>(row + j);
                float largest = most[0];
                for (int j = 1; j < 16; j++) largest = std::max(largest, most[j]);
                for (int j = 0; j < seen; j += 16) {
                    v16 p = exponential(load<16>(row + j) - largest);
                    total_ += p;
                    store<16>(row + j, p);
                }
                sums[i] = sum(total_);
                log_sums[((long)b * s.heads + h) * total + start + begin + i] = largest + std::log(sums[i]);
            }
            add_product(block.n, width, seen, S, seen, 1, V + (long)block.first * width, width, O, width);
            for (int i = 0; i < block.n; i++) {
                T *to = y.at(b, h, start + begin + i);
                for (int j = 0; j < s.size; j++) from_float(to + j, O[i * width + j] / sums[i]);
            }
        }
    }
}

// k_heads, v_heads: gradients of keys and values by head, float (B, heads, T, size)
template <class T>
void attention_backward(const Sizes &s, Heads<const T> q, Heads<const T> k, Heads<const T> v, Heads<const T> grad,
                        const float *log_sums, Heads<T> q_grad, float *k_heads, float *v_heads) {
    int width = s.padded(), total = s.offsets[s.samples];
#pragma omp parallel for schedule(dynamic)
    for (long item = 0; item < s.items(); item++) {
        int b = item / (s.samples * s.heads), sample = item / s.heads % s.samples, h = item % s.heads;
        int group = h / (s.heads / s.groups), start = s.offsets[sample], length = s.offsets[sample + 1] - start;
        int all = up(length, 16);
        static thread_local Zeros keys, key_rows, values, queries, grads, scores, slopes, found, key_sums, value_sums;
        float *K_t = keys.of((long)width * all), *K = key_rows.of((long)all * width), *V_t = values.of((long)width * all);
        float *P = scores.of(QUERIES * all), *D = slopes.of(QUERIES * all);
        float *dK = key_sums.of((long)all * width), *dV = value_sums.of((long)all * width);
        columns_of(k, b, group, start, length, s.size, K_t, all);
        columns_of(v, b, group, start, length, s.size, V_t, all);
        rows_of(k, b, group, start, length, s.size, 1, K, width);
        for (int begin = 0; begin < length; begin += QUERIES) {
            Block block(s, begin, length);
            int n = block.n, seen = block.keys();
            long from = (long)block.first * width;
            float *Q = queries.of(QUERIES * width), *G = grads.of(QUERIES * width), *dQ = found.of(QUERIES * width);
            rows_of(q, b, h, start + begin, n, s.size, s.scale, Q, width);
            rows_of(grad, b, h, start + begin, n, s.size, 1, G, width);
            std::fill(P, P + n * seen, 0.0f);
            std::fill(D, D + n * seen, 0.0f);
            add_product(n, seen, s.size, Q, width, 1, K_t + block.first, all, P, seen);
            add_product(n, seen, s.size, G, width, 1, V_t + block.first, all, D, seen);
            for (int i = 0; i < n; i++) {
                float *p = P + i * seen, *d = D + i * seen;
                hide(s, block, i, p);
                float log_sum = log_sums[((long)b * s.heads + h) * total + start + begin + i];
                v16 along{};
                for (int j = 0; j < seen; j += 16) {
                    v16 x = exponential(load<16>(p + j) - log_sum);
                    along += x * load<16>(d + j);
                    store<16>(p + j, x);
                }
                float mean = sum(along);
                for (int j = 0; j < seen; j += 16) store<16>(d + j, load<16>(p + j) * (load<16>(d + j) - mean));
            }
            add_product(n, width, seen, D, seen, 1, K + from, width, dQ, width);
            add_product(seen, width, n, P, 1, seen, G, width, dV + from, width);
            add_product(seen, width, n, D, 1, seen, Q, width, dK + from, width);
            for (int i = 0; i < n; i++) {
                T *to = q_grad.at(b, h, start + begin + i);
                for (int j = 0; j < s.size; j++) from_float(to + j, dQ[i * width + j] * s.scale);
            }
        }
        long place = (((long)b * s.heads + h) * total + start) * s.size;
        for (int t = 0; t < length; t++) {
            memcpy(k_heads + place + (long)t * s.size, dK + (long)t * width, s.size * sizeof(float));
            memcpy(v_heads + place + (long)t * s.size, dV + (long)t * width, s.size * sizeof(float));
        }
    }
}

// Sums over the heads of each group
template <class T> void gather(const Sizes &s, const float *by_head, Heads<T> to) {
    int total = s.offsets[s.samples], n = s.heads / s.groups;
#pragma omp parallel for
    for (long item = 0; item < (long)s.batch * s.groups * total; item++) {
        int b = item / ((long)s.groups * total), group = item / total % s.groups, t = item % total;
        const float *first = by_head + (((long)b * s.heads + group * n) * total + t) * s.size;
        T *out = to.at(b, group, t);
        for (int j = 0; j < s.size; j++) {
            float x = 0;
            for (int h = 0; h < n; h++) x += first[(long)h * total * s.size + j];
            from_float(out + j, x);
        }
    }
}

}  // namespace

#define BOTH(T, suffix)                                                                                                  \
    void attention_##suffix(const Sizes *s, const Heads<const T> *q, const Heads<const T> *k, const Heads<const T> *v,   \
                            const Heads<T> *y, float *log_sums) {                                                        \
        attention(*s, *q, *k, *v, *y, log_sums);                                                                         \
    }                                                                                                                    \
    void attention_backward_##suffix(const Sizes *s, const Heads<const T> *q, const Heads<const T> *k,                   \
                                     const Heads<const T> *v, const Heads<const T> *grad, const float *log_sums,         \
                                     const Heads<T> *q_grad, const Heads<T> *k_grad, const Heads<T> *v_grad,             \
                                     float *k_heads, float *v_heads) {                                                   \
        attention_backward(*s, *q, *k, *v, *grad, log_sums, *q_grad, k_heads, v_heads);                                  \
        gather(*s, k_heads, *k_grad);                                                                                    \
        gather(*s, v_heads, *v_grad);                                                                                    \
    }

extern "C" {
BOTH(bf16, bf16)
BOTH(float, f32)
}
