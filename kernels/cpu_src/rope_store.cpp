// Per-head norms of q and k, rotary positions, and K and V into the paged cache, in one pass over qkv.
#include <cmath>

#include "vector.h"

namespace {

constexpr int MAX_HEAD_DIM = 256;

// Norm (weight null: none), rotation by cos_sin [head_dim]: cosines, then sines. head_dim is a multiple of 2 · LANES.
template <class T>
void rotate_head(const T* x, const T* weight, const float* cos_sin, T* output, int64_t head_dim, float eps) {
    alignas(64) float values[MAX_HEAD_DIM];
    Floats squares{};
    for (int64_t i = 0; i < head_dim; i += LANES) {
        Floats value = load(x + i);
        squares += value * value;
        store(values + i, value);
    }
    if (weight) {
        float scale = 1.0f / std::sqrt(sum(squares) / head_dim + eps);
        for (int64_t i = 0; i < head_dim; i += LANES) store(values + i, load(values + i) * scale * load(weight + i));
    }
    int64_t half = head_dim / 2;
    for (int64_t i = 0; i < half; i += LANES) {
        Floats first = load(values + i), second = load(values + half + i);
        Floats cosine = load(cos_sin + i), sine = load(cos_sin + half + i);
        store(output + i, first * cosine - second * sine);
        store(output + half + i, second * cosine + first * sine);
    }
}

template <class T>
void qk_norm_rope_store(const T* qkv, const T* q_weight, const T* k_weight, const float* cos_sin, T* q, T* k_cache,
                        T* v_cache, const int64_t* slot_mapping, int64_t num_tokens, int64_t num_heads,
                        int64_t num_kv_heads, int64_t head_dim, float eps) {
    int64_t width = (num_heads + 2 * num_kv_heads) * head_dim;
#pragma omp parallel for if (num_tokens * width > SERIAL_ELEMENTS)
    for (int64_t token = 0; token < num_tokens; token++) {
        const T* heads = qkv + token * width;
        const float* angles = cos_sin + token * head_dim;
        T* q_row = q + token * num_heads * head_dim;
        T* k_row = k_cache + slot_mapping[token] * num_kv_heads * head_dim;
        T* v_row = v_cache + slot_mapping[token] * num_kv_heads * head_dim;
        for (int64_t head = 0; head < num_heads; head++)
            rotate_head(heads + head * head_dim, q_weight, angles, q_row + head * head_dim, head_dim, eps);
        heads += num_heads * head_dim;
        for (int64_t head = 0; head < num_kv_heads; head++)
            rotate_head(heads + head * head_dim, k_weight, angles, k_row + head * head_dim, head_dim, eps);
        heads += num_kv_heads * head_dim;
        std::memcpy(v_row, heads, num_kv_heads * head_dim * sizeof(T));
    }
}

}  // namespace

extern "C" {
#define DEFINE(name, T)                                                                                              \
    void qk_norm_rope_store_##name(const T* qkv, const T* q_weight, const T* k_weight, const float* cos_sin, T* q,   \
                                   T* k_cache, T* v_cache, const int64_t* slot_mapping, int64_t num_tokens,          \
                                   int64_t num_heads, int64_t num_kv_heads, int64_t head_dim, double eps) {          \
        qk_norm_rope_store(qkv, q_weight, k_weight, cos_sin, q, k_cache, v_cache, slot_mapping, num_tokens,          \
                           num_heads, num_kv_heads, head_dim, static_cast<float>(eps));                              \
    }
DEFINE(float32, float)
DEFINE(bfloat16, bfloat16)
}
