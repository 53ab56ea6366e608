// Elementwise parts of a model, forward and backward: RMSNorm, gated activations, rotary embedding, the short causal
// convolution of each channel, cross-entropy.
// Each reads and writes its tensors once. The formulas are those of lit_gpt/kernels/functional.py.
#include <vector>

#include "activations.h"
#include "vectors.h"

namespace {

// Calls f(first, count) for the vectors of a row, the last of which may be short; f must take any count up to LANES.
template <class F> inline void each(int size, F f) {
    for (int i = 0; i < size; i += LANES) f(i, size - i < LANES ? size - i : LANES);
}

template <class T>
void rms_norm(long rows, int size, const T *x, const T *weight, float eps, float offset, T *y, float *inverse) {
#pragma omp parallel for
    for (long r = 0; r < rows; r++) {
        const T *in = x + r * size;
        lanes squares{};
        each(size, [&](int i, int n) {
            lanes a = take(in + i, n);
            squares += a * a;
        });
        float factor = inverse[r] = 1 / std::sqrt(sum(squares) / size + eps);
        each(size, [&](int i, int n) {
            lanes a = take(in + i, n) * factor, w = take(weight + i, n);
            put(y + r * size + i, offset ? a * (w + offset) : rounded<T>(a) * w, n);
        });
    }
}

template <class T>
void rms_norm_backward(long rows, int size, const T *grad, const T *x, const T *weight, const float *inverse,
                       float offset, T *x_grad) {
#pragma omp parallel for
    for (long r = 0; r < rows; r++) {
        const T *g = grad + r * size, *in = x + r * size;
        float factor = inverse[r];
        lanes dots{};
        each(size, [&](int i, int n) { dots += take(g + i, n) * (take(weight + i, n) + offset) * take(in + i, n); });
        float along = sum(dots) * factor * factor / size;
        each(size, [&](int i, int n) {
            put(x_grad + r * size + i,
                (take(g + i, n) * (take(weight + i, n) + offset) - take(in + i, n) * along) * factor, n);
        });
    }
}

// the activation and its derivative
inline lanes activate(int kind, lanes x, lanes *slope) {
    if (kind == SILU) {
        lanes gate = 1.0f / (1.0f + exponential(-x));
        *slope = gate * (1.0f + x * (1.0f - gate));
        return x * gate;
    }
    const float a = 0.7978845608f, b = 0.044715f;
    lanes inner = a * (x + b * x * x * x);
    lanes tanh = 1.0f - 2.0f / (1.0f + exponential(2.0f * inner));
    *slope = 0.5f * (1.0f + tanh) + 0.5f * x * (1.0f - tanh * tanh) * a * (1.0f + 3.0f * b * x * x);
    return 0.5f * x * (1.0f + tanh);
}

template <class T> void gated(long rows, int size, int kind, const T *gate_up, T *y) {
#pragma omp parallel for
    for (long r = 0; r < rows; r++) {
        const T *gate = gate_up + 2 * r * size, *up = gate + size;
        each(size, [&](int i, int n) {
            lanes slope;
            put(y + r * size + i, activate(kind, take(gate + i, n), &slope) * take(up + i, n), n);
        });
    }
}

template <class T> void gated_backward(long rows, int size, int kind, const T *grad, const T *gate_up, T *x_grad) {
#pragma omp parallel for
    for (long r = 0; r < rows; r++) {
        const T *gate = gate_up + 2 * r * size, *up = gate + size, *g = grad + r * size;
        T *out = x_grad + 2 * r * size;
        each(size, [&](int i, int n) {
            lanes slope, above = take(g + i, n), active = activate(kind, take(gate + i, n), &slope);
            put(out + i, above * take(up + i, n) * slope, n);
            put(out + size + i, above * active, n);
        });
    }
}

// The angles' (positions, 2 * half) first halves hold what both have; sign -1 turns back.
template <class T>
void rotate(long rows, int heads, int rotated, int size, int half, const T *x, const T *cos, const T *sin, float sign,
            T *y) {
#pragma omp parallel for
    for (long r = 0; r < rows; r++) {
        const T *c = cos + r * 2 * half, *s = sin + r * 2 * half;
        for (int h = 0; h < rotated; h++) {
            const T *in = x + (r * heads + h) * size;
            T *out = y + (r * heads + h) * size;
            each(half, [&](int i, int n) {
                lanes low = take(in + i, n), high = take(in + half + i, n), co = take(c + i, n),
                      si = take(s + i, n) * sign;
                put(out + i, low * co - high * si, n);
                put(out + half + i, high * co + low * si, n);
            });
            memcpy(out + 2 * half, in + 2 * half, (size - 2 * half) * sizeof(T));
        }
        long rest = (r * heads + rotated) * size;
        memcpy(y + rest, x + rest, (heads - rotated) * size * sizeof(T));
    }
}

// Samples of `length` tokens and the size - 1 tokens before them; `positions` within what is packed, or null.
template <class T> struct Tokens {
    long length;
    int channels, size;
    const T *x;
    long x_row;
    const T *tail;
    const long *positions;

    const T *before(long r, int back) const {
        long b = r / length, t = r % length - back;
        return t >= 0 ? x + (r - back) * x_row : tail + ((b + 1) * (size - 1) + t) * channels;
    }
    // how many tokens before it a token sees
    int seen(long r) const { return positions && positions[r % length] < size - 1 ? positions[r % length] : size - 1; }
};

template <class T>
void convolve(long rows, const Tokens<T> &tokens, const float *weight, const float *bias, T *y) {
    int channels = tokens.channels;
#pragma omp parallel for
    for (long r = 0; r < rows; r++) {
        int seen = tokens.seen(r);
        each(channels, [&](int i, int n) {
            lanes total = bias ? take(bias + i, n) : lanes{};
            for (int back = 0; back <= seen; back++)
                total += take(tokens.before(r, back) + i, n) * take(weight + back * channels + i, n);
            put(y + r * channels + i, total, n);
        });
    }
}

// The weight's gradients of `blocks` equal parts of the rows are kept apart, so that no thread waits for another and
// their sum does not depend on how many there are.
template <class T>
void convolve_backward(long rows, const Tokens<T> &tokens, const float *weight, const T *grad, int blocks, T *x_grad,
                       float *weight_grads) {
    int channels = tokens.channels, size = tokens.size;
#pragma omp parallel for
    for (long r = 0; r < rows; r++) {
        long left = tokens.length - 1 - r % tokens.length;
        each(channels, [&](int i, int n) {
            lanes total{};
            for (int back = 0; back < size && back <= left; back++)
                if (back <= tokens.seen(r + back))
                    total += take(grad + (r + back) * channels + i, n) * take(weight + back * channels + i, n);
            put(x_grad + r * channels + i, total, n);
        });
    }
#pragma omp parallel for
    for (int block = 0; block < blocks; block++) {
        float *sums = weight_grads + (long)block * size * channels;
        memset(sums, 0, (long)size * channels * 4);
        for (long r = rows * block / blocks; r < rows * (block + 1) / blocks; r++) {
            int seen = tokens.seen(r);
            each(channels, [&](int i, int n) {
                lanes above = take(grad + r * channels + i, n);
                for (int back = 0; back <= seen; back++) {
                    float *to = sums + back * channels + i;
                    put(to, take(to, n) + above * take(tokens.before(r, back) + i, n), n);
                }
            });
        }
    }
}

// The cross-entropy of each row, whose logits become its gradient.
template <class T> void cross_entropy(long rows, int size, T *logits, const long *labels, float *losses) {
#pragma omp parallel for
    for (long r = 0; r < rows; r++) {
        static thread_local std::vector<float> kept;
        kept.assign((size + LANES - 1) / LANES * LANES, -1e30f);
        T *row = logits + r * size;
        float *p = kept.data(), label = to_float(row[labels[r]]), most = -INFINITY;
        each(size, [&](int i, int n) { put(p + i, take(row + i, n), n); });
        lanes highest = load<LANES>(p), total{};
        each(size, [&](int i, int) { highest = highest > load<LANES>(p + i) ? highest : load<LANES>(p + i); });
        for (int i = 0; i < LANES; i++) most = highest[i] > most ? highest[i] : most;
        each(size, [&](int i, int) {
            lanes x = exponential(load<LANES>(p + i) - most);
            total += x;
            store<LANES>(p + i, x);
        });
        float sum_of_all = sum(total), factor = 1 / sum_of_all;
        losses[r] = std::log(sum_of_all) + (most - label);
        float at_label = p[labels[r]] * factor - 1;
        each(size, [&](int i, int n) { put(row + i, load<LANES>(p + i) * factor, n); });
        from_float(row + labels[r], at_label);
    }
}

}  // namespace

#define BOTH(T, suffix)                                                                                            \
    void rms_norm_##suffix(long rows, int size, const T *x, const T *w, float eps, float offset, T *y,             \
                           float *inverse) {                                                                       \
        rms_norm(rows, size, x, w, eps, offset, y, inverse);                                                       \
    }                                                                                                              \
    void rms_norm_backward_##suffix(long rows, int size, const T *g, const T *x, const T *w, const float *inverse, \
                                    float offset, T *x_grad) {                                                     \
        rms_norm_backward(rows, size, g, x, w, inverse, offset, x_grad);                                           \
    }                                                                                                              \
    void gated_##suffix(long rows, int size, int kind, const T *x, T *y) { gated(rows, size, kind, x, y); }        \
    void gated_backward_##suffix(long rows, int size, int kind, const T *g, const T *x, T *x_grad) {               \
        gated_backward(rows, size, kind, g, x, x_grad);                                                            \
    }                                                                                                              \
    void rotate_##suffix(long rows, int heads, int rotated, int size, int half, const T *x, const T *cos,          \
                         const T *sin, float sign, T *y) {                                                         \
        rotate(rows, heads, rotated, size, half, x, cos, sin, sign, y);                                            \
    }                                                                                                              \
    void convolve_##suffix(long rows, long length, int channels, int size, const T *x, long x_row, const T *tail,  \
                           const long *positions, const float *w, const float *bias, T *y) {                       \
        convolve<T>(rows, {length, channels, size, x, x_row, tail, positions}, w, bias, y);                        \
    }                                                                                                              \
    void convolve_backward_##suffix(long rows, long length, int channels, int size, const T *x, long x_row,        \
                                    const T *tail, const long *positions, const float *w, const T *g, int blocks,  \
                                    T *x_grad, float *w_grads) {                                                   \
        convolve_backward<T>(rows, {length, channels, size, x, x_row, tail, positions}, w, g, blocks, x_grad,      \
                             w_grads);                                                                             \
    }                                                                                                              \
    void cross_entropy_##suffix(long rows, int size, T *logits, const long *labels, float *losses) {               \
        cross_entropy(rows, size, logits, labels, losses);                                                         \
    }

extern "C" {
BOTH(bf16, bf16)
BOTH(float, f32)
}
