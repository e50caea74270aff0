// Linears whose weights have 8 or 4 bits, over activations quantized as they come.
//
// A weight is unsigned codes with a float scale (and, unless it is symmetric, an offset) for each
// output and group of inputs; activations are signed 8-bit codes with a scale for each token and
// group. Within a group the product is exact integers, four inputs at a time (`dot4`: AVX512-VNNI's
// vpdpbusd where there is one); groups are added up in float32:
//
//     y[t,n] = sum over g of  a_scale[t,g] * (scale[n,g] * dot(code, a) + offset[n,g] * sum(a))
//
// A symmetric weight's offset is -scale * 2^(bits-1): its integer sum starts at -2^(bits-1) * sum(a)
// instead, and the offset costs nothing.
//
// The weight is a sequence of panels of 64 outputs, read from the first byte to the last:
//
//     [N / 64][G] { scales[64], offsets[64] (if any), codes[group_length / step][64][4] }
//
// A step is 4 inputs in 8 bits, and 8 in 4 bits: of these the first four are the low nibbles of a
// word and the last four the high ones, so that an `and` and a shift give two operands of `dot4`.
// Groups, outputs and activations are padded with zeros to whole steps and panels.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include <omp.h>

#include "ops.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace penstock {

constexpr int64_t kPanel = 64;
constexpr int64_t kStepBytes = kPanel * 4;
constexpr int64_t kCacheLine = 64;

// What a panel looks like, beyond the number of bits. Mirrored by `_Layout` in quantized.py.
struct PanelLayout {
    int64_t num_outputs, num_groups, group_length;  // the last padded to whole steps
    int32_t half_scales;                            // scales and offsets are float16, not float32
    int32_t has_offsets;

    int64_t num_panels() const { return (num_outputs + kPanel - 1) / kPanel; }
    int64_t scale_bytes() const { return half_scales ? 2 : 4; }
    int64_t header_bytes() const { return kPanel * scale_bytes() * (has_offsets ? 2 : 1); }
    int64_t group_bytes(int bits) const {
        return header_bytes() + kPanel * group_length * bits / 8;
    }
    int64_t panel_bytes(int bits) const { return num_groups * group_bytes(bits); }
};

// Mirrored by `_LinearArgs` in quantized.py.
struct FewBitsLinear {
    const int64_t* num_tokens;
    const int8_t* codes_TK;    // [T, num_groups * group_length]
    const float* scales_TG;    // of the activations
    const int32_t* sums_TG;    // of the codes
    const uint8_t* panels;
    const float* bias_N;       // padded to whole panels; or null
    void* out_TN;              // contiguous
    int64_t is_bf16;           // out, else float32
    PanelLayout layout;
};

inline float half_to_float(uint16_t half) {
    const uint32_t magnitude = half & 0x7fffu, sign = uint32_t(half & 0x8000u) << 16;
    if (magnitude < 0x400u) {  // subnormal: multiples of 2^-24
        const float small = float(magnitude) * 0x1p-24f;
        return sign ? -small : small;
    }
    const uint32_t bits = sign | ((magnitude << 13) + (112u << 23));
    float out;
    std::memcpy(&out, &bits, sizeof out);
    return out;
}

// kLanes scales (or offsets).
inline Vec load_floats(const uint8_t* from) { return load(reinterpret_cast<const float*>(from)); }
inline Vec load_halves(const uint8_t* from) {
#if defined(__AVX512F__)
    return (Vec)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
#elif defined(__F16C__) && defined(__AVX__)
    return (Vec)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
#else
    uint16_t halves[kLanes];
    std::memcpy(halves, from, sizeof halves);
    Vec out;
    for (int i = 0; i < kLanes; i++) out[i] = half_to_float(halves[i]);
    return out;
#endif
}

// dot4(acc, w, a): acc[i] += sum over j < 4 of unsigned byte j of w[i] * signed byte j of a. `spread`
// makes the operand a of four bytes once for many w. Nothing saturates: what has no instruction for
// 8 bits multiplies in 16.
#if defined(__AVX512VNNI__)
constexpr const char* kDotUnit = "AVX512-VNNI";
typedef __m512i Spread;
inline Spread spread(int32_t four) { return _mm512_set1_epi32(four); }
inline VecI32 dot4(VecI32 acc, VecU32 w, Spread a) {
    return (VecI32)_mm512_dpbusd_epi32((__m512i)acc, (__m512i)w, a);
}
#elif defined(__AVXVNNI__) && !defined(__AVX512F__)
constexpr const char* kDotUnit = "AVX-VNNI";
typedef __m256i Spread;
inline Spread spread(int32_t four) { return _mm256_set1_epi32(four); }
inline VecI32 dot4(VecI32 acc, VecU32 w, Spread a) {
    return (VecI32)_mm256_dpbusd_avx_epi32((__m256i)acc, (__m256i)w, a);
}
#elif defined(__AVX512BW__) || (defined(__AVX2__) && !defined(__AVX512F__)) || \
    (defined(__SSE2__) && !defined(__AVX__))
#if defined(__AVX512BW__)
constexpr const char* kDotUnit = "AVX-512";
inline VecI32 multiply_pairs(VecU32 w, VecI32 a) {
    return (VecI32)_mm512_madd_epi16((__m512i)w, (__m512i)a);
}
#elif defined(__AVX2__)
constexpr const char* kDotUnit = "AVX2";
inline VecI32 multiply_pairs(VecU32 w, VecI32 a) {
    return (VecI32)_mm256_madd_epi16((__m256i)w, (__m256i)a);
}
#else
constexpr const char* kDotUnit = "SSE2";
inline VecI32 multiply_pairs(VecU32 w, VecI32 a) {
    return (VecI32)_mm_madd_epi16((__m128i)w, (__m128i)a);
}
#endif
struct Spread {
    VecI32 even, odd;  // bytes 0 and 2, 1 and 3, as pairs of 16 bits
};
inline Spread spread(int32_t four) {
    const auto byte = [four](int j) { return uint32_t(uint16_t(int8_t(uint32_t(four) >> 8 * j))); };
    const int32_t even = int32_t(byte(0) | byte(2) << 16), odd = int32_t(byte(1) | byte(3) << 16);
    return {even - VecI32{}, odd - VecI32{}};
}
inline VecI32 dot4(VecI32 acc, VecU32 w, const Spread& a) {
    const VecU32 even = w & 0x00ff00ffu, odd = (w >> 8) & 0x00ff00ffu;
    return acc + multiply_pairs(even, a.even) + multiply_pairs(odd, a.odd);
}
#else
constexpr const char* kDotUnit = "generic";
typedef int32_t Spread;
inline Spread spread(int32_t four) { return four; }
inline VecI32 dot4(VecI32 acc, VecU32 w, Spread a) {
    for (int j = 0; j < 4; j++)
        acc += (VecI32)((w >> 8 * j) & 0xffu) * int32_t(int8_t(uint32_t(a) >> 8 * j));
    return acc;
}
#endif

// Accumulators are kMaxRows x kMaxVecs registers; the rest hold operands.
constexpr int kMaxRows = kLanes == 16 ? 6 : 2;
constexpr int kMaxVecs = 4;

// What is fetched into the cache while a panel is read: `per_group` lines as a group of inputs
// begins and `per_step` with each of its steps, from `next` on.
struct Prefetch {
    const uint8_t* next = nullptr;
    int per_group = 0, per_step = 0;
    int64_t group_stride = 0, step_stride = 0;

    void group() {
        for (int i = 0; i < per_group; i++) __builtin_prefetch(next + i * kCacheLine);
        next += group_stride;
    }
    void step() {
        for (int i = 0; i < per_step; i++) __builtin_prefetch(next + i * kCacheLine);
        next += step_stride;
    }
};

// kVecs vectors of the weight's words from `from` on; in 4 bits, the low or the high nibbles.
template <int kBits, int kHalf, int kVecs>
inline __attribute__((always_inline)) void load_codes(VecU32 (&w)[kVecs], const uint8_t* from) {
#pragma GCC unroll 4
    for (int j = 0; j < kVecs; j++) {
        std::memcpy(&w[j], from + j * sizeof(VecU32), sizeof(VecU32));
        if (kBits == 4) w[j] = (kHalf == 0 ? w[j] : w[j] >> 4) & 0x0f0f0f0fu;
    }
}

template <int kRows, int kVecs>
inline __attribute__((always_inline)) void add_products(VecI32 (&acc)[kRows][kVecs],
                                                        const VecU32 (&w)[kVecs],
                                                        const int8_t* codes, int64_t stride) {
#pragma GCC unroll 6
    for (int m = 0; m < kRows; m++) {
        int32_t four;
        std::memcpy(&four, codes + m * stride, sizeof four);
        const Spread a = spread(four);
#pragma GCC unroll 4
        for (int j = 0; j < kVecs; j++) acc[m][j] = dot4(acc[m][j], w[j], a);
    }
}

template <typename T>
inline void store_row(T* to, const Vec* values, int num_vecs, int64_t num_outputs) {
    for (int j = 0; j < num_vecs; j++) {
        const int64_t left = num_outputs - j * kLanes;
        if (left >= kLanes) {
            store(to + j * kLanes, values[j]);
        } else {
            for (int64_t i = 0; i < left; i++) to[j * kLanes + i] = from_float<T>(values[j][i]);
        }
    }
}

// What a group adds to the outputs: factors[m] * scale * sum, for the integers it has summed up.
template <int kRows, int kVecs>
inline __attribute__((always_inline)) void add_group(Vec (&out)[kRows][kVecs],
                                                     const VecI32 (&acc)[kRows][kVecs],
                                                     const float* factors, int64_t factors_stride,
                                                     const uint8_t* scales, int64_t column,
                                                     bool half) {
    Vec scale[kVecs];
    if (half) {
#pragma GCC unroll 4
        for (int j = 0; j < kVecs; j++) scale[j] = load_halves(scales + (column + j * kLanes) * 2);
    } else {
#pragma GCC unroll 4
        for (int j = 0; j < kVecs; j++) scale[j] = load_floats(scales + (column + j * kLanes) * 4);
    }
#pragma GCC unroll 6
    for (int m = 0; m < kRows; m++) {
        const Vec factor = splat(factors[m * factors_stride]);
#pragma GCC unroll 4
        for (int j = 0; j < kVecs; j++)
            out[m][j] += __builtin_convertvector(acc[m][j], Vec) * (scale[j] * factor);
    }
}

// Tokens row .. row + kRows with kVecs vectors of outputs, from `column` of `panel` on.
template <int kBits, int kRows, int kVecs>
void multiply_block(const FewBitsLinear& call, int64_t panel, int64_t column, int64_t row,
                    Prefetch ahead) {
    const PanelLayout& layout = call.layout;
    const int64_t length = layout.group_length, groups = layout.num_groups;
    const int64_t stride = groups * length, header_bytes = layout.header_bytes();
    const int64_t offsets_at = kPanel * layout.scale_bytes();
    const bool half = layout.half_scales, has_offsets = layout.has_offsets;
    const int32_t start_factor = has_offsets ? 0 : -(1 << (kBits - 1));
    const uint8_t* group = call.panels + panel * layout.panel_bytes(kBits);
    const int8_t* codes = call.codes_TK + row * stride;
    Vec out[kRows][kVecs] = {};
    for (int64_t g = 0; g < groups; g++) {
        const int32_t* sums = call.sums_TG + row * groups + g;
        const float* factors = call.scales_TG + row * groups + g;
        VecI32 acc[kRows][kVecs];
#pragma GCC unroll 6
        for (int m = 0; m < kRows; m++) {
            const VecI32 start = sums[m * groups] * start_factor - VecI32{};
#pragma GCC unroll 4
            for (int j = 0; j < kVecs; j++) acc[m][j] = start;
        }
        ahead.group();
        const uint8_t* words = group + header_bytes + column * 4;
        for (int64_t k = 0; k < length; k += kBits == 8 ? 4 : 8) {
            ahead.step();
            VecU32 w[kVecs];
            load_codes<kBits, 0, kVecs>(w, words);
            add_products<kRows, kVecs>(acc, w, codes + k, stride);
            if (kBits == 4) {
                load_codes<kBits, 1, kVecs>(w, words);
                add_products<kRows, kVecs>(acc, w, codes + k + 4, stride);
            }
            words += kStepBytes;
        }
        add_group(out, acc, factors, groups, group, column, half);
        if (has_offsets) {
#pragma GCC unroll 6
            for (int m = 0; m < kRows; m++)
#pragma GCC unroll 4
                for (int j = 0; j < kVecs; j++) acc[m][j] = sums[m * groups] - VecI32{};
            add_group(out, acc, factors, groups, group + offsets_at, column, half);
        }
        codes += length;
        group += layout.group_bytes(kBits);
    }
    const int64_t n = panel * kPanel + column, left = layout.num_outputs - n;
    for (int m = 0; m < kRows; m++) {
        for (int j = 0; call.bias_N != nullptr && j < kVecs; j++)
            out[m][j] += load(call.bias_N + n + j * kLanes);
        const int64_t at = (row + m) * layout.num_outputs + n;
        if (call.is_bf16) store_row(static_cast<BFloat16*>(call.out_TN) + at, out[m], kVecs, left);
        else store_row(static_cast<float*>(call.out_TN) + at, out[m], kVecs, left);
    }
}

// How the work of one product is cut: into panels, and where there are too few of them for the
// threads, each of these into strips of fewer outputs (few tokens) or ranges of tokens (many).
struct Cut {
    int vecs;           // of outputs in a strip
    int64_t strips;     // in a panel
    int64_t row_parts;

    static Cut plan(int64_t num_panels, int64_t num_tokens, int64_t threads) {
        constexpr int64_t kManyTokens = 8 * kMaxRows;  // re-reading a panel for so many costs little
        constexpr int64_t kPanelsEach = 4;             // enough to even out
        Cut best = of(kMaxVecs);
        if (num_panels >= kPanelsEach * threads) return best;
        if (num_tokens >= 2 * kManyTokens) {
            const int64_t wanted = (kPanelsEach * threads + num_panels - 1) / num_panels;
            best.row_parts = std::min(wanted, num_tokens / kManyTokens);
            return best;
        }
        int64_t least = best.rounds(num_panels, threads);
        for (int vecs = kMaxVecs / 2; vecs >= 1; vecs /= 2) {
            const Cut finer = of(vecs);
            const int64_t rounds = finer.rounds(num_panels, threads);
            // A narrower strip is a little slower by itself.
            if (rounds * 10 < least * 9) best = finer, least = rounds;
        }
        return best;
    }

    static Cut of(int vecs) { return {vecs, kPanel / (vecs * kLanes), 1}; }
    // How many vectors of outputs the busiest thread computes.
    int64_t rounds(int64_t num_panels, int64_t threads) const {
        return (num_panels * strips + threads - 1) / threads * vecs;
    }
};

template <int kBits, int kVecs>
void multiply_rows(const FewBitsLinear& call, int64_t panel, int64_t column, int64_t row,
                   int64_t num_rows, const Prefetch& ahead) {
    static_assert(kMaxRows == 6 || kMaxRows == 2, "the cases below");
    switch (num_rows) {
        case 1: return multiply_block<kBits, 1, kVecs>(call, panel, column, row, ahead);
        case 2: return multiply_block<kBits, 2, kVecs>(call, panel, column, row, ahead);
#if defined(__AVX512F__)
        case 3: return multiply_block<kBits, 3, kVecs>(call, panel, column, row, ahead);
        case 4: return multiply_block<kBits, 4, kVecs>(call, panel, column, row, ahead);
        case 5: return multiply_block<kBits, 5, kVecs>(call, panel, column, row, ahead);
        case 6: return multiply_block<kBits, 6, kVecs>(call, panel, column, row, ahead);
#endif
    }
}

// What block `index` of `count` over a panel fetches. A single one looks a little ahead of itself;
// of several the first brings the panel close and all of them share in fetching the next.
template <int kBits>
Prefetch prefetch(const FewBitsLinear& call, const Cut& cut, int64_t panel, int64_t column,
                  int64_t index, int64_t count) {
    constexpr int64_t kAheadBytes = 8192;
    constexpr int kStepLines = kStepBytes / kCacheLine;
    const PanelLayout& layout = call.layout;
    const uint8_t* at = call.panels + panel * layout.panel_bytes(kBits);
    const int header_lines = int(layout.header_bytes() / kCacheLine);
    Prefetch out;
    if (count == 1 || cut.strips > 1) {
        if (index > 0) return out;
        out.next = at + kAheadBytes + column * 4;
        out.per_step = std::max(1, kStepLines / int(cut.strips));
        out.step_stride = kStepBytes;
        out.per_group = cut.strips > 1 ? 0 : header_lines;
        out.group_stride = layout.header_bytes();
        return out;
    }
    // Lines of a step for the first blocks: 2 and 2; 2, 1 and 1; 1, 1, 1 and 1.
    const int64_t sharing = std::min<int64_t>(count, kStepLines);
    const auto before = [sharing](int64_t i) { return (kStepLines * i + sharing - 1) / sharing; };
    if (index >= sharing) return out;
    const int64_t steps = layout.num_groups * layout.group_length / (kBits == 8 ? 4 : 8);
    out.per_step = int(before(index + 1) - before(index));
    out.step_stride = out.per_step * kCacheLine;
    out.next = at + layout.panel_bytes(kBits) + before(index) * steps * kCacheLine;
    if (index == 0) {
        out.per_group = header_lines;
        out.group_stride = layout.header_bytes();
    } else {
        out.next += layout.num_groups * layout.header_bytes();
    }
    return out;
}

// Tokens first .. last with one strip of outputs, in blocks of nearly equal numbers of rows.
template <int kBits>
void multiply_strip(const FewBitsLinear& call, const Cut& cut, int64_t panel, int64_t column,
                    int64_t first, int64_t last) {
    const int64_t rows = last - first, blocks = (rows + kMaxRows - 1) / kMaxRows;
    for (int64_t b = 0; b < blocks; b++) {
        const int64_t from = first + rows * b / blocks, num = first + rows * (b + 1) / blocks - from;
        const Prefetch ahead = prefetch<kBits>(call, cut, panel, column, b, blocks);
        if (cut.vecs == 4) multiply_rows<kBits, 4>(call, panel, column, from, num, ahead);
        else if (cut.vecs == 2) multiply_rows<kBits, 2>(call, panel, column, from, num, ahead);
        else multiply_rows<kBits, 1>(call, panel, column, from, num, ahead);
    }
}

// The operation: all threads of a team call it.
template <int kBits> void few_bits_linear(const FewBitsLinear& call) {
    const int64_t tokens = *call.num_tokens, panels = call.layout.num_panels();
    const Cut cut = Cut::plan(panels, tokens, omp_get_num_threads());
    const int64_t per_panel = cut.strips * cut.row_parts;
#pragma omp for schedule(static)
    for (int64_t item = 0; item < panels * per_panel; item++) {
        const int64_t panel = item / per_panel, part = item % cut.row_parts;
        const int64_t column = item % per_panel / cut.row_parts * cut.vecs * kLanes;
        if (panel * kPanel + column >= call.layout.num_outputs) continue;
        multiply_strip<kBits>(call, cut, panel, column, tokens * part / cut.row_parts,
                              tokens * (part + 1) / cut.row_parts);
    }
}

}  // namespace penstock
