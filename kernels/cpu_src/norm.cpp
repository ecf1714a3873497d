// Root-mean-square norm, plain and of a sum, and SwiGLU's gate. Float32 inside.
#include <cmath>

#include "vector.h"

namespace {

// residual null: normed = norm(x). Otherwise total = x + residual, rounded, and normed = norm(total).
template <class T>
void add_rms_norm(const T* x, const T* residual, const T* weight, T* normed, T* total, int64_t num_rows, int64_t size,
                  float eps) {
#pragma omp parallel for if (num_rows * size > SERIAL_ELEMENTS)
    for (int64_t row = 0; row < num_rows; row++) {
        const T* in = x + row * size;
        T* out = normed + row * size;
        Floats squares{};
        if (residual) {
            T* stream = total + row * size;
            for (int64_t i = 0; i < size; i += LANES) {
                store(stream + i, load(in + i) + load(residual + row * size + i));
                Floats value = load(stream + i);
                squares += value * value;
            }
            in = stream;
        } else {
            for (int64_t i = 0; i < size; i += LANES) squares += load(in + i) * load(in + i);
        }
        float scale = 1.0f / std::sqrt(sum(squares) / size + eps);
        for (int64_t i = 0; i < size; i += LANES) store(out + i, load(in + i) * scale * load(weight + i));
    }
}

// gate_up: [num_rows, 2 · size], gate first.
template <class T>
void silu_and_mul(const T* gate_up, T* output, int64_t num_rows, int64_t size) {
#pragma omp parallel for if (num_rows * size > SERIAL_ELEMENTS)
    for (int64_t row = 0; row < num_rows; row++) {
        const T *gate = gate_up + 2 * row * size, *up = gate + size;
        for (int64_t i = 0; i < size; i += LANES) {
            Floats value = load(gate + i);
            store(output + row * size + i, value / (1.0f + exponential(-value)) * load(up + i));
        }
    }
}

}  // namespace

extern "C" {
#define DEFINE(name, T)                                                                                              \
    void add_rms_norm_##name(const T* x, const T* residual, const T* weight, T* normed, T* total, int64_t num_rows,  \
                             int64_t size, double eps) {                                                            \
        add_rms_norm(x, residual, weight, normed, total, num_rows, size, static_cast<float>(eps));                   \
    }                                                                                                                \
    void silu_and_mul_##name(const T* gate_up, T* output, int64_t num_rows, int64_t size) {                          \
        silu_and_mul(gate_up, output, num_rows, size);                                                               \
    }
DEFINE(float32, float)
DEFINE(bfloat16, bfloat16)
}
