// The step of one token of one row on a CPU: a list of operations on fixed buffers, made once by lit_gpt/decoding.py and
// then run for each token by one call. What it costs is reading each weight once; so all threads stay within the call,
// and wait for each other between operations by watching a number.
//
// Whatever lies between the operations is float32; weights and cache are as they are stored.
#ifdef _OPENMP
#include <omp.h>
#endif

#include <algorithm>
#include <atomic>
#include <functional>
#include <thread>
#include <vector>

#include "vectors.h"

namespace {

struct Span {
    long begin, end;
};

struct Run {
    long token, position;
    int thread, threads;

    // This thread's share of n items, in multiples of `grain`.
    Span share(long n, long grain) const {
        long each = (n + threads * grain - 1) / (threads * grain) * grain;
        return {std::min(n, thread * each), std::min(n, (thread + 1) * each)};
    }
};

struct Operation {
    std::function<void(const Run &)> call;
    bool waits;  // for what the other threads did before
};

struct Tape {
    std::vector<Operation> operations;
    long shared = 0;  // elements that the last operation shared out among the threads, if those were elements
    std::atomic<int> arrived{0}, round{0};

    // An operation on n elements; `follows`: of what other operations made it reads only its own share of n elements.
    template <class F> void elements(long n, bool follows, F f) {
        operations.push_back({[=](const Run &run) { f(run, run.share(n, 16)); }, !(follows && n == shared)});
        shared = n;
    }

    // An operation on n larger things.
    template <class F> void items(long n, F f) {
        operations.push_back({[=](const Run &run) { f(run, run.share(n, 1)); }, true});
        shared = 0;
    }

    void wait(int threads) {
        int before = round.load(std::memory_order_acquire);
        if (arrived.fetch_add(1, std::memory_order_acq_rel) + 1 == threads) {
            arrived.store(0, std::memory_order_relaxed);
            round.store(before + 1, std::memory_order_release);
        } else {
            for (int i = 0; round.load(std::memory_order_acquire) == before; i++)
                if (i > 10000) std::this_thread::yield();  // somebody else needs the core
        }
    }
};

enum Format { FLOAT32, BFLOAT16, INT8, NIBBLES_FLOAT32, NIBBLES_BFLOAT16 };

inline float to_float(int8_t x) { return x; }
using ::to_float;

// One row at a time, as a plain loop: the processor reads ahead of one stream better than of several. Written by
// hand for int8 it takes two thirds of the time from a cache, and a quarter more from memory.
template <class T> inline float dot(const T *w, const float *x, long n) {
    float total = 0;
    for (long k = 0; k < n; k++) total += to_float(w[k]) * x[k];
    return total;
}

// Weights of 4 bits: w = scale * values[code] (+ zero), with a scale for each 64 of a row; two codes a byte, the first in
// the upper half.
template <class S> struct Nibbles {
    const uint8_t *codes;
    const S *scale, *zero;
    v16 values;
    long groups;
    typedef Vectors<16>::words words;

    // x in the order in which `row` meets the codes, then the sums of its groups.
    const float *order(const float *x, long columns) const {
        static thread_local std::vector<float> kept;
        long blocks = (groups + 1) / 2;
        kept.assign(128 * blocks + groups, 0);
        float *found = kept.data(), *sums = found + 128 * blocks, padded[128] = {};
        for (long b = 0; b < blocks; b++) {
            const float *from = x + 128 * b;
            if (long left = columns - 128 * b; left < 128) from = (const float *)memcpy(padded, from, 4 * left);
            for (int word = 0; word < 16; word++)
                for (int i = 0; i < 8; i++) found[128 * b + (i ^ 1) * 16 + word] = from[8 * word + i];
        }
        for (long g = 0; zero && g < groups; g++)
            for (int i = 0; i < 64; i++) sums[g] += found[g / 2 * 128 + i / 8 * 16 + g % 2 * 8 + i % 8];
        return found;
    }

    float row(long r, const float *x) const {
        const uint8_t *w = codes + r * groups * 32;
        const S *by = scale + r * groups;
        v16 total{};
        for (long g = 0; g < groups; g += 2, w += 64, x += 128) {
            bool both = g + 1 < groups;
            words c{};
            both ? memcpy(&c, w, 64) : memcpy(&c, w, 32);
            v16 even{}, odd{};
            for (int s = 0; s < 8; s += 2) {
                even += look_up(c >> (4 * s)) * load<16>(x + 16 * s);
                odd += look_up(c >> (4 * s + 4)) * load<16>(x + 16 * s + 16);
            }
            float a = to_float(by[g]), b = both ? to_float(by[g + 1]) : 0;
            total += (even + odd) * v16{a, a, a, a, a, a, a, a, b, b, b, b, b, b, b, b};
        }
        return sum(total) + (zero ? dot(zero + r * groups, x, groups) : 0);
    }

    // the values of the codes in the lowest bits
    v16 look_up(words c) const {
#ifdef __clang__
        v16 found;
        for (int i = 0; i < 16; i++) found[i] = values[c[i] & 15];
        return found;
#else
        return __builtin_shuffle(values, c);
#endif
    }
};

template <class Row> void product(Tape *tape, float *y, long rows, const float *bias, Row row) {
    tape->elements(rows, false, [=](const Run &, Span span) {
        auto product_with = row();
        for (long r = span.begin; r < span.end; r++) y[r] = product_with(r) + (bias ? bias[r] : 0);
    });
}

template <class T> void plain(Tape *tape, float *y, const float *x, long rows, long columns, const void *w, const float *bias) {
    auto weight = (const T *)w;
    product(tape, y, rows, bias, [=] { return [=](long r) { return dot(weight + r * columns, x, columns); }; });
}

template <class S>
void nibbles(Tape *tape, float *y, const float *x, long rows, long columns, const Nibbles<S> &weight, const float *bias) {
    product(tape, y, rows, bias, [=] {
        return [ordered = weight.order(x, columns), weight](long r) { return weight.row(r, ordered); };
    });
}

enum Activation { GELU, GELU_TANH, RELU, SILU };

inline float activate(long kind, float x) {
    switch (kind) {
    case GELU: return 0.5f * x * (1 + std::erf(x * 0.70710678f));
    case GELU_TANH: return 0.5f * x * (1 + std::tanh(0.79788456f * (x + 0.044715f * x * x * x)));
    case RELU: return std::max(x, 0.0f);
    default: return x / (1 + std::exp(-x));
    }
}

inline void activate(long kind, float *y, const float *x, long n) {
    long i = 0;
    for (; kind == SILU && i + 16 <= n; i += 16) {
        v16 a = load<16>(x + i);
        store<16>(y + i, a / (1.0f + exponential(-a)));
    }
    for (; i < n; i++) y[i] = activate(kind, x[i]);
}

template <class T> struct Attention {
    const T *k, *v;
    long group, size, places;  // query heads that share a key, elements of a head, places that the cache has
    float scale, softcap;
    const float *slopes;

    // y (+)= gate * what a head's query finds at the places from `first` up to `end`
    void find(float *y, const float *q, long head, long first, long end, float gate, bool adds) const {
        static thread_local std::vector<float> kept;
        long n = end - first, from = (head / group * places + first) * size;
        kept.assign((n + 15) / 16 * 16, -INFINITY);
        float *scores = kept.data(), most = -INFINITY;
        for (long j = 0; j < n; j++) {
            scores[j] = scale * score(q, k + from + j * size);
            if (slopes) scores[j] += slopes[head] * (first + j);
            if (softcap) scores[j] = softcap * std::tanh(scores[j] / softcap);
            most = std::max(most, scores[j]);
        }
        v16 total{};
        for (long j = 0; j < n; j += 16) {
            v16 weights = exponential(load<16>(scores + j) - most);
            store<16>(scores + j, weights);
            total += weights;
        }
        float factor = gate / sum(total);
        long d = 0;
        for (; d + 16 <= size; d += 16) store<16>(y + d, weigh(scores, v + from + d, n) * factor + (adds ? load<16>(y + d) : v16{}));
        for (; d < size; d++) {
            float found = adds ? y[d] : 0;
            for (long j = 0; j < n; j++) found += factor * scores[j] * to_float(v[from + j * size + d]);
            y[d] = found;
        }
    }

    float score(const float *q, const T *key) const {
        v16 total{};
        long d = 0;
        for (; d + 16 <= size; d += 16) total += load<16>(q + d) * load<16>(key + d);
        float found = sum(total);
        for (; d < size; d++) found += q[d] * to_float(key[d]);
        return found;
    }

    // of 16 elements
    v16 weigh(const float *scores, const T *values, long n) const {
        v16 even{}, odd{};
        long j = 0;
        for (; j + 2 <= n; j += 2) {
            even += scores[j] * load<16>(values + j * size);
            odd += scores[j + 1] * load<16>(values + (j + 1) * size);
        }
        return j < n ? even + odd + scores[j] * load<16>(values + j * size) : even + odd;
    }
};

template <class T>
void append(Tape *tape, float *qkv, long heads, long groups, long size, T *k, T *v, long places) {
    tape->items(groups, [=](const Run &run, Span span) {
        for (long g = span.begin; g < span.end; g++) {
            const float *key = qkv + (heads + g) * size, *value = key + groups * size;
            long to = (g * places + run.position) * size;
            for (long d = 0; d < size; d++) from_float(k + to + d, key[d]), from_float(v + to + d, value[d]);
        }
    });
}

template <class T>
void attention(Tape *tape, float *y, const float *q, long heads, Attention<T> attention, long window, long length, const float *gate) {
    long size = attention.size;
    tape->items(heads, [=](const Run &run, Span span) {
        long end = length ? length : run.position + 1, first = window ? std::max(0l, end - window) : 0;
        for (long h = span.begin; h < span.end; h++)
            attention.find(y + h * size, q + h * size, h, first, end, gate ? gate[h] : 1, gate);
    });
}

}  // namespace

// y and x are float32 throughout, sizes in elements; `type` and `format` are of Format, null is None.
extern "C" {

Tape *tape_new() { return new Tape; }
void tape_free(Tape *tape) { delete tape; }

void tape_run(Tape *tape, long token, long position, int threads) {
#pragma omp parallel num_threads(threads)
    {
#ifdef _OPENMP
        Run run{token, position, omp_get_thread_num(), omp_get_num_threads()};
#else
        Run run{token, position, 0, 1};
#endif
        for (auto &operation : tape->operations) {
            if (operation.waits) tape->wait(run.threads);
            operation.call(run);
        }
    }
}

// y = factor * a row of a table, that of the token or of the position; or added to y
void tape_embed(Tape *tape, float *y, const void *table, long type, const float *scale, long size, double factor, long by_position) {
    tape->elements(size, by_position, [=](const Run &run, Span span) {
        long row = by_position ? run.position : run.token, from = row * size;
        float by = factor * (scale ? scale[row] : 1);
        for (long i = span.begin; i < span.end; i++) {
            float x = type == FLOAT32 ? ((const float *)table)[from + i]
                      : type == BFLOAT16 ? to_float(((const bf16 *)table)[from + i]) : ((const int8_t *)table)[from + i];
            y[i] = by_position ? y[i] + x * by : x * by;
        }
    });
}

// y = W x + bias
void tape_linear(Tape *tape, float *y, const float *x, long rows, long columns, long format, const void *w, const void *scale, const void *zero, const float *values, const float *bias) {
    switch (format) {
    case FLOAT32: return plain<float>(tape, y, x, rows, columns, w, bias);
    case BFLOAT16: return plain<bf16>(tape, y, x, rows, columns, w, bias);
    case INT8: {
        auto codes = (const int8_t *)w;
        auto by = (const float *)scale;
        return product(tape, y, rows, bias, [=] { return [=](long r) { return by[r] * dot(codes + r * columns, x, columns); }; });
    }
    case NIBBLES_FLOAT32: return nibbles(tape, y, x, rows, columns, Nibbles<float>{(const uint8_t *)w, (const float *)scale, (const float *)zero, load<16>(values), (columns + 63) / 64}, bias);
    case NIBBLES_BFLOAT16: return nibbles(tape, y, x, rows, columns, Nibbles<bf16>{(const uint8_t *)w, (const bf16 *)scale, (const bf16 *)zero, load<16>(values), (columns + 63) / 64}, bias);
    }
}

// y[start:stop] += B^T low, of y's n elements; B: (rank, stop - start)
void tape_update(Tape *tape, float *y, long n, const float *low, const void *B, long type, long rank, long start, long stop) {
    auto add = [=](auto *b) {
        tape->elements(n, true, [=](const Run &, Span span) {
            for (long j = 0; j < rank; j++)
                for (long i = std::max(start, span.begin); i < std::min(stop, span.end); i++)
                    y[i] += low[j] * to_float(b[j * (stop - start) + i - start]);
        });
    };
    type == FLOAT32 ? add((const float *)B) : add((const bf16 *)B);
}

// y = scale * (y + shift)
void tape_scale(Tape *tape, float *y, long n, const float *scale, const float *shift) {
    tape->elements(n, true, [=](const Run &, Span span) {
        for (long i = span.begin; i < span.end; i++) y[i] = scale[i] * (y[i] + shift[i]);
    });
}

// y += factor * x
void tape_add(Tape *tape, float *y, long n, const float *x, double factor) {
    tape->elements(n, true, [=](const Run &, Span span) {
        for (long i = span.begin; i < span.end; i++) y[i] += (float)factor * x[i];
    });
}

// y = norm of each of n rows of x, which may be y; a row's weights begin `stride` after those of the one before
void tape_norm(Tape *tape, float *y, const float *x, long n, long size, const float *weight, const float *bias, long stride, double eps, double offset, long centered) {
    tape->items(n, [=](const Run &, Span span) {
        for (long r = span.begin; r < span.end; r++) {
            const float *in = x + r * size, *w = weight ? weight + r * stride : nullptr;
            float mean = 0, square = 0;
            for (long i = 0; centered && i < size; i++) mean += in[i];
            mean /= size;
            for (long i = 0; i < size; i++) square += (in[i] - mean) * (in[i] - mean);
            float by = 1 / std::sqrt(square / size + (float)eps);
            for (long i = 0; i < size; i++)
                y[r * size + i] = (in[i] - mean) * by * (w ? w[i] + (float)offset : 1) + (bias ? bias[i] : 0);
        }
    });
}

// the position's angles, rounded to `type`
void tape_angles(Tape *tape, float *cosine, float *sine, const float *frequencies, long n, double factor, long type) {
    tape->items(1, [=](const Run &run, Span span) {
        for (long i = 0; span.begin < span.end && i < n; i++) {
            float angle = run.position * frequencies[i], found[2] = {std::cos(angle) * (float)factor, std::sin(angle) * (float)factor};
            bf16 rounded[2];
            for (int j = 0; type == BFLOAT16 && j < 2; j++) from_float(rounded + j, found[j]), found[j] = to_float(rounded[j]);
            cosine[i] = found[0], sine[i] = found[1];
        }
    });
}

// rotates the first n pairs of each head of x against each other, in place
void tape_rotate(Tape *tape, float *x, long heads, long size, const float *cosine, const float *sine, long n) {
    tape->items(heads, [=](const Run &, Span span) {
        for (long h = span.begin; h < span.end; h++) {
            float *low = x + h * size, *high = low + n;
            for (long i = 0; i < n; i++) {
                float turned = low[i] * cosine[i] - high[i] * sine[i];
                high[i] = high[i] * cosine[i] + low[i] * sine[i], low[i] = turned;
            }
        }
    });
}

// the keys and values of qkv into the cache, k and v: (groups, places, size)
void tape_append(Tape *tape, float *qkv, long heads, long groups, long size, void *k, void *v, long places, long type) {
    type == FLOAT32 ? append(tape, qkv, heads, groups, size, (float *)k, (float *)v, places)
                    : append(tape, qkv, heads, groups, size, (bf16 *)k, (bf16 *)v, places);
}

// y = what the queries find in the last `window` places (0: in all), or with `length` y += gate * what they find in so many
void tape_attend(Tape *tape, float *y, const float *q, long heads, long groups, long size, const void *k, const void *v, long places, long type, double scale, double softcap, const float *slopes, long window, long length, const float *gate) {
    auto add = [=](auto *keys, auto *values) {
        using T = std::remove_const_t<std::remove_pointer_t<decltype(keys)>>;
        attention(tape, y, q, heads, Attention<T>{keys, values, heads / groups, size, places, (float)scale, (float)softcap, slopes}, window, length, gate);
    };
    type == FLOAT32 ? add((const float *)k, (const float *)v) : add((const bf16 *)k, (const bf16 *)v);
}

void tape_activate(Tape *tape, float *y, long n, long kind) {
    tape->elements(n, true, [=](const Run &, Span span) {
        activate(kind, y + span.begin, y + span.begin, span.end - span.begin);
    });
}

// y = activation(gate) * up; the gate's n elements are followed by those of up
void tape_gate(Tape *tape, float *y, const float *gate_up, long n, long kind) {
    tape->elements(n, false, [=](const Run &, Span span) {
        activate(kind, y + span.begin, gate_up + span.begin, span.end - span.begin);
        for (long i = span.begin; i < span.end; i++) y[i] *= gate_up[n + i];
    });
}

// logits from what the head gives
void tape_finish(Tape *tape, float *y, long n, double divisor, double softcap) {
    tape->elements(n, true, [=](const Run &, Span span) {
        for (long i = span.begin; i < span.end; i++) {
            y[i] /= (float)divisor;
            if (softcap) y[i] = (float)softcap * std::tanh(y[i] / (float)softcap);
        }
    });
}
}
