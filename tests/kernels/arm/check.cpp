// Holds the kernels of lit_gpt/kernels/cpp against formulas in float64, without torch: linked with them for another
// processor, it runs in an emulator. Prints a line for each kernel, and ends with 1 if one is off.
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <functional>
#include <string>
#include <vector>

#include "attention.h"
#include "tape.h"

typedef std::vector<double> Numbers;
struct bf16 {
    uint16_t bits;
};

#define BOTH(name, ...) void name##_f32(__VA_ARGS__), name##_bf16(__VA_ARGS__);
extern "C" {
BOTH(rms_norm, long, int, const void *, const void *, float, float, void *, float *)
BOTH(rms_norm_backward, long, int, const void *, const void *, const void *, const float *, float, void *)
BOTH(gated, long, int, int, const void *, void *)
BOTH(rotate, long, int, int, int, int, const void *, const void *, const void *, float, void *)
BOTH(cross_entropy, long, int, void *, const long *, float *)
BOTH(lora, long, int, const void *, const float *, const float *, int, float, const uint64_t *, uint32_t, int, int,
     const int *, const int *, float *, void *, int)
BOTH(attention, const void *, const void *, const void *, const void *, const void *, float *)
BOTH(dequantize, long, const void *, const void *, const void *, const float *, long, long, void *)
void *tape_new();
void tape_linear(void *, float *, const float *, long, long, long, const void *, const void *, const void *,
                 const float *, const float *, long);
void tape_run(void *, const void *, long, void *const *, long, int);
}

int failures = 0;
uint32_t state = 1;

double drawn() {  // from -1 to 1 (Numerical Recipes' generator)
    state = state * 1664525 + 1013904223;
    return (int32_t)state / 2147483648.0;
}

// Numbers as a kernel has them, and as float64.
template <class T> struct Tensor {
    std::vector<T> data;

    explicit Tensor(long n) : data(n) {
        for (long i = 0; i < n; i++) set(i, drawn());
    }
    void set(long i, float x) {
        if constexpr (sizeof(T) == 4)
            data[i] = x;
        else {
            uint32_t bits;
            memcpy(&bits, &x, 4);
            data[i].bits = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
        }
    }
    double operator[](long i) const {
        if constexpr (sizeof(T) == 4) return data[i];
        uint32_t bits = 0;
        memcpy((char *)&bits + 2, &data[i], 2);
        float x;
        memcpy(&x, &bits, 4);
        return x;
    }
    T *ptr() { return data.data(); }
};

template <class Y> void hold(const std::string &name, const Y &y, const Numbers &expected, double limit) {
    double off = 0, norm = 0;
    for (size_t i = 0; i < expected.size(); i++)
        off += std::pow(y[i] - expected[i], 2), norm += expected[i] * expected[i];
    double relative = std::sqrt(off / norm);
    bool good = relative <= limit;
    failures += !good;
    printf("%-28s %.1e %s\n", name.c_str(), relative, good ? "" : "OFF");
}

#define CALL(name, ...) (sizeof(T) == 4 ? name##_f32(__VA_ARGS__) : name##_bf16(__VA_ARGS__))
template <class T> const double LIMIT = sizeof(T) == 4 ? 2e-6 : 4e-3;
template <class T> std::string named(const char *name) {
    return std::string(name) + (sizeof(T) == 4 ? " f32" : " bf16");
}

template <class T> void layers() {
    const long rows = 5, size = 43;
    Tensor<T> x(rows * size), w(size), g(rows * size), y(rows * size), x_grad(rows * size);
    std::vector<float> inverse(rows);
    CALL(rms_norm, rows, size, x.ptr(), w.ptr(), 1e-5f, 0.5f, y.ptr(), inverse.data());
    CALL(rms_norm_backward, rows, size, g.ptr(), x.ptr(), w.ptr(), inverse.data(), 0.5f, x_grad.ptr());
    Numbers normed(rows * size), grads(rows * size);
    for (long r = 0; r < rows; r++) {
        double squares = 0, along = 0;
        for (long i = 0; i < size; i++) squares += x[r * size + i] * x[r * size + i];
        double factor = 1 / std::sqrt(squares / size + 1e-5);
        for (long i = 0; i < size; i++) {
            long at = r * size + i;
            normed[at] = x[at] * factor * (w[i] + 0.5);
            along += g[at] * (w[i] + 0.5) * x[at] * factor * factor / size;
        }
        for (long i = 0; i < size; i++)
            grads[r * size + i] = factor * (g[r * size + i] * (w[i] + 0.5) - x[r * size + i] * along);
    }
    hold(named<T>("rms_norm"), y, normed, LIMIT<T>);
    hold(named<T>("rms_norm_backward"), x_grad, grads, LIMIT<T>);

    Tensor<T> gate_up(2 * rows * size);
    CALL(gated, rows, size, 4, gate_up.ptr(), y.ptr());  // SiLU
    Numbers active(rows * size);
    for (long r = 0; r < rows; r++)
        for (long i = 0; i < size; i++) {
            double gate = gate_up[2 * r * size + i];
            active[r * size + i] = gate / (1 + std::exp(-gate)) * gate_up[(2 * r + 1) * size + i];
        }
    hold(named<T>("gated"), y, active, LIMIT<T>);

    const long heads = 3, turned = 2, head = 24, half = 10;
    Tensor<T> qkv(rows * heads * head), cos(rows * 2 * half), sin(rows * 2 * half), out(rows * heads * head);
    CALL(rotate, rows, heads, turned, head, half, qkv.ptr(), cos.ptr(), sin.ptr(), 1.0f, out.ptr());
    Numbers rotated;
    for (long i = 0; i < rows * heads * head; i++) rotated.push_back(qkv[i]);
    for (long r = 0; r < rows; r++)
        for (long h = 0; h < turned; h++)
            for (long i = 0; i < half; i++) {
                long low = (r * heads + h) * head + i, high = low + half, a = r * 2 * half + i;
                rotated[low] = qkv[low] * cos[a] - qkv[high] * sin[a];
                rotated[high] = qkv[high] * cos[a] + qkv[low] * sin[a];
            }
    hold(named<T>("rotate"), out, rotated, LIMIT<T>);

    std::vector<long> labels = {0, 7, 42, 3, 1};
    std::vector<float> losses(rows);
    Numbers expected(rows), p(rows * size);
    for (long r = 0; r < rows; r++) {
        double total = 0;
        for (long i = 0; i < size; i++) total += std::exp(x[r * size + i]);
        expected[r] = std::log(total) - x[r * size + labels[r]];
        for (long i = 0; i < size; i++) p[r * size + i] = std::exp(x[r * size + i]) / total - (i == labels[r]);
    }
    CALL(cross_entropy, rows, size, x.ptr(), labels.data(), losses.data());
    hold(named<T>("cross_entropy"), losses, expected, LIMIT<T>);
    hold(named<T>("cross_entropy's gradient"), x, p, LIMIT<T>);
}

template <class T> void lora() {
    const int rows = 37, in = 40, r = 8, out = 64, starts[] = {0, 48}, stops[] = {24, 64};
    Tensor<T> x(rows * in), y(rows * out);
    Tensor<float> A(2 * r * in), B(40 * r), low(rows * 2 * r);
    Numbers expected;
    for (long i = 0; i < rows * out; i++) expected.push_back(y[i]);
    for (int t = 0; t < rows; t++)
        for (int p = 0, row = 0; p < 2; row += stops[p] - starts[p], p++)
            for (int c = starts[p]; c < stops[p]; c++)
                for (int i = 0; i < r; i++)
                    for (int k = 0; k < in; k++)
                        expected[t * out + c] +=
                            2.0 * x[t * in + k] * A[(p * r + i) * in + k] * B[(row + c - starts[p]) * r + i];
    CALL(lora, rows, in, x.ptr(), A.ptr(), B.ptr(), 40, 2.0f, nullptr, 65536, 2, r, starts, stops, low.ptr(), y.ptr(),
         out);
    hold(named<T>("lora"), y, expected, LIMIT<T>);
}

template <class T> void attention() {
    const int heads = 4, groups = 2, size = 24, offsets[] = {0, 19, 50}, total = 50, window = 21;
    Tensor<T> q(heads * total * size), k(groups * total * size), v(groups * total * size), y(heads * total * size);
    auto of = [&](Tensor<T> &x) { return Heads<void>{x.ptr(), 0, total * size, size}; };
    Heads<void> hq = of(q), hk = of(k), hv = of(v), hy = of(y);
    Sizes sizes{1, heads, groups, size, 2, offsets, 0.2f, window, 0};
    std::vector<float> log_sums(heads * total);
    CALL(attention, &sizes, &hq, &hk, &hv, &hy, log_sums.data());
    Numbers expected(heads * total * size);
    for (int h = 0; h < heads; h++)
        for (int t = 0; t < total; t++) {
            long at = (h * total + t) * size, group = (long)h / (heads / groups) * total;
            double sum = 0;
            for (int j = std::max(t < 19 ? 0 : 19, t - window + 1); j <= t; j++) {
                double score = 0;
                for (int d = 0; d < size; d++) score += q[at + d] * k[(group + j) * size + d];
                double p = std::exp(0.2 * score);
                sum += p;
                for (int d = 0; d < size; d++) expected[at + d] += p * v[(group + j) * size + d];
            }
            for (int d = 0; d < size; d++) expected[at + d] /= sum;
        }
    hold(named<T>("attention"), y, expected, sizeof(T) == 4 ? 2e-6 : 1e-2);
}

// Products of 1 and of 5 rows with a weight in each format, exact and fast; and the weight, where that is quantized.
void products() {
    const long rows = 48, columns = 200, groups = 4, n = 5;
    Tensor<float> x(n * columns), f32(rows * columns), scales(rows), by_group(rows * groups), zeros(rows * groups);
    Tensor<bf16> narrow(rows * columns), narrow_scales(rows * groups);
    std::vector<int8_t> bytes(rows * columns);
    std::vector<uint8_t> nibbles(rows * groups * 32);
    std::vector<float> pairs(512), whole_pairs(512);  // the values of the codes in a byte; with zeros they are whole
    float table[16];
    for (float &value : table) value = drawn();
    for (auto &b : bytes) b = (int8_t)(127 * drawn());
    for (auto &b : nibbles) b = (uint8_t)(127.5 + 127.5 * drawn());
    for (int b = 0; b < 256; b++) {
        pairs[2 * b] = table[b >> 4], pairs[2 * b + 1] = table[b & 15];
        whole_pairs[2 * b] = b >> 4, whole_pairs[2 * b + 1] = b & 15;
    }
    auto value = [&](long i, const std::vector<float> &pairs) {
        return (double)pairs[2 * nibbles[i / columns * groups * 32 + i % columns / 2] + i % columns % 2];
    };
    auto group = [&](long i) { return i / columns * groups + i % columns / 64; };
    struct Weight {
        const char *name;
        const void *w, *scale, *zero;
        std::function<double(long)> at;
    };
    Weight weights[] = {
        {"float32", f32.ptr(), nullptr, nullptr, [&](long i) { return f32[i]; }},
        {"bfloat16", narrow.ptr(), nullptr, nullptr, [&](long i) { return narrow[i]; }},
        {"int8", bytes.data(), scales.ptr(), nullptr, [&](long i) { return bytes[i] * scales[i / columns]; }},
        {"4 bits, float32", nibbles.data(), by_group.ptr(), zeros.ptr(),
         [&](long i) { return value(i, whole_pairs) * by_group[group(i)] + zeros[group(i)]; }},
        {"4 bits, bfloat16", nibbles.data(), narrow_scales.ptr(), nullptr,
         [&](long i) { return value(i, pairs) * narrow_scales[group(i)]; }},
    };
    for (long format = 0; format < 5; format++) {
        auto &[name, w, scale, zero, at] = weights[format];
        const float *values = zero ? whole_pairs.data() : pairs.data();
        Numbers expected(n * rows), whole;
        for (long i = 0; i < rows * columns; i++) {
            whole.push_back(at(i));
            for (long b = 0; b < n; b++) expected[b * rows + i / columns] += at(i) * x[b * columns + i % columns];
        }
        if (format >= 2) {
            Tensor<float> y(rows * columns);
            dequantize_f32(format, w, scale, zero, values, rows, columns, y.ptr());
            hold(std::string("dequantize ") + name, y, whole, 2e-6);
        }
        for (long fast = 0; fast < 2; fast++)
            for (long count : {1l, n}) {
                Tensor<float> y(n * rows);
                void *tape = tape_new();
                tape_linear(tape, y.ptr(), x.ptr(), rows, columns, format, w, scale, zero, values, nullptr, fast);
                std::vector<Row> run(count, Row{});
                tape_run(tape, run.data(), count, nullptr, 0, 2);
                Numbers of_rows(expected.begin(), expected.begin() + count * rows);
                std::string what = std::string(name) + (fast ? ", fast" : "") + " x " + std::to_string(count);
                hold(what, y, of_rows, fast ? 4e-4 : 1e-5);
            }
    }
}

int main() {
    layers<float>(), layers<bf16>();
    lora<float>(), lora<bf16>();
    attention<float>(), attention<bf16>();
    products();
    return failures > 0;
}
