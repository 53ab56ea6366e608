// A token's step of linear recurrences, whose states are float32 and change in place: what token mixers beside
// attention decode by. lit_gpt/model/mixers/ has the equations.
#pragma once

#include <algorithm>
#include <vector>

#include "vectors.h"

enum Gate { IDENTITY, SIGMOID, SWISH };

inline float sigmoid(float x) { return 1 / (1 + std::exp(-x)); }
inline float softplus(float x) { return x > 20 ? x : std::log1p(std::exp(x)); }  // as torch has it

// What multiplies what is gated.
inline float gated_by(long kind, float x) {
    return kind == IDENTITY ? x : kind == SIGMOID ? sigmoid(x) : x * sigmoid(x);
}

// A head's state S (keys, values) becomes decay S + k u^T, and y = S^T q + skip v, where u is rate (v - erased S^T k).
struct HeadStep {
    float *state;
    long keys, values;
    const float *q, *k, *v;
    float decay, rate, erased, skip;

    void take(float *y) const {
        float seen = 0;  // of what is added, by the query
        for (long i = 0; i < keys; i++) seen += q[i] * k[i];
        long from = 0;
        from = columns<LANES, 4>(from, seen, y);
        from = columns<LANES, 1>(from, seen, y);
        columns<1, 1>(from, seen, y);
    }

  private:
    // As many tiles of VECTORS * N columns as there are from one on: one pass reads them, another, from the processor's
    // cache, writes. Returns the first column that is left.
    template <int N, int VECTORS> long columns(long from, float seen, float *y) const {
        for (; from + N * VECTORS <= values; from += N * VECTORS) {
            typedef typename Vectors<N>::floats floats;
            floats of_key[VECTORS] = {}, of_query[VECTORS] = {}, added[VECTORS];
            for (long i = 0; i < keys; i++)
                for (int j = 0; j < VECTORS; j++) {
                    floats s = load<N>(state + i * values + from + j * N);
                    of_key[j] += k[i] * s, of_query[j] += q[i] * s;
                }
            for (int j = 0; j < VECTORS; j++) {
                floats value = load<N>(v + from + j * N);
                added[j] = rate * (value - erased * of_key[j]);
                store<N>(y + from + j * N, decay * of_query[j] + seen * added[j] + skip * value);
            }
            for (long i = 0; i < keys; i++)
                for (int j = 0; j < VECTORS; j++) {
                    float *at = state + i * values + from + j * N;
                    store<N>(at, decay * load<N>(at) + k[i] * added[j]);
                }
        }
        return from;
    }
};

// x at length `length`
inline void normalize(const float *x, long n, float length, float *y) {
    float square = 0;
    for (long i = 0; i < n; i++) square += x[i] * x[i];
    float by = length / std::sqrt(square + 1e-6f);
    for (long i = 0; i < n; i++) y[i] = by * x[i];
}

// Gated delta rule: the step of a head whose queries and keys are normed.
inline void delta_rule(HeadStep step, float *y) {
    static thread_local std::vector<float> unit;
    unit.resize(2 * step.keys);
    normalize(step.q, step.keys, 1 / std::sqrt((float)step.keys), unit.data());
    normalize(step.k, step.keys, 1, unit.data() + step.keys);
    step.q = unit.data(), step.k = unit.data() + step.keys, step.erased = step.decay;
    step.take(y);
}

// Mamba's step of a channel, whose state has a decay for each key: state = exp(time A) state + time v k; returns its
// product with q.
inline float channel_step(float *state, long keys, const float *A, float time, float v, const float *q,
                          const float *k) {
    lanes found{};
    for (long i = 0; i < keys; i += LANES) {
        int count = std::min<long>(LANES, keys - i);
        lanes s = exponential(time * take(A + i, count)) * take(state + i, count) + time * v * take(k + i, count);
        put(state + i, s, count);
        found += s * take(q + i, count);
    }
    return sum(found);
}

// Convolves the channels of a span with the `last` tokens before it, which move on in `tail`; `weight`: (last + 1,
// channels), the token's own last.
template <class T>
void convolve(float *y, const float *x, T *tail, long channels, long last, const float *weight, const float *bias,
              long begin, long end) {
    for (long c = begin; c < end; c++) y[c] = (bias ? bias[c] : 0) + weight[last * channels + c] * x[c];
    for (long t = 0; t < last; t++)
        for (long c = begin; c < end; c++) y[c] += weight[t * channels + c] * to_float(tail[t * channels + c]);
    for (long t = 0; t + 1 < last; t++)
        memcpy(tail + t * channels + begin, tail + (t + 1) * channels + begin, (end - begin) * sizeof(T));
    for (long c = begin; last && c < end; c++) from_float(tail + (last - 1) * channels + c, x[c]);
}
