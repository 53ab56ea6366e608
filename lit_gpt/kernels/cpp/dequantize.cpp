// A weight that lit_gpt/quantization/formats.py keeps in fewer bits, in full again: computed in float32 and rounded
// once.
#include "products.h"

template <class T>
void dequantize(long format, const void *w, const void *scale, const void *zero, const float *pairs, long rows,
                long columns, T *y) {
    with_quantized(format, w, scale, zero, pairs, false, columns, [=](auto weight) {
#pragma omp parallel
        {
            std::vector<float> row(columns);
#pragma omp for
            for (long r = 0; r < rows; r++) {
                weight.expand(r, columns, row.data());
                for (long k = 0; k < columns; k++) from_float(y + r * columns + k, row[k]);
            }
        }
    });
}

#define BOTH(T, suffix)                                                                                           \
    void dequantize_##suffix(long format, const void *w, const void *scale, const void *zero, const float *pairs, \
                             long rows, long columns, T *y) {                                                     \
        dequantize(format, w, scale, zero, pairs, rows, columns, y);                                              \
    }

extern "C" {
BOTH(bf16, bf16)
BOTH(float, f32)
}
