// Sixteen floats at a time, for any CPU: the compiler lowers these vectors to whatever units there are.
// A cast from one vector type to another of its size keeps the bits.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#if defined(__AVX512BF16__)
#include <immintrin.h>
#endif

constexpr int LANES = 16;

// Work below this, in elements loaded from caches, stays on one thread: where cores are shared with other processes,
// waiting for a second thread costs up to a time slice, a thousand times what it could save.
constexpr int64_t SERIAL_ELEMENTS = 1 << 19;

typedef float Floats __attribute__((vector_size(4 * LANES)));
typedef int32_t Ints __attribute__((vector_size(4 * LANES)));
typedef uint32_t Words __attribute__((vector_size(4 * LANES)));
typedef uint16_t Halves __attribute__((vector_size(2 * LANES)));

struct bfloat16 {
    uint16_t bits;
};

// Rounds to nearest, ties to even; a NaN stays one.
inline bfloat16 to_bfloat16(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    if (value != value) return {static_cast<uint16_t>(bits >> 16 | 0x40)};
    return {static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}

inline float to_float(bfloat16 value) {
    uint32_t bits = static_cast<uint32_t>(value.bits) << 16;
    float result;
    std::memcpy(&result, &bits, 4);
    return result;
}
inline float to_float(float value) { return value; }

inline void put(float* to, float value) { *to = value; }
inline void put(bfloat16* to, float value) { *to = to_bfloat16(value); }

inline Floats load(const float* from) {
    Floats values;
    std::memcpy(&values, from, sizeof values);
    return values;
}
inline Floats load(const bfloat16* from) {
    Halves halves;
    std::memcpy(&halves, from, sizeof halves);
    Words words = __builtin_convertvector(halves, Words) << 16;
    return (Floats)words;
}

inline void store(float* to, Floats values) { std::memcpy(to, &values, sizeof values); }
inline void store(bfloat16* to, Floats values) {
    Words words = (Words)values;
    Words rounded = (words + 0x7fff + (words >> 16 & 1)) >> 16;
    Words not_a_number = (words >> 16) | 0x40;
    Words chosen = (values == values) ? rounded : not_a_number;
    Halves halves = __builtin_convertvector(chosen, Halves);
    std::memcpy(to, &halves, sizeof halves);
}

inline Floats broadcast(float value) { return value - Floats{}; }

inline float sum(Floats v) {
    typedef float Eight __attribute__((vector_size(32)));
    typedef float Four __attribute__((vector_size(16)));
    Eight eight = __builtin_shufflevector(v, v, 0, 1, 2, 3, 4, 5, 6, 7) +
                  __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15);
    Four four = __builtin_shufflevector(eight, eight, 0, 1, 2, 3) + __builtin_shufflevector(eight, eight, 4, 5, 6, 7);
    return (four[0] + four[2]) + (four[1] + four[3]);
}

inline Floats larger(Floats a, Floats b) { return a > b ? a : b; }

inline float largest(Floats v) {
    v = larger(v, __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7));
    v = larger(v, __builtin_shufflevector(v, v, 4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11));
    v = larger(v, __builtin_shufflevector(v, v, 2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13));
    return std::max(v[0], v[1]);
}

// The sum of each of sixteen vectors, in order, for a third of what sixteen calls of `sum` take: halves of vectors are
// put side by side and added, four times. Each time the vectors' order is interleaved, hence the reversed bits.
inline Floats sums(const Floats v[LANES]) {
    static constexpr int BITS_REVERSED[LANES] = {0, 8, 4, 12, 2, 10, 6, 14, 1, 9, 5, 13, 3, 11, 7, 15};
    Floats a[8], b[4], c[2];
    for (int i = 0; i < 8; i++) {
        Floats x = v[BITS_REVERSED[i]], y = v[BITS_REVERSED[i + 8]];
        a[i] = __builtin_shufflevector(x, y, 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23) +
               __builtin_shufflevector(x, y, 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
    }
    for (int i = 0; i < 4; i++)
        b[i] = __builtin_shufflevector(a[i], a[i + 4], 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27) +
               __builtin_shufflevector(a[i], a[i + 4], 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31);
    for (int i = 0; i < 2; i++)
        c[i] = __builtin_shufflevector(b[i], b[i + 2], 0, 1, 4, 5, 8, 9, 12, 13, 16, 17, 20, 21, 24, 25, 28, 29) +
               __builtin_shufflevector(b[i], b[i + 2], 2, 3, 6, 7, 10, 11, 14, 15, 18, 19, 22, 23, 26, 27, 30, 31);
    return __builtin_shufflevector(c[0], c[1], 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30) +
           __builtin_shufflevector(c[0], c[1], 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
}

// What a dot product takes in at once: LANES floats, or twice as many bfloat16 where the CPU multiplies these.
template <class T>
struct Unit {
    static constexpr int SIZE = LANES;
    typedef Floats Values;
    static Values get(const T* from) { return load(from); }
    static Floats add(Floats total, Values a, Values b) { return total + a * b; }
};

#if defined(__AVX512BF16__)
template <>
struct Unit<bfloat16> {
    static constexpr int SIZE = 2 * LANES;
    typedef __m512bh Values;
    static Values get(const bfloat16* from) { return (__m512bh)_mm512_loadu_si512(from); }
    static Floats add(Floats total, Values a, Values b) { return _mm512_dpbf16_ps(total, a, b); }
};
#endif

// e to the x, within 2 units in the last place; 0 below -87, e^88 above 88, NaN for NaN.
inline Floats exponential(Floats x) {
    Floats low = broadcast(-87.0f), high = broadcast(88.0f);
    Ints underflows = x < low;
    x = underflows ? low : x;
    x = x > high ? high : x;
    // x = n ln 2 + r; adding and subtracting 1.5 · 2^23 rounds to a whole number.
    Floats magic = broadcast(12582912.0f);
    Floats shifted = x * 1.44269504f + magic;
    Floats whole = shifted - magic;
    Floats r = x - whole * 0.693359375f + whole * 2.12194440e-4f;
    Floats p = broadcast(1.9875691500e-4f);
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    Ints exponent = __builtin_convertvector(whole, Ints) << 23;
    Floats result = (Floats)((Ints)p + exponent);
    result = underflows ? Floats{} : result;
    return (x == x) ? result : x;
}
