// The step of one more token of a few rows on a CPU: a list of operations on fixed buffers, made once by
// lit_gpt/generation/steps/tape.py and then run for each token by one call. What it costs is reading each weight once;
// so all threads stay within the call and share its stages by tape.h.
//
// Whatever lies between the operations is float32, the rows of a buffer one after the other; weights and cache are as
// they are stored. A row is computed as it would be alone but for the rounding of its products, wherever the others
// are.
#ifdef _OPENMP
#include <omp.h>
#endif

#include "activations.h"
#include "products.h"
#include "recurrent.h"
#include "tape.h"

namespace {

inline float activate(long kind, float x) {
    switch (kind) {
    case GELU: return 0.5f * x * (1 + std::erf(x * 0.70710678f));
    case GELU_TANH: return 0.5f * x * (1 + std::tanh(0.79788456f * (x + 0.044715f * x * x * x)));
    case RELU: return std::max(x, 0.0f);
    case RELU2: return std::max(x, 0.0f) * std::max(x, 0.0f);
    default: return x / (1 + std::exp(-x));
    }
}

inline void activate(long kind, float *y, const float *x, long n) {
    long i = 0;
    for (; kind == SILU && i + LANES <= n; i += LANES) {
        lanes a = load<LANES>(x + i);
        store<LANES>(y + i, a / (1.0f + exponential(-a)));
    }
    for (; i < n; i++) y[i] = activate(kind, x[i]);
}

template <class T> void add_scaled(float *y, float factor, const T *x, Span span) {
    for (long i = span.begin; i < span.end; i++) y[i] += factor * to_float(x[i]);
}

template <class T> struct Attention {
    const T *k, *v;
    long group, size, places;  // query heads that share a key, elements of a head, places that the cache has
    float scale, softcap;
    const float *slopes;

    // y (+)= gate * what a head's query finds at the places from `first` up to `end`
    void attend(float *y, const float *q, long head, long first, long end, float gate, bool adds) const {
        static thread_local std::vector<float> kept;
        long n = end - first, from = (head / group * places + first) * size;
        kept.assign((n + LANES - 1) / LANES * LANES, -INFINITY);
        float *scores = kept.data(), most = -INFINITY;
        for (long j = 0; j < n; j++) {
            scores[j] = scale * score(q, k + from + j * size);
            if (slopes) scores[j] += slopes[head] * (first + j);
            if (softcap) scores[j] = softcap * std::tanh(scores[j] / softcap);
            most = std::max(most, scores[j]);
        }
        lanes total{};
        for (long j = 0; j < n; j += LANES) {
            lanes weights = exponential(load<LANES>(scores + j) - most);
            store<LANES>(scores + j, weights);
            total += weights;
        }
        float factor = gate / sum(total);
        long d = 0;
        for (; d + LANES <= size; d += LANES)
            store<LANES>(y + d, weighted_sum(scores, v + from + d, n) * factor + (adds ? load<LANES>(y + d) : lanes{}));
        for (; d < size; d++) {
            float total = adds ? y[d] : 0;
            for (long j = 0; j < n; j++) total += factor * scores[j] * to_float(v[from + j * size + d]);
            y[d] = total;
        }
    }

    float score(const float *q, const T *key) const {
        lanes total{};
        long d = 0;
        for (; d + LANES <= size; d += LANES) total += load<LANES>(q + d) * load<LANES>(key + d);
        float product = sum<LANES>(total);
        for (; d < size; d++) product += q[d] * to_float(key[d]);
        return product;
    }

    // LANES elements of the values' sum, weighted by the scores
    lanes weighted_sum(const float *scores, const T *values, long n) const {
        lanes even{}, odd{};
        long j = 0;
        for (; j + 2 <= n; j += 2) {
            even += scores[j] * load<LANES>(values + j * size);
            odd += scores[j + 1] * load<LANES>(values + (j + 1) * size);
        }
        return j < n ? even + odd + scores[j] * load<LANES>(values + j * size) : even + odd;
    }
};

template <class T>
void append(Tape *tape, const float *qkv, long heads, long groups, long size, long layer) {
    tape->items(groups, [=](const Run &run, long row, long g) {
        const float *key = qkv + (row * (heads + 2 * groups) + heads + g) * size, *value = key + groups * size;
        long to = ((row * groups + g) * run.places + run.rows[row].position) * size;
        T *k = (T *)run.cache[2 * layer] + to, *v = (T *)run.cache[2 * layer + 1] + to;
        for (long d = 0; d < size; d++) from_float(k + d, key[d]), from_float(v + d, value[d]);
    });
}

}  // namespace

// y and x are float32 throughout, sizes in elements of a row; `type` and `format` are of Format, null is None.
extern "C" {

Tape *tape_new() { return new Tape; }
void tape_free(Tape *tape) { delete tape; }

void tape_run(Tape *tape, const Row *rows, long n, void *const *cache, long places, int threads) {
    tape->progress.restart();
#pragma omp parallel num_threads(threads)
    {
#ifdef _OPENMP
        tape->take_part({rows, n, cache, places, omp_get_num_threads()});
#else
        tape->take_part({rows, n, cache, places, 1});
#endif
    }
}

// y = factor * a row of a table, that of the token or of the position; or added to y
void tape_embed(Tape *tape, float *y, const void *table, long type, const float *scale, long size, double factor,
                long by_position) {
    tape->elements_of_rows(size, by_position, [=](const Run &run, long row, Span span) {
        long entry = by_position ? run.rows[row].position : run.rows[row].token, from = entry * size;
        float by = factor * (scale ? scale[entry] : 1), *to = y + row * size;
        for (long i = span.begin; i < span.end; i++) {
            float x = type == FLOAT32    ? ((const float *)table)[from + i]
                      : type == BFLOAT16 ? to_float(((const bf16 *)table)[from + i])
                                         : ((const int8_t *)table)[from + i];
            to[i] = by_position ? to[i] + x * by : x * by;
        }
    });
}

// y = W x + bias; `fast`: a quantized W may round x, see products.h
void tape_linear(Tape *tape, float *y, const float *x, long rows, long columns, long format, const void *w,
                 const void *scale, const void *zero, const float *pairs, const float *bias, long fast) {
    with_weight(format, w, scale, zero, pairs, fast, columns, [=](auto weight) {
        auto multiply = [=](const Run &run, Span span) {
            weight.multiply(span.begin, span.end, columns, x, run.n, y, rows);
            for (long row = 0; bias && row < run.n; row++)
                for (long r = span.begin; r < span.end; r++) y[row * rows + r] += bias[r];
        };
        tape->elements(rows, false, multiply, columns);
    });
}

// low = A x
void tape_lora_down(Tape *tape, float *low, const float *x, long ranks, long columns, const void *A, long type) {
    auto add = [=](auto *a) {
        tape->elements_of_rows(ranks, false, [=](const Run &, long row, Span span) {
            for (long r = span.begin; r < span.end; r++)
                low[row * ranks + r] = dot(a + r * columns, x + row * columns, columns);
        });
    };
    type == FLOAT32 ? add((const float *)A) : add((const bf16 *)A);
}

// y[start:stop] += B^T low[from : from + rank], of y's n elements; B: (rank, stop - start)
void tape_lora_up(Tape *tape, float *y, long n, const float *low, long ranks, long from, const void *B, long type,
                  long rank, long start, long stop) {
    auto add = [=](auto *b) {
        tape->elements_of_rows(n, true, [=](const Run &, long row, Span span) {
            Span part{std::max(start, span.begin), std::min(stop, span.end)};
            for (long j = 0; j < rank; j++)
                add_scaled(y + row * n, low[row * ranks + from + j], b + j * (stop - start) - start, part);
        });
    };
    type == FLOAT32 ? add((const float *)B) : add((const bf16 *)B);
}

// low = A x of each row's own update of a layer; low has room for so many ranks
void tape_row_lora_down(Tape *tape, float *low, const float *x, long ranks, long columns, long layer, long type) {
    auto add = [=](auto *none) {
        tape->items(ranks, [=](const Run &run, long row, long r) {
            Update update = run.rows[row].update(layer);
            if (r < update.rank)
                low[row * ranks + r] = dot((decltype(none))update.A + r * columns, x + row * columns, columns);
        });
    };
    type == FLOAT32 ? add((const float *)nullptr) : add((const bf16 *)nullptr);
}

// y += B^T low of each row's own update of a layer
void tape_row_lora_up(Tape *tape, float *y, long n, const float *low, long ranks, long layer, long type) {
    auto add = [=](auto *none) {
        tape->elements_of_rows(n, true, [=](const Run &run, long row, Span span) {
            Update update = run.rows[row].update(layer);
            for (long j = 0; j < update.rank; j++)
                add_scaled(y + row * n, low[row * ranks + j], (decltype(none))update.B + j * n, span);
        });
    };
    type == FLOAT32 ? add((const float *)nullptr) : add((const bf16 *)nullptr);
}

// y = scale * (y + shift)
void tape_scale(Tape *tape, float *y, long n, const float *scale, const float *shift) {
    tape->elements_of_rows(n, true, [=](const Run &, long row, Span span) {
        float *to = y + row * n;
        for (long i = span.begin; i < span.end; i++) to[i] = scale[i] * (to[i] + shift[i]);
    });
}

// y += factor * x
void tape_add(Tape *tape, float *y, long n, const float *x, double factor) {
    tape->elements_of_rows(n, true, [=](const Run &, long row, Span span) {
        for (long i = row * n + span.begin; i < row * n + span.end; i++) y[i] += (float)factor * x[i];
    });
}

// y = norm of each of n parts of x, which may be y; a part's weights begin `stride` after those of the one before, the
// parts of a row of x and of y `x_row` and `y_row` after those of the one before
void tape_norm(Tape *tape, float *y, long y_row, const float *x, long x_row, long n, long size, const float *weight,
               const float *bias, long stride, double eps, double offset, long centered) {
    tape->items(n, [=](const Run &, long row, long part) {
        const float *in = x + row * x_row + part * size, *w = weight ? weight + part * stride : nullptr;
        float *out = y + row * y_row + part * size, mean = 0, square = 0;
        for (long i = 0; centered && i < size; i++) mean += in[i];
        mean /= size;
        for (long i = 0; i < size; i++) square += (in[i] - mean) * (in[i] - mean);
        float by = 1 / std::sqrt(square / size + (float)eps);
        for (long i = 0; i < size; i++)
            out[i] = (in[i] - mean) * by * (w ? w[i] + (float)offset : 1) + (bias ? bias[i] : 0);
    });
}

// the position's angles, rounded to `type`; `frequencies`: n, and if there are others for long sequences n more
void tape_angles(Tape *tape, float *cosine, float *sine, const float *frequencies, long n, long kinds, double factor,
                 long type) {
    tape->items(1, [=](const Run &run, long row, long) {
        const float *of = frequencies + (kinds > 1 && run.rows[row].extended ? n : 0);
        for (long i = 0; i < n; i++) {
            float angle = run.rows[row].position * of[i],
                  values[2] = {std::cos(angle) * (float)factor, std::sin(angle) * (float)factor};
            bf16 rounded[2];
            for (int j = 0; type == BFLOAT16 && j < 2; j++)
                from_float(rounded + j, values[j]), values[j] = to_float(rounded[j]);
            cosine[row * n + i] = values[0], sine[row * n + i] = values[1];
        }
    });
}

// rotates the first n pairs of each head of x, the first of a row of x_row elements, against each other, in place
void tape_rotate(Tape *tape, float *x, long x_row, long heads, long size, const float *cosine, const float *sine,
                 long n) {
    tape->items(heads, [=](const Run &, long row, long head) {
        float *low = x + row * x_row + head * size, *high = low + n;
        const float *c = cosine + row * n, *s = sine + row * n;
        for (long i = 0; i < n; i++) {
            float turned = low[i] * c[i] - high[i] * s[i];
            high[i] = high[i] * c[i] + low[i] * s[i], low[i] = turned;
        }
    });
}

// the keys and values of qkv into the cache of a layer
void tape_append(Tape *tape, const float *qkv, long heads, long groups, long size, long layer, long type) {
    type == FLOAT32 ? append<float>(tape, qkv, heads, groups, size, layer)
                    : append<bf16>(tape, qkv, heads, groups, size, layer);
}

// y = what the queries of qkv find in the last `window` places (0: in all) of a layer's cache
void tape_attend(Tape *tape, float *y, const float *qkv, long heads, long groups, long size, long layer, long type,
                 double scale, double softcap, const float *slopes, long window) {
    auto attend = [=](auto zero) {
        using T = decltype(zero);
        tape->items(heads, [=](const Run &run, long row, long head) {
            long end = run.rows[row].position + 1, first = window ? std::max(0l, end - window) : 0;
            long from = row * groups * run.places * size;
            const T *k = (const T *)run.cache[2 * layer] + from, *v = (const T *)run.cache[2 * layer + 1] + from;
            Attention<T> attention{k, v, heads / groups, size, run.places, (float)scale, (float)softcap, slopes};
            attention.attend(y + (row * heads + head) * size, qkv + (row * (heads + 2 * groups) + head) * size, head,
                             first, end, 1, false);
        });
    };
    type == FLOAT32 ? attend(0.0f) : attend(bf16{});
}

// y += gate * what they find in the `length` places of keys and values that are there for all, float32
void tape_attend_prefix(Tape *tape, float *y, const float *qkv, long heads, long groups, long size, const float *k,
                        const float *v, long length, double scale, double softcap, const float *gate) {
    Attention<float> attention{k, v, heads / groups, size, length, (float)scale, (float)softcap, nullptr};
    tape->items(heads, [=](const Run &, long row, long head) {
        attention.attend(y + (row * heads + head) * size, qkv + (row * (heads + 2 * groups) + head) * size, head, 0,
                         length, gate[head], true);
    });
}

void tape_activate(Tape *tape, float *y, long n, long kind) {
    tape->elements_of_rows(n, true, [=](const Run &, long row, Span span) {
        float *from = y + row * n + span.begin;
        activate(kind, from, from, span.end - span.begin);
    });
}

// y = activation(gate) * up; the gate's n elements are followed by those of up
void tape_gate(Tape *tape, float *y, const float *gate_up, long n, long kind) {
    tape->elements_of_rows(n, false, [=](const Run &, long row, Span span) {
        const float *gate = gate_up + 2 * row * n, *up = gate + n;
        float *to = y + row * n;
        activate(kind, to + span.begin, gate + span.begin, span.end - span.begin);
        for (long i = span.begin; i < span.end; i++) to[i] *= up[i];
    });
}

// y = the first n elements of each row of x
void tape_part(Tape *tape, float *y, long n, const float *x, long x_row) {
    tape->elements_of_rows(n, false, [=](const Run &, long row, Span span) {
        memcpy(y + row * n + span.begin, x + row * x_row + span.begin, 4 * (span.end - span.begin));
    });
}

// y = x, of n elements in a row of x_row, times a function of `by`, that of a Gate
void tape_multiply(Tape *tape, float *y, long n, const float *x, long x_row, const float *by, long by_row, long gate) {
    tape->elements_of_rows(n, x == y, [=](const Run &, long row, Span span) {
        for (long i = span.begin; i < span.end; i++)
            y[row * n + i] = x[row * x_row + i] * gated_by(gate, by[row * by_row + i]);
    });
}

// y = a causal convolution of each of x's channels over `size` tokens, of which a layer's cache has those before;
// weight: (size, channels)
void tape_convolve(Tape *tape, float *y, const float *x, long x_row, long channels, long size, const float *weight,
                   const float *bias, long layer, long type) {
    auto add = [=](auto zero) {
        using T = decltype(zero);
        tape->elements_of_rows(channels, false, [=](const Run &run, long row, Span span) {
            T *tail = (T *)run.cache[2 * layer + 1] + row * (size - 1) * channels;
            convolve(y + row * channels, x + row * x_row, tail, channels, size - 1, weight, bias, span.begin, span.end);
        });
    };
    type == FLOAT32 ? add(0.0f) : add(bf16{});
}

// y = what the heads of a gated delta net find: of a row of `row` elements q, k (groups, keys) and v (heads, values),
// of one of `gates_row` each head's rate and decay before their functions; A: (heads), positive
void tape_delta_rule(Tape *tape, float *y, const float *q, const float *k, const float *v, long row, long heads,
                     long groups, long keys, long values, const float *rate, const float *decay, long gates_row,
                     const float *A, const float *bias, long layer) {
    tape->items(heads, [=](const Run &run, long r, long head) {
        float *state = (float *)run.cache[2 * layer] + (r * heads + head) * keys * values;
        long at = r * gates_row + head, key = r * row + head / (heads / groups) * keys, value = head * values;
        float a = std::exp(-A[head] * softplus(decay[at] + bias[head]));
        HeadStep step{state, keys, values, q + key, k + key, v + r * row + value, a, sigmoid(rate[at]), 0, 0};
        delta_rule(step, y + r * heads * values + value);
    });
}

// y = what Mamba-2's heads find; like delta_rule, but for a time step before its function, that is no shorter than
// `shortest`, and what D adds of the values
void tape_state_space(Tape *tape, float *y, const float *q, const float *k, const float *v, long row, long heads,
                      long groups, long keys, long values, const float *time, long time_row, const float *A,
                      const float *bias, double shortest, const float *D, long layer) {
    tape->items(heads, [=](const Run &run, long r, long head) {
        float *state = (float *)run.cache[2 * layer] + (r * heads + head) * keys * values;
        long key = r * row + head / (heads / groups) * keys, value = head * values;
        float t = std::max((float)shortest, softplus(time[r * time_row + head] + bias[head]));
        HeadStep step{state, keys, values, q + key, k + key, v + r * row + value, std::exp(-A[head] * t),
                      t,     0,    D[head]};
        step.take(y + r * heads * values + value);
    });
}

// y = what Mamba's channels find of their values v and time steps, which are before softplus; A: (channels, keys),
// negative
void tape_selective_scan(Tape *tape, float *y, const float *q, const float *k, long row, long channels, long keys,
                         const float *v, const float *time, const float *A, const float *D, long layer) {
    tape->elements_of_rows(channels, false, [=](const Run &run, long r, Span span) {
        float *state = (float *)run.cache[2 * layer] + r * channels * keys;
        for (long c = span.begin; c < span.end; c++) {
            long at = r * channels + c;
            y[at] = D[c] * v[at] + channel_step(state + c * keys, keys, A + c * keys, softplus(time[at]), v[at],
                                                q + r * row, k + r * row);
        }
    });
}

// logits from what the head gives
void tape_finish(Tape *tape, float *y, long n, double divisor, double softcap) {
    tape->elements_of_rows(n, true, [=](const Run &, long row, Span span) {
        for (long i = row * n + span.begin; i < row * n + span.end; i++) {
            y[i] /= (float)divisor;
            if (softcap) y[i] = (float)softcap * std::tanh(y[i] / (float)softcap);
        }
    });
}
}
