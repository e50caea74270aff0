// Shared by the CPU kernels: vectors of floats as wide as the machine's registers.
//
// They are GCC's generic vectors, so one source serves AVX-512, AVX2, SSE2 and others; only where a
// special instruction pays is it named, under #ifdef.
#pragma once

#include <cstdint>
#include <cstring>

#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

// Everything else is hidden: two builds in one process must not share templates' static variables.
#define PENSTOCK_EXPORT __attribute__((visibility("default")))

namespace penstock {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif
typedef float Vec __attribute__((vector_size(kLanes * sizeof(float))));
typedef uint32_t VecU32 __attribute__((vector_size(kLanes * sizeof(uint32_t))));
typedef int32_t VecI32 __attribute__((vector_size(kLanes * sizeof(int32_t))));
typedef uint16_t VecU16 __attribute__((vector_size(kLanes * sizeof(uint16_t))));

struct BFloat16 {
    uint16_t bits;
};

inline Vec splat(float x) { return x - Vec{}; }

inline float to_float(float x) { return x; }
inline float to_float(BFloat16 x) {
    uint32_t bits = uint32_t(x.bits) << 16;
    float out;
    std::memcpy(&out, &bits, sizeof out);
    return out;
}

template <typename T> inline T from_float(float x);
template <> inline float from_float<float>(float x) { return x; }
template <> inline BFloat16 from_float<BFloat16>(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return {uint16_t((bits >> 16) | 0x40)};  // NaN
    return {uint16_t((bits + 0x7fffu + ((bits >> 16) & 1)) >> 16)};  // round to nearest even
}

inline Vec load(const float* p) {
    Vec out;
    std::memcpy(&out, p, sizeof out);
    return out;
}
inline Vec load(const BFloat16* p) {
    VecU16 half;
    std::memcpy(&half, p, sizeof half);
    VecU32 bits = __builtin_convertvector(half, VecU32) << 16;
    Vec out;
    std::memcpy(&out, &bits, sizeof out);
    return out;
}

// To bfloat16, to the nearest and then to even.
inline VecU16 round_to_bf16(Vec x) {
#ifdef __AVX512BF16__
    return (VecU16)_mm512_cvtneps_pbh((__m512)x);
#else
    VecU32 bits;
    std::memcpy(&bits, &x, sizeof bits);
    VecI32 is_nan = x != x;
    VecU32 rounded = (bits + 0x7fffu + ((bits >> 16) & 1)) >> 16;
    VecU32 quiet = (bits >> 16) | 0x40;
    return __builtin_convertvector(is_nan ? quiet : rounded, VecU16);
#endif
}

inline void store(float* p, Vec x) { std::memcpy(p, &x, sizeof x); }
inline void store(BFloat16* p, Vec x) {
    VecU16 half = round_to_bf16(x);
    std::memcpy(p, &half, sizeof half);
}

// What would be read back after storing x as T.
template <typename T> inline Vec rounded(Vec x);
template <> inline Vec rounded<float>(Vec x) { return x; }
template <> inline Vec rounded<BFloat16>(Vec x) {
    VecU16 half = round_to_bf16(x);
    BFloat16 as[kLanes];
    std::memcpy(as, &half, sizeof half);
    return load(as);
}

// x with its lanes moved down by `count`, for folding a vector in halves.
inline Vec upper(Vec x, int count) {
    VecI32 lanes;
    for (int i = 0; i < kLanes; i++) lanes[i] = (i + count) % kLanes;
    return __builtin_shuffle(x, lanes);
}

inline float sum(Vec x) {
#pragma GCC unroll 4
    for (int count = kLanes / 2; count > 0; count /= 2) x += upper(x, count);
    return x[0];
}

inline float max(Vec x) {
#pragma GCC unroll 4
    for (int count = kLanes / 2; count > 0; count /= 2) {
        const Vec other = upper(x, count);
        x = x > other ? x : other;
    }
    return x[0];
}

// e^x for x <= about 88, to within 2 ulp: x = n ln 2 + r, a degree-6 polynomial in r (the
// coefficients are those of the Cephes library's expf), and n into the exponent. Below the normal
// range, -inf included, the result is 0.
inline Vec exp(Vec x) {
    const Vec low = splat(-87.33654f);
    VecI32 underflow = x < low;
    Vec clamped = underflow ? low : x;
    Vec shifted = clamped * 1.44269504088896341f;
    // Conversion truncates, so this rounds to the nearest integer.
    VecI32 n = __builtin_convertvector(shifted + (shifted < 0 ? splat(-0.5f) : splat(0.5f)), VecI32);
    Vec whole = __builtin_convertvector(n, Vec);
    Vec r = clamped - whole * 0.693359375f + whole * 2.12194440e-4f;
    Vec poly = splat(1.9875691500e-4f);
    poly = poly * r + 1.3981999507e-3f;
    poly = poly * r + 8.3334519073e-3f;
    poly = poly * r + 4.1665795894e-2f;
    poly = poly * r + 1.6666665459e-1f;
    poly = poly * r + 5.0000001201e-1f;
    poly = poly * r * r + r + 1.0f;
    VecI32 exponent = (n + 127) << 23;
    Vec power;
    std::memcpy(&power, &exponent, sizeof power);
    return underflow ? Vec{} : poly * power;
}

// How dot products over T run: kWidth values of an operand at a time.
template <typename T> struct Dot {
    typedef Vec Operand;
    static constexpr int kWidth = kLanes;
    static Operand read(const T* p) { return load(p); }
    static Vec add_product(Vec acc, Operand a, Operand b) { return acc + a * b; }
};

#ifdef __AVX512BF16__
template <> struct Dot<BFloat16> {
    typedef __m512bh Operand;
    static constexpr int kWidth = 32;
    static Operand read(const BFloat16* p) { return (__m512bh)_mm512_loadu_si512(p); }
    static Vec add_product(Vec acc, Operand a, Operand b) {
        return (Vec)_mm512_dpbf16_ps((__m512)acc, a, b);
    }
};
#endif

}  // namespace penstock
