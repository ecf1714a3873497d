// x · weightᵀ for few rows of x and weights of 8 or 4 bits (kernels/quantize_weights.py, kernels/weight_only_blocks.py),
// widened in registers.
#include "vector.h"

namespace {

constexpr int GROUP = 128;      // inputs that share a scale, of weights of 4 bits
constexpr int SPAN = 256;       // inputs that are packed together
constexpr int WORDS = SPAN / 4;  // words of a span; bits 4p … 4p + 3 of word j are input 64p + j
constexpr int BLOCK = 32;        // inputs that share a scale in Q8_0 and Q4_0

// Codes as the values that a Unit takes in. What `nibbles` gives is larger than the code by BASE.
template <class T>
struct Codes {
    static constexpr float BASE = 0.0f;
    static Floats bytes(const int8_t* from) {
        int8_t values __attribute__((vector_size(LANES)));
        std::memcpy(&values, from, sizeof values);
        return __builtin_convertvector(values, Floats);
    }
    static Floats nibbles(const uint16_t* from, int plane) {
        Halves words;
        std::memcpy(&words, from, sizeof words);
        return __builtin_convertvector(words >> (4 * plane) & 15, Floats);
    }
    // Of the 16 bytes of a block of Q4_0, what is in their lower halves or their upper ones.
    static Floats block_nibbles(const uint8_t* from, int half) {
        uint8_t bytes __attribute__((vector_size(LANES)));
        std::memcpy(&bytes, from, sizeof bytes);
        return __builtin_convertvector(bytes >> (4 * half) & 15, Floats) - 8.0f;
    }
};

#if defined(__AVX512BF16__)
template <>
struct Codes<bfloat16> {
    static constexpr float BASE = 128.0f;
    static __m512 floats(const int8_t* from) {
        return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))));
    }
    static __m512bh bytes(const int8_t* from) { return _mm512_cvtne2ps_pbh(floats(from + LANES), floats(from)); }
    // 0x4300 are the bits of 128, whose last bit is worth 1: a nibble put there is added to it.
    static __m512bh nibbles(const uint16_t* from, int plane) {
        __m512i words = _mm512_srl_epi16(_mm512_loadu_si512(from), _mm_cvtsi32_si128(4 * plane));
        return (__m512bh)_mm512_or_si512(_mm512_and_si512(words, _mm512_set1_epi16(15)), _mm512_set1_epi16(0x4300));
    }
    // All of the block: its codes are looked up in a table of −8 … 7, twice, as bit 4 of an index counts too.
    static __m512bh block_nibbles(const uint8_t* from, int) {
        __m256i bytes = _mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
        __m512i codes = _mm512_inserti64x4(_mm512_castsi256_si512(bytes), _mm256_srli_epi16(bytes, 4), 1);
        __m512i table = _mm512_broadcast_i64x4(_mm256_setr_epi16(
            short(0xc100), short(0xc0e0), short(0xc0c0), short(0xc0a0), short(0xc080), short(0xc040), short(0xc000),
            short(0xbf80), 0, 0x3f80, 0x4000, 0x4040, 0x4080, 0x40a0, 0x40c0, 0x40e0));
        return (__m512bh)_mm512_permutexvar_epi16(codes, table);
    }
};
#endif

// A float16 in the upper half of each word; it is finite.
inline Floats upper_half(Words words) {
    Words magnitude = (words >> 16 & 0x7fff) << 13, sign = words & 0x80000000;
    return (Floats)((Words)((Floats)magnitude * 0x1p112f) | sign);
}

template <class T>
struct Int8 {
    const T* x;            // [num_rows, in_features]
    const int8_t* weight;  // [out_features, in_features]
    const float* scale;    // [out_features]
    int64_t in_features, out_features;

    // LANES outputs from `first` on, for NUM_ROWS rows of x from `begin` on.
    template <int NUM_ROWS>
    void tile(int64_t begin, int64_t first, Floats* results) const {
        const T* values = x + begin * in_features;
        Floats totals[NUM_ROWS][LANES];
        for (int o = 0; o < LANES; o++) {
            const int8_t* codes = weight + (first + o) * in_features;
            Floats sums_of_row[NUM_ROWS] = {};
            for (int64_t i = 0; i < in_features; i += Unit<T>::SIZE) {
                auto wide = Codes<T>::bytes(codes + i);
                __builtin_prefetch(codes + LANES * in_features + i, 0, 2);
                for (int row = 0; row < NUM_ROWS; row++)
                    sums_of_row[row] =
                        Unit<T>::add(sums_of_row[row], Unit<T>::get(values + row * in_features + i), wide);
            }
            for (int row = 0; row < NUM_ROWS; row++) totals[row][o] = sums_of_row[row];
        }
        for (int row = 0; row < NUM_ROWS; row++) results[row] = sums(totals[row]) * load(scale + first);
    }
};

template <class T>
struct Int4 {
    const T* x;                  // [num_rows, in_features]
    const float* x_sums;         // [num_rows, in_features / GROUP], of each group of x
    const uint16_t* weight;      // [out_features, spans · WORDS]
    const uint32_t* scale_zero;  // [2 · spans, out_features], float16 in the upper half, zero in the lower
    int64_t in_features, out_features;

    template <int NUM_ROWS>
    void tile(int64_t begin, int64_t first, Floats* results) const {
        int64_t num_groups = in_features / GROUP, row_words = (in_features + SPAN - 1) / SPAN * WORDS;
        const float* group_sums = x_sums + begin * num_groups;
        Floats totals[NUM_ROWS][LANES] = {}, offsets[NUM_ROWS] = {};
        for (int64_t group = 0; group < num_groups; group++) {
            Words both;
            std::memcpy(&both, scale_zero + group * out_features + first, sizeof both);
            Floats scales = upper_half(both);
            Floats shifts = scales * (__builtin_convertvector(both & 15, Floats) + Codes<T>::BASE);
            for (int row = 0; row < NUM_ROWS; row++) offsets[row] += shifts * group_sums[row * num_groups + group];
            const T* values = x + begin * in_features + group * GROUP;
            for (int o = 0; o < LANES; o++) {
                const uint16_t* words = weight + (first + o) * row_words + group / 2 * WORDS;
                __builtin_prefetch(words + LANES * row_words + group % 2 * (WORDS / 2), 0, 2);
                Floats sums_of_row[NUM_ROWS] = {};
                for (int half = 0; half < 2; half++)
                    for (int word = 0; word < WORDS; word += Unit<T>::SIZE) {
                        auto codes = Codes<T>::nibbles(words + word, 2 * (group % 2) + half);
                        for (int row = 0; row < NUM_ROWS; row++) {
                            const T* from = values + row * in_features + half * WORDS + word;
                            sums_of_row[row] = Unit<T>::add(sums_of_row[row], Unit<T>::get(from), codes);
                        }
                    }
                for (int row = 0; row < NUM_ROWS; row++) totals[row][o] += sums_of_row[row] * scales[o];
            }
        }
        for (int row = 0; row < NUM_ROWS; row++) results[row] = sums(totals[row]) - offsets[row];
    }
};

// BYTES of a block's codes: 32 in Q8_0, 16 in Q4_0.
template <class T, int BYTES>
struct Blocks {
    const T* x;             // [num_rows, in_features]
    const uint8_t* weight;  // [out_features, in_features / BLOCK · BYTES]
    const uint16_t* scale;  // [in_features / BLOCK, out_features] float16
    int64_t in_features, out_features;

    template <int NUM_ROWS>
    void tile(int64_t begin, int64_t first, Floats* results) const {
        int64_t num_blocks = in_features / BLOCK;
        Floats totals[NUM_ROWS][LANES] = {};
        for (int64_t block = 0; block < num_blocks; block++) {
            Halves halves;
            std::memcpy(&halves, scale + block * out_features + first, sizeof halves);
            Floats scales = upper_half(__builtin_convertvector(halves, Words) << 16);
            const T* values = x + begin * in_features + block * BLOCK;
            for (int o = 0; o < LANES; o++) {
                const uint8_t* bytes = weight + ((first + o) * num_blocks + block) * BYTES;
                __builtin_prefetch(bytes + LANES * num_blocks * BYTES, 0, 2);
                Floats sums_of_row[NUM_ROWS] = {};
                for (int i = 0; i < BLOCK; i += Unit<T>::SIZE) {
                    auto codes = BYTES == BLOCK ? Codes<T>::bytes(reinterpret_cast<const int8_t*>(bytes) + i)
                                                : Codes<T>::block_nibbles(bytes, i / Unit<T>::SIZE);
                    for (int row = 0; row < NUM_ROWS; row++)
                        sums_of_row[row] =
                            Unit<T>::add(sums_of_row[row], Unit<T>::get(values + row * in_features + i), codes);
                }
                for (int row = 0; row < NUM_ROWS; row++) totals[row][o] += sums_of_row[row] * scales[o];
            }
        }
        for (int row = 0; row < NUM_ROWS; row++) results[row] = sums(totals[row]);
    }
};

// LANES outputs for as many times NUM_ROWS rows as are left from `row` on, which is moved past them.
template <int NUM_ROWS, class Weights, class T>
void rows_of_tile(const Weights& weights, const T* bias, T* output, int64_t first, int64_t num_rows, int64_t& row) {
    for (; row + NUM_ROWS <= num_rows; row += NUM_ROWS) {
        Floats results[NUM_ROWS];
        weights.template tile<NUM_ROWS>(row, first, results);
        for (int r = 0; r < NUM_ROWS; r++)
            store(output + (row + r) * weights.out_features + first, bias ? results[r] + load(bias + first) : results[r]);
    }
}

// out_features is a multiple of LANES.
template <class Weights, class T>
void linear(const Weights& weights, const T* bias, T* output, int64_t num_rows) {
    int64_t work = weights.in_features * weights.out_features * num_rows;
#pragma omp parallel for schedule(static) if (work > 8 * SERIAL_ELEMENTS)
    for (int64_t first = 0; first < weights.out_features; first += LANES) {
        int64_t row = 0;
        rows_of_tile<8>(weights, bias, output, first, num_rows, row);
        rows_of_tile<4>(weights, bias, output, first, num_rows, row);
        rows_of_tile<2>(weights, bias, output, first, num_rows, row);
        rows_of_tile<1>(weights, bias, output, first, num_rows, row);
    }
}

}  // namespace

extern "C" {
#define DEFINE(name, T)                                                                                               \
    void linear_int8_##name(const T* x, const int8_t* weight, const float* scale, const T* bias, T* output,           \
                            int64_t num_rows, int64_t in_features, int64_t out_features) {                            \
        linear(Int8<T>{x, weight, scale, in_features, out_features}, bias, output, num_rows);                         \
    }                                                                                                                 \
    void linear_int4_##name(const T* x, const float* x_sums, const uint16_t* weight, const uint32_t* scale_zero,      \
                            const T* bias, T* output, int64_t num_rows, int64_t in_features, int64_t out_features) {  \
        linear(Int4<T>{x, x_sums, weight, scale_zero, in_features, out_features}, bias, output, num_rows);            \
    }                                                                                                                 \
    void linear_q8_0_##name(const T* x, const uint8_t* weight, const uint16_t* scale, const T* bias, T* output,       \
                            int64_t num_rows, int64_t in_features, int64_t out_features) {                            \
        linear(Blocks<T, 32>{x, weight, scale, in_features, out_features}, bias, output, num_rows);                   \
    }                                                                                                                 \
    void linear_q4_0_##name(const T* x, const uint8_t* weight, const uint16_t* scale, const T* bias, T* output,       \
                            int64_t num_rows, int64_t in_features, int64_t out_features) {                            \
        linear(Blocks<T, 16>{x, weight, scale, in_features, out_features}, bias, output, num_rows);                   \
    }
DEFINE(float32, float)
DEFINE(bfloat16, bfloat16)
}
