// x_TK * weight_NK^T over a weight packed in panels of 64 outputs.
//
// A panel is [K / pair][64] words of 32 bits: one float32, or two bfloat16 of consecutive inputs.
// So a product walks memory in order, and reads each byte of the weight once however many tokens
// there are (up to a few dozen; then arithmetic is the limit). Every output is summed over its
// inputs in order by one accumulator: a token's result does not depend on what is computed beside
// it, nor on the number of threads.
#pragma once

#include <algorithm>

#include "ops.h"

namespace penstock {

constexpr int kPanel = 64;

struct Linear {
    const int64_t* num_tokens;
    void* out;  // [T][num_outputs]
    const void* x;
    const void* weight;
    const void* bias;  // or null
    int64_t x_stride, out_stride;
    int64_t num_outputs, words;  // words: rows of a panel
    int64_t parts;  // into how many pieces a panel is cut, where there are few panels: 1, 2 or 4
};

// Products of one word of the weight with the same inputs of a token.
template <typename T> struct Word;

template <> struct Word<float> {
    typedef float Input;
    typedef Vec Weight;
    static constexpr int kPair = 1;
    static Weight read(const uint32_t* p) { return load(reinterpret_cast<const float*>(p)); }
    static Input input(const float* x) { return *x; }
    static Vec add(Vec acc, Weight w, Input x) { return acc + w * x; }
};

#ifdef __AVX512BF16__
template <> struct Word<BFloat16> {
    typedef int Input;
    typedef __m512bh Weight;
    static constexpr int kPair = 2;
    static Weight read(const uint32_t* p) { return (__m512bh)_mm512_loadu_si512(p); }
    static Input input(const BFloat16* x) {
        int pair;
        std::memcpy(&pair, x, sizeof pair);
        return pair;
    }
    static Vec add(Vec acc, Weight w, Input x) {
        return (Vec)_mm512_dpbf16_ps((__m512)acc, (__m512bh)_mm512_set1_epi32(x), w);
    }
};
#else
// A bfloat16 is the upper half of a float32.
template <> struct Word<BFloat16> {
    struct Input {
        float low, high;
    };
    typedef VecU32 Weight;
    static constexpr int kPair = 2;
    static Weight read(const uint32_t* p) {
        VecU32 out;
        std::memcpy(&out, p, sizeof out);
        return out;
    }
    static Input input(const BFloat16* x) { return {to_float(x[0]), to_float(x[1])}; }
    static Vec add(Vec acc, Weight w, Input x) {
        const VecU32 low = w << 16, high = w & 0xffff0000u;
        return acc + (Vec)low * x.low + (Vec)high * x.high;
    }
};
#endif

// Tokens and vectors of outputs that are computed together: as many accumulators as there are
// registers for.
#ifdef __AVX512F__
constexpr int kBlockTokens = 6;
constexpr int kBlockVecs = 4;
#else
constexpr int kBlockTokens = 4;
constexpr int kBlockVecs = 2;
#endif

// What a pass over a panel asks memory for while it computes: `lines` cache lines for each row of
// words, one after the other from `at` on.
struct Ahead {
    const char* at;
    int lines;
};

constexpr int kRowBytes = kPanel * 4;
constexpr int kRowLines = kRowBytes / 64;

// Num tokens by Vecs vectors of outputs, summed over all inputs.
template <typename T, int Num, int Vecs, int Lines>
inline void block(const uint32_t* weight, const char* ahead, const T* x, int64_t x_stride,
                  int64_t words, Vec (&acc)[Num][Vecs]) {
    typedef Word<T> W;
    for (int i = 0; i < Num; i++)
        for (int v = 0; v < Vecs; v++) acc[i][v] = Vec{};
    for (int64_t k = 0; k < words; k++) {
        for (int line = 0; line < Lines; line++)
            __builtin_prefetch(ahead + (k * Lines + line) * 64, 0, 2);
        typename W::Weight row[Vecs];
        for (int v = 0; v < Vecs; v++) row[v] = W::read(weight + k * kPanel + v * kLanes);
#pragma GCC unroll 8
        for (int i = 0; i < Num; i++) {
            const typename W::Input input = W::input(x + i * x_stride + k * W::kPair);
#pragma GCC unroll 4
            for (int v = 0; v < Vecs; v++) acc[i][v] = W::add(acc[i][v], row[v], input);
        }
    }
}

template <typename T, int Num, int Vecs>
inline void sums(const uint32_t* weight, Ahead ahead, const T* x, int64_t x_stride, int64_t words,
                 Vec (&acc)[Num][Vecs]) {
    switch (ahead.lines) {
        case 0: block<T, Num, Vecs, 0>(weight, ahead.at, x, x_stride, words, acc); break;
        case 1: block<T, Num, Vecs, 1>(weight, ahead.at, x, x_stride, words, acc); break;
        case 2: block<T, Num, Vecs, 2>(weight, ahead.at, x, x_stride, words, acc); break;
        default: block<T, Num, Vecs, 4>(weight, ahead.at, x, x_stride, words, acc); break;
    }
}

// Tokens [first, first + Num), outputs [column, column + Vecs * kLanes).
template <typename T, int Num, int Vecs>
inline void multiply(const Linear& call, const uint32_t* weight, Ahead ahead, int64_t first,
                     int64_t column) {
    Vec acc[Num][Vecs];
    sums<T, Num, Vecs>(weight, ahead, static_cast<const T*>(call.x) + first * call.x_stride,
                       call.x_stride, call.words, acc);
    const int64_t left = call.num_outputs - column;
    const T* bias = static_cast<const T*>(call.bias);
    for (int i = 0; i < Num; i++) {
        T* out = static_cast<T*>(call.out) + (first + i) * call.out_stride + column;
        if (left >= Vecs * kLanes) {
            for (int v = 0; v < Vecs; v++) {
                if (bias != nullptr) acc[i][v] += load(bias + column + v * kLanes);
                store(out + v * kLanes, acc[i][v]);
            }
        } else {
            for (int64_t n = 0; n < left; n++) {
                const float b = bias != nullptr ? to_float(bias[column + n]) : 0.0f;
                out[n] = from_float<T>(acc[i][n / kLanes][n % kLanes] + b);
            }
        }
    }
}

template <typename T, int Vecs>
inline void multiply_tokens(const Linear& call, const uint32_t* weight, Ahead ahead, int64_t first,
                            int num, int64_t column) {
    switch (num) {
        case 1: multiply<T, 1, Vecs>(call, weight, ahead, first, column); break;
        case 2: multiply<T, 2, Vecs>(call, weight, ahead, first, column); break;
        case 3: multiply<T, 3, Vecs>(call, weight, ahead, first, column); break;
        case 4: multiply<T, 4, Vecs>(call, weight, ahead, first, column); break;
#ifdef __AVX512F__
        case 5: multiply<T, 5, Vecs>(call, weight, ahead, first, column); break;
        case 6: multiply<T, 6, Vecs>(call, weight, ahead, first, column); break;
#endif
    }
}

// One panel (or a part of it) for all tokens. The first block of tokens brings the panel into the
// cache; where there are several blocks, each asks for its share of the next panel, so that memory
// is never idle while they compute.
template <typename T, int Vecs>
void multiply_panel(const Linear& call, int64_t panel, int64_t from_column, int64_t to_column) {
    const int64_t num_tokens = *call.num_tokens;
    const int64_t num_blocks = (num_tokens + kBlockTokens - 1) / kBlockTokens;
    const uint32_t* weight = static_cast<const uint32_t*>(call.weight) + panel * call.words * kPanel;
    constexpr int64_t kAheadBytes = 4096;
    const bool whole = to_column - from_column == kPanel;
    int64_t first = 0;
    for (int64_t b = 0; b < num_blocks; b++) {
        const int num = int(num_tokens / num_blocks + (b < num_tokens % num_blocks));
        for (int64_t column = from_column; column < to_column; column += Vecs * kLanes) {
            // Of a part of a panel the processor's own prefetching finds the stride.
            Ahead ahead{reinterpret_cast<const char*>(weight), 0};
            if (whole && column == 0 && num_blocks == 1) {
                ahead = {ahead.at + kAheadBytes, kRowLines};
            } else if (whole && column == 0 && b < kRowLines) {
                const int lines = num_blocks == 2 ? 2 : 1;
                ahead = {ahead.at + call.words * (kRowBytes + b * lines * 64), lines};
            }
            multiply_tokens<T, Vecs>(call, weight + column, ahead, first, num,
                                     panel * kPanel + column);
        }
        first += num;
    }
}

template <typename T> void linear(const Linear& call) {
    const int64_t num_panels = (call.num_outputs + kPanel - 1) / kPanel;
    const int64_t width = kPanel / call.parts;
#pragma omp for schedule(static)
    for (int64_t i = 0; i < num_panels * call.parts; i++) {
        const int64_t panel = i / call.parts, from = i % call.parts * width;
        if (width < kBlockVecs * kLanes)
            multiply_panel<T, 1>(call, panel, from, from + width);
        else
            multiply_panel<T, kBlockVecs>(call, panel, from, from + width);
    }
}

// A row-major weight into panels; outputs beyond the last are zeros.
struct Pack {
    const int64_t* num_panels;  // where other operations count tokens
    uint32_t* out;
    const uint32_t* weight;
    int64_t rows, words;
};

inline void pack(const Pack& call) {
    constexpr int64_t kLineWords = 16;  // a cache line of a row at a time
    const int64_t words = call.words;
#pragma omp for schedule(static)
    for (int64_t panel = 0; panel < *call.num_panels; panel++) {
        const uint32_t* from = call.weight + panel * kPanel * words;
        uint32_t* to = call.out + panel * kPanel * words;
        const int64_t rows = std::min<int64_t>(kPanel, call.rows - panel * kPanel);
        for (int64_t first = 0; first < words; first += kLineWords) {
            const int64_t end = std::min(first + kLineWords, words);
            for (int64_t r = 0; r < kPanel; r++)
                for (int64_t w = first; w < end; w++)
                    to[w * kPanel + r] = r < rows ? from[r * words + w] : 0;
        }
    }
}

// Rows `ids` of a packed weight, as an embedding wants them.
struct Embed {
    const int64_t* num_tokens;
    void* out;  // [T][columns]
    const int64_t* ids;
    const void* weight;
    int64_t words, columns;
};

template <typename T> void embed(const Embed& call) {
    constexpr int kPair = Word<T>::kPair;
#pragma omp for schedule(static)
    for (int64_t t = 0; t < *call.num_tokens; t++) {
        const int64_t id = call.ids[t];
        const uint32_t* from = static_cast<const uint32_t*>(call.weight) +
                               id / kPanel * call.words * kPanel + id % kPanel;
        T* to = static_cast<T*>(call.out) + t * call.columns;
        for (int64_t k = 0; k < call.words; k++)
            std::memcpy(to + k * kPair, from + k * kPanel, sizeof(uint32_t));
    }
}

}  // namespace penstock
