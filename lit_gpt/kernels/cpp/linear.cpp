// x W^T + bias for many rows of x, with the weight as it is stored; see panels.h.
#include <atomic>

#include "panels.h"

namespace {

constexpr long MOST_ROWS = 512;  // of x, that are multiplied with a panel before the next is made

template <class A, class T> void set(Rows<A> &rows, long to, const T *from, std::vector<float> &wide, float most) {
    if constexpr (std::is_same_v<T, typename A::number>)
        rows.copy(to, from);
    else {
        long n = rows.blocks.columns;
        for (long k = 0; k < n; k++) wide[k] = to_float(from[k]);
        rows.set(to, wide.data(), most);
    }
}

template <class A, class T> void set(Rows<A> &panel, long to, const Plain<T> &weight, long r,
                                     std::vector<float> &wide) {
    set(panel, to, weight.w + r * panel.blocks.columns, wide, A::WEIGHT_MOST);
}

template <class A, class Weight>
void set(Rows<A> &panel, long to, const Weight &weight, long r, std::vector<float> &wide) {
    weight.expand(r, panel.blocks.columns, wide.data());
    panel.set(to, wide.data(), A::WEIGHT_MOST);
}

template <class A, class Weight, class T>
void linear(const Weight &weight, long rows, long columns, const T *x, long n, const T *bias, T *y) {
    static thread_local Rows<A> kept;
    Rows<A> &inputs = kept;  // of the thread that calls, for all
    inputs.prepare(Blocks<A>(columns), padded(n, X_TILE));
    constexpr long LINE = 64 / sizeof(T);  // rows that one thread takes, lest two write to one line of y
    std::atomic<long> taken{-LINE};
#pragma omp parallel
    {
        static thread_local Rows<A> panel;
        static thread_local std::vector<float> wide, totals;
        panel.prepare(inputs.blocks, PANEL);
        wide.resize(columns), totals.resize(PANEL * inputs.n);
#pragma omp for
        for (long i = 0; i < n; i++) set(inputs, i, x + i * columns, wide, A::X_MOST);
        for (long first = taken += LINE, next; first < rows; first = next) {
            next = (first + PANEL) % LINE ? first + PANEL : taken += LINE;
            long end = std::min(first + PANEL, rows);
            for (long r = first; r < end; r++) set(panel, r - first, weight, r, wide);
            multiply(panel, inputs, totals.data(), weight.at(std::min(next, rows), columns),
                     weight.at(std::min(next + PANEL, rows), columns));
            for (long r = first; r < end; r += LANES) {
                int count = std::min<long>(LANES, end - r);
                lanes added = bias ? take(bias + r, count) : lanes{};
                for (long i = 0; i < n; i++)
                    put(y + i * rows + r, load<LANES>(&totals[i * PANEL + r - first]) + added, count);
            }
        }
    }
}

#ifdef __AVX512BF16__
template <class T> struct For {
    typedef Floats plain, quantized;
};
template <> struct For<bf16> {
    typedef BFloats plain, quantized;
};
#else
template <class T> struct For {
    typedef Floats plain, quantized;
};
#ifdef __AVX2__
template <> struct For<bf16> {
    typedef Floats plain;
    typedef Integers quantized;
};
#endif
#endif

template <class T>
void linear(long format, const void *w, const void *scale, const void *zero, const float *pairs, long rows,
            long columns, const T *x, long n, const T *bias, T *y) {
    for (long i = 0; i < n; i += MOST_ROWS) {
        long few = std::min(MOST_ROWS, n - i);
        auto use = [=](auto kind, auto weight) {
            linear<decltype(kind)>(weight, rows, columns, x + i * columns, few, bias, y + i * rows);
        };
        if (format == FLOAT32 || format == BFLOAT16)
            use(typename For<T>::plain{}, Plain<T>{(const T *)w});
        else
            with_quantized(format, w, scale, zero, pairs, false, columns,
                           [=](auto weight) { use(typename For<T>::quantized{}, weight); });
    }
}

}  // namespace

#define BOTH(T, suffix)                                                                                       \
    void linear_##suffix(long format, const void *w, const void *scale, const void *zero, const float *pairs, \
                         long rows, long columns, const T *x, long n, const T *bias, T *y) {                  \
        linear(format, w, scale, zero, pairs, rows, columns, x, n, bias, y);                                  \
    }

extern "C" {
BOTH(bf16, bf16)
BOTH(float, f32)
}
