// x · weightᵀ for few rows of x: the weights are read from memory once, at the speed that memory has.
#include <algorithm>

#include "vector.h"

namespace {

constexpr int GROUP = 16;  // outputs, that is rows of the weight, that a thread takes at a time
constexpr int64_t AHEAD = 2048;  // elements from what is read to what is fetched, where a weight is read in its order
constexpr int64_t IN_ORDER_ELEMENTS = 1 << 20;
constexpr int64_t NEAR_BYTES = 32 << 10;  // of x that stay in a first-level cache while weights pass through it

// output[row][o] for NUM_ROWS rows and the NUM_OUTPUTS outputs from `weight` on. Each is one running sum, whatever the
// numbers are: a row's results do not depend on the rows beside it. in_features is a multiple of the unit's size.
template <class T, int NUM_ROWS, int NUM_OUTPUTS>
inline void tile(const T* x, const T* weight, const T* bias, T* output, int64_t in_features, int64_t out_features,
                 int64_t ahead) {
    Floats totals[NUM_ROWS * NUM_OUTPUTS] = {};
    for (int64_t i = 0; i < in_features; i += Unit<T>::SIZE) {
        typename Unit<T>::Values weights[NUM_OUTPUTS];
        for (int o = 0; o < NUM_OUTPUTS; o++) {
            weights[o] = Unit<T>::get(weight + o * in_features + i);
            __builtin_prefetch(weight + o * in_features + i + ahead, 0, 2);
        }
        for (int row = 0; row < NUM_ROWS; row++) {
            typename Unit<T>::Values values = Unit<T>::get(x + row * in_features + i);
            for (int o = 0; o < NUM_OUTPUTS; o++) {
                Floats& total = totals[row * NUM_OUTPUTS + o];
                total = Unit<T>::add(total, values, weights[o]);
            }
        }
    }
    constexpr int NUM_RESULTS = NUM_ROWS * NUM_OUTPUTS;
    alignas(64) float results[LANES];
    if constexpr (NUM_RESULTS == LANES)
        store(results, sums(totals));
    else
        for (int i = 0; i < NUM_RESULTS; i++) results[i] = sum(totals[i]);
    if (bias)
        for (int i = 0; i < NUM_RESULTS; i++) results[i] += to_float(bias[i % NUM_OUTPUTS]);
    T rounded[LANES];
    store(rounded, load(results));
    for (int row = 0; row < NUM_ROWS; row++)
        std::memcpy(output + row * out_features, rounded + row * NUM_OUTPUTS, NUM_OUTPUTS * sizeof(T));
}

// The outputs from `first` to `last` for NUM_ROWS rows, NUM_OUTPUTS at a time and the rest one by one.
template <class T, int NUM_ROWS, int NUM_OUTPUTS>
void outputs(const T* x, const T* weight, const T* bias, T* output, int64_t first, int64_t last, int64_t in_features,
             int64_t out_features) {
    for (; first + NUM_OUTPUTS <= last; first += NUM_OUTPUTS)
        tile<T, NUM_ROWS, NUM_OUTPUTS>(x, weight + first * in_features, bias ? bias + first : bias, output + first,
                                       in_features, out_features, NUM_OUTPUTS == 1 ? AHEAD : GROUP * in_features);
    if constexpr (NUM_OUTPUTS > 1)
        outputs<T, NUM_ROWS, 1>(x, weight, bias, output, first, last, in_features, out_features);
}

// With one or two rows of a weight that no cache holds, memory is the limit, and it is fastest read in its order.
// Otherwise loads from caches are: many outputs at once need fewer of them. Eight rows and two outputs are fastest as
// long as the rows stay near, then four and four.
template <class T>
void linear(const T* x, const T* weight, const T* bias, T* output, int64_t num_rows, int64_t in_features,
            int64_t out_features) {
    bool in_order = num_rows <= 2 && in_features * out_features >= IN_ORDER_ELEMENTS;
    bool near = 8 * in_features * static_cast<int64_t>(sizeof(T)) <= NEAR_BYTES;
#pragma omp parallel for schedule(static) if (in_features * out_features * num_rows > 8 * SERIAL_ELEMENTS)
    for (int64_t group = 0; group < out_features; group += GROUP) {
        int64_t end = std::min(group + GROUP, out_features), row = 0;
        auto run = [&](auto of_rows) {
            of_rows(x + row * in_features, weight, bias, output + row * out_features, group, end, in_features,
                    out_features);
        };
        for (; near && row + 8 <= num_rows; row += 8) run(outputs<T, 8, 2>);
        for (; row + 4 <= num_rows; row += 4) run(outputs<T, 4, 4>);
        for (; row + 2 <= num_rows; row += 2) run(in_order ? outputs<T, 2, 1> : outputs<T, 2, 8>);
        if (row < num_rows) run(in_order ? outputs<T, 1, 1> : outputs<T, 1, 16>);
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
