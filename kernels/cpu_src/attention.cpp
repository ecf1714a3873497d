// Attention of single tokens over their blocks of the paged cache, with no copy of the context (arXiv:2309.06180).
#include <algorithm>
#include <cmath>

#include "vector.h"

namespace {

constexpr int MAX_BLOCK_SIZE = 256;

struct Shape {
    int64_t num_heads, num_kv_heads, block_size, window;
    float scale;
};

// NUM_HEADS query heads over one KV head. query, output: [NUM_HEADS, HEAD_DIM]; keys, values: the head's place in
// block 0; block: ids of the blocks that hold `length` tokens, of which all or the last `window` are attended to.
template <class T, int HEAD_DIM, int NUM_HEADS>
void attend(const T* query, const T* keys, const T* values, const int32_t* block, int64_t length, T* output,
            const Shape& shape) {
    constexpr int CHUNKS = HEAD_DIM / LANES, UNITS = HEAD_DIM / Unit<T>::SIZE;
    int64_t token_stride = shape.num_kv_heads * HEAD_DIM, block_stride = shape.block_size * token_stride;
    Floats totals[NUM_HEADS][CHUNKS] = {};
    float highest[NUM_HEADS], weight_sum[NUM_HEADS] = {};
    alignas(64) float scores[NUM_HEADS][MAX_BLOCK_SIZE];
    for (int head = 0; head < NUM_HEADS; head++) highest[head] = -INFINITY;
    int64_t start = shape.window ? std::max<int64_t>(length - shape.window, 0) : 0;
    block += start / shape.block_size;
    for (int count; start < length; start += count, block++) {
        int64_t within = start % shape.block_size, offset = *block * block_stride + within * token_stride;
        count = static_cast<int>(std::min(shape.block_size - within, length - start));
        const T *block_keys = keys + offset, *block_values = values + offset;
        for (int first = 0; first < count; first += LANES)
            for (int head = 0; head < NUM_HEADS; head++) {
                Floats products[LANES] = {};
                for (int u = 0; u < UNITS; u++) {
                    auto part = Unit<T>::get(query + head * HEAD_DIM + u * Unit<T>::SIZE);
                    for (int i = 0; i < LANES; i++) {
                        // Past the last token its key stands in; those scores are not used.
                        const T* key = block_keys + std::min(first + i, count - 1) * token_stride;
                        products[i] = Unit<T>::add(products[i], part, Unit<T>::get(key + u * Unit<T>::SIZE));
                    }
                }
                store(scores[head] + first, sums(products) * shape.scale);
            }
        for (int head = 0; head < NUM_HEADS; head++) {
            for (int token = count; token % LANES; token++) scores[head][token] = -INFINITY;
            Floats tops = load(scores[head]);
            for (int token = LANES; token < count; token += LANES) tops = larger(tops, load(scores[head] + token));
            float top = largest(tops);
            if (top > highest[head]) {
                float shrink = std::exp(highest[head] - top);
                highest[head] = top;
                weight_sum[head] *= shrink;
                for (int c = 0; c < CHUNKS; c++) totals[head][c] *= shrink;
            }
            Floats weights{};
            for (int token = 0; token < count; token += LANES) {
                Floats chunk = exponential(load(scores[head] + token) - highest[head]);
                store(scores[head] + token, chunk);
                weights += chunk;
            }
            weight_sum[head] += sum(weights);
        }
        for (int token = 0; token < count; token++)
            for (int c = 0; c < CHUNKS; c++) {
                Floats value = load(block_values + token * token_stride + c * LANES);
                for (int head = 0; head < NUM_HEADS; head++) totals[head][c] += value * scores[head][token];
            }
    }
    for (int head = 0; head < NUM_HEADS; head++)
        for (int c = 0; c < CHUNKS; c++)
            store(output + head * HEAD_DIM + c * LANES, totals[head][c] / weight_sum[head]);
}

// Query row rows[i] attends to the first lengths[i] tokens of block_tables[i].
template <class T, int HEAD_DIM>
void paged_attention(const T* query, const T* k_cache, const T* v_cache, const int64_t* rows,
                     const int32_t* block_tables, const int64_t* lengths, T* output, int64_t num_rows,
                     int64_t table_stride, const Shape& shape) {
    int64_t group = shape.num_heads / shape.num_kv_heads, total = 0;
    for (int64_t i = 0; i < num_rows; i++) total += shape.window ? std::min(lengths[i], shape.window) : lengths[i];
    total *= shape.num_kv_heads * HEAD_DIM;
#pragma omp parallel for collapse(2) schedule(dynamic) if (total > SERIAL_ELEMENTS)
    for (int64_t i = 0; i < num_rows; i++) {
        for (int64_t kv_head = 0; kv_head < shape.num_kv_heads; kv_head++) {
            const T *keys = k_cache + kv_head * HEAD_DIM, *values = v_cache + kv_head * HEAD_DIM;
            const int32_t* block = block_tables + i * table_stride;
            int64_t offset = (rows[i] * shape.num_heads + kv_head * group) * HEAD_DIM;
            int64_t left = group;
            for (; left >= 4; left -= 4, offset += 4 * HEAD_DIM)
                attend<T, HEAD_DIM, 4>(query + offset, keys, values, block, lengths[i], output + offset, shape);
            for (; left >= 2; left -= 2, offset += 2 * HEAD_DIM)
                attend<T, HEAD_DIM, 2>(query + offset, keys, values, block, lengths[i], output + offset, shape);
            if (left)
                attend<T, HEAD_DIM, 1>(query + offset, keys, values, block, lengths[i], output + offset, shape);
        }
    }
}

}  // namespace

extern "C" {
#define CASE(HEAD_DIM)                                                                                               \
    case HEAD_DIM:                                                                                                   \
        return paged_attention<T, HEAD_DIM>(query, k_cache, v_cache, rows, block_tables, lengths, output, num_rows,  \
                                            table_stride, shape);
#define DEFINE(name, TYPE)                                                                                           \
    void paged_attention_##name(const TYPE* query, const TYPE* k_cache, const TYPE* v_cache, const int64_t* rows,    \
                                const int32_t* block_tables, const int64_t* lengths, TYPE* output, int64_t num_rows, \
                                int64_t table_stride, int64_t num_heads, int64_t num_kv_heads, int64_t head_dim,     \
                                int64_t block_size, int64_t window, double scale) {                                  \
        typedef TYPE T;                                                                                              \
        Shape shape{num_heads, num_kv_heads, block_size, window, static_cast<float>(scale)};                         \
        switch (head_dim) { CASE(32) CASE(64) CASE(128) CASE(256) }                                                  \
    }
DEFINE(float32, float)
DEFINE(bfloat16, bfloat16)
}
