// x · weightᵀ for few rows of x: the weights are read from memory once, at the speed that memory has.
#include <algorithm>

#include "vector.h"

namespace {

constexpr int GROUP = 16;  // outputs, that is rows of the weight, that a thread takes at a time

// output[row][o] for NUM_ROWS rows and the outputs from `first` on: as many as make LANES sums. Those past the last
// output are computed from the last row of the weight and left out. in_features is a multiple of the unit's size.
template <class T, int NUM_ROWS>
inline void tile(const T* x, const T* weight, const T* bias, T* output, int64_t first, int64_t in_features,
                 int64_t out_features) {
    constexpr int NUM_OUTPUTS = LANES / NUM_ROWS;
    const T* rows[NUM_OUTPUTS];
    for (int o = 0; o < NUM_OUTPUTS; o++) rows[o] = weight + std::min(first + o, out_features - 1) * in_features;
    Floats totals[LANES] = {};
    for (int64_t i = 0; i < in_features; i += Unit<T>::SIZE) {
        typename Unit<T>::Values weights[NUM_OUTPUTS];
        for (int o = 0; o < NUM_OUTPUTS; o++) {
            weights[o] = Unit<T>::get(rows[o] + i);
            // What the next group begins with: rows are too short for the hardware to foresee them.
            __builtin_prefetch(rows[o] + GROUP * in_features + i, 0, 2);
        }
        for (int row = 0; row < NUM_ROWS; row++) {
            typename Unit<T>::Values values = Unit<T>::get(x + row * in_features + i);
            for (int o = 0; o < NUM_OUTPUTS; o++) {
                Floats& total = totals[row * NUM_OUTPUTS + o];
                total = Unit<T>::add(total, values, weights[o]);
            }
        }
    }
    Floats results = sums(totals);
    int count = static_cast<int>(std::min<int64_t>(NUM_OUTPUTS, out_features - first));
    for (int row = 0; row < NUM_ROWS; row++)
        for (int o = 0; o < count; o++)
            put(output + row * out_features + first + o,
                results[row * NUM_OUTPUTS + o] + (bias ? to_float(bias[first + o]) : 0.0f));
}

// A group of outputs for NUM_ROWS rows, and then for as many again while there are; returns how many rows that were.
template <class T, int NUM_ROWS>
int64_t rows_of_group(const T* x, const T* weight, const T* bias, T* output, int64_t group, int64_t num_rows,
                      int64_t in_features, int64_t out_features) {
    int64_t row = 0, end = std::min(group + GROUP, out_features);
    for (; row + NUM_ROWS <= num_rows; row += NUM_ROWS)
        for (int64_t first = group; first < end; first += LANES / NUM_ROWS)
            tile<T, NUM_ROWS>(x + row * in_features, weight, bias, output + row * out_features, first, in_features,
                              out_features);
    return row;
}

template <class T>
void linear(const T* x, const T* weight, const T* bias, T* output, int64_t num_rows, int64_t in_features,
            int64_t out_features) {
#pragma omp parallel for schedule(static) if (in_features * out_features * num_rows > 8 * SERIAL_ELEMENTS)
    for (int64_t group = 0; group < out_features; group += GROUP) {
        int64_t row = 0;
        auto run = [&](auto rows_of) {
            row += rows_of(x + row * in_features, weight, bias, output + row * out_features, group, num_rows - row,
                           in_features, out_features);
        };
        run(rows_of_group<T, 8>);
        run(rows_of_group<T, 4>);
        run(rows_of_group<T, 2>);
        run(rows_of_group<T, 1>);
    }
}

}  // namespace

extern "C" {
#define DEFINE(name, T)                                                                                              \
    void linear_##name(const T* x, const T* weight, const T* bias, T* output, int64_t num_rows, int64_t in_features, \
                       int64_t out_features) {                                                                       \
        linear(x, weight, bias, output, num_rows, in_features, out_features);                                        \
    }
DEFINE(float32, float)
DEFINE(bfloat16, bfloat16)
}
