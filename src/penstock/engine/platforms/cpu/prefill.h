// Attention for rows of many queries, which is bound by arithmetic.
//
// The blocked online softmax of FlashAttention (Dao, 2023), with queries across the vector lanes:
// scores are held transposed, [key][query], and so is the output, [dim][query]. Then the maximum
// and the sum of a softmax need no reduction across lanes, and of each product one operand is a
// broadcast: keys are read where they stand, and only values are re-ordered.
//
// A query's result does not depend on the tile that it is in: keys are taken kTileKeys at a time
// from position 0 on (or from a multiple of that before its window), and those that it may not see
// add exact zeros.
#pragma once

#include <algorithm>
#include <type_traits>

#include "attention.h"

namespace penstock {

// How products over T run. An Element holds kPair consecutive values of the summed dimension.
template <typename T> struct Product {
    typedef float Element;
    typedef Vec Operand;
    static constexpr int kPair = 1;
    // Whether an array of T is one of Elements as it stands.
    static constexpr bool kInPlace = std::is_same<T, float>::value;
    // `count` elements of consecutive values, at most kLanes.
    static Vec row(const T* values, int) { return load(values); }
    static Operand read(const Element* p) { return load(p); }
    static Vec add(Vec acc, Element a, Operand b) { return acc + a * b; }
    static Vec pair(const Vec* rows) { return rows[0]; }
    static void write_weights(Element* to, const Vec* weights) { store(to, weights[0]); }
    static void write_key(Element* to, Vec values) { store(to, values); }
};

#ifdef __AVX512BF16__
template <> struct Product<BFloat16> {
    typedef uint32_t Element;
    typedef __m512bh Operand;
    static constexpr int kPair = 2;
    static constexpr bool kInPlace = true;
    static Vec row(const BFloat16* values, int count) {
        return (Vec)_mm512_maskz_loadu_epi32(__mmask16((1u << count) - 1), values);
    }
    static Operand read(const Element* p) { return (__m512bh)_mm512_loadu_si512(p); }
    static Vec add(Vec acc, Element a, Operand b) {
        return (Vec)_mm512_dpbf16_ps((__m512)acc, (__m512bh)_mm512_set1_epi32(int(a)), b);
    }
    // Two rows whose low halves are 0 become the low and high halves of each lane.
    static Vec pair(const Vec* rows) {
        return (Vec)(((VecU32)rows[0] >> 16) | (VecU32)rows[1]);
    }
    static void write_weights(Element* to, const Vec* weights) {
        const VecU32 low = __builtin_convertvector(round_to_bf16(weights[0]), VecU32);
        const VecU32 high = __builtin_convertvector(round_to_bf16(weights[1]), VecU32);
        const VecU32 out = low | high << 16;
        std::memcpy(to, &out, sizeof out);
    }
    static void write_key(Element* to, Vec values) {
        store(reinterpret_cast<BFloat16*>(to), values);
    }
};
#endif

constexpr int kTileVecs = 4;
constexpr int kTileQueries = kTileVecs * kLanes;
constexpr int kTileKeys = 128;
constexpr int kRows = 4;  // kRows x kTileVecs accumulators at a time
constexpr int kMaxDim = 256;
constexpr float kHidden = -1e30f;  // a masked score; finite, so that differences stay finite
constexpr float kLog2E = 1.44269504088896341f;

template <typename T> struct Tile {
    typedef typename Product<T>::Element Element;
    static constexpr int kPair = Product<T>::kPair;

    int64_t dim, first_position;
    int num_queries;
    VecI32 last_key[kTileVecs];
    Vec top[kTileVecs], total[kTileVecs], keep[kTileVecs];  // top: of log2(e) * scale * score
    alignas(64) Element queries[kMaxDim / kPair][kTileQueries];
    alignas(64) Element keys[kTileKeys * kMaxDim / kPair];    // [key][dim / pair], if not in place
    alignas(64) Element values[kMaxDim * kTileKeys / kPair];  // [dim / lanes][key / pair][lane]
    alignas(64) float scores[kTileKeys][kTileQueries];
    alignas(64) Element weights[kTileKeys / kPair][kTileQueries];
    alignas(64) float out[kMaxDim][kTileQueries];
    const Element* key_rows[kTileKeys];
    float key_scales[kTileKeys], value_scales[kTileKeys];  // of int8
};

// kLanes x kLanes values, in place: log2(kLanes) rounds that swap blocks across the diagonal.
inline void transpose(Vec (&rows)[kLanes]) {
#pragma GCC unroll 4
    for (int step = 1; step < kLanes; step *= 2) {
        VecI32 upper_half, lower_half;
        for (int lane = 0; lane < kLanes; lane++) {
            upper_half[lane] = lane & step ? kLanes + lane - step : lane;
            lower_half[lane] = lane & step ? kLanes + lane : lane + step;
        }
#pragma GCC unroll 16
        for (int i = 0; i < kLanes; i++) {
            if (i & step) continue;
            const Vec a = rows[i], b = rows[i + step];
            rows[i] = __builtin_shuffle(a, b, upper_half);
            rows[i + step] = __builtin_shuffle(a, b, lower_half);
        }
    }
}

// 2^x for x <= 127 to within 3e-7 of the result; 0 below the normal range. The polynomial is the
// minimax one of degree 5 on [-0.5, 0.5].
inline Vec exp2(Vec x) {
    const Vec magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
    const Vec shifted = x + magic;
    const Vec r = x - (shifted - magic);
    Vec poly = splat(1.32647272e-3f);
    poly = poly * r + 9.67151281e-3f;
    poly = poly * r + 5.55073374e-2f;
    poly = poly * r + 2.40222421e-1f;
    poly = poly * r + 6.93146978e-1f;
    poly = poly * r + 1.0f;
    const VecU32 power = (VecU32)poly + ((VecU32)shifted << 23);
    return x < -126.0f ? Vec{} : (Vec)power;
}

template <typename T>
void start_tile(const Call& call, const Row& row, int64_t head, int64_t first, Tile<T>& tile) {
    const int64_t group = group_of(call);
    tile.dim = call.head_dim;
    tile.num_queries = int(std::min<int64_t>(kTileQueries, row.num_tokens * group - first));
    tile.first_position = row.start + first / group;
    const T* from[kTileQueries];
    for (int i = 0; i < kTileQueries; i++) {
        const int64_t query = first + std::min(i, tile.num_queries - 1);
        from[i] = query_at(call, static_cast<const T*>(call.q), call.q_token_stride, row, head,
                           query);
        tile.last_key[i / kLanes][i % kLanes] = int32_t(row.start + query / group);
    }
    const int64_t steps = tile.dim / Tile<T>::kPair;
    for (int v = 0; v < kTileVecs; v++) {
        for (int64_t step = 0; step < steps; step += kLanes) {
            // Where a dim of 16 or 48 leaves half a vector of pairs, the other half is not used.
            const int count = int(std::min<int64_t>(kLanes, steps - step));
            Vec rows[kLanes];
            for (int i = 0; i < kLanes; i++)
                rows[i] = Product<T>::row(from[v * kLanes + i] + step * Tile<T>::kPair, count);
            transpose(rows);
            for (int i = 0; i < count; i++)
                std::memcpy(tile.queries[step + i] + v * kLanes, &rows[i], sizeof(Vec));
        }
        tile.top[v] = splat(kHidden);
        tile.total[v] = Vec{};
    }
    std::memset(tile.out, 0, sizeof(float) * tile.dim * kTileQueries);
}

// Finds keys [first, first + count) and copies their values, re-ordered, up to `padded`: what lies
// behind the last key may hold anything, so its values become 0 and its scores will be masked.
template <typename T, typename S>
void load_keys(const Call& call, const Row& row, int64_t head, int64_t first, int count, int padded,
               Tile<T>& tile) {
    typedef Product<T> P;
    constexpr int kPair = P::kPair;
    const int64_t dim = tile.dim;
    static const S zeros[kMaxDim] = {};
    const S* values[kTileKeys];
    for (int i = 0; i < padded; i++) {
        const int64_t position = first + i, block = position / call.block_tokens;
        const S* keys = keys_of<S>(call, row, block, head);
        const S* key = keys + position % call.block_tokens * dim;
        values[i] = i < count ? key + values_offset<S>(call) : zeros;
        if constexpr (std::is_same<S, int8_t>::value) {
            const int64_t at = position % call.block_tokens;
            tile.key_scales[i] = scales_of(call, keys)[at];
            tile.value_scales[i] =
                i < count ? scales_of(call, keys + values_offset<S>(call))[at] : 0.0f;
        }
        if constexpr (P::kInPlace && std::is_same<T, S>::value) {
            tile.key_rows[i] = reinterpret_cast<const typename P::Element*>(key);
        } else {
            typename P::Element* to = tile.keys + i * dim / kPair;
            tile.key_rows[i] = to;
            for (int64_t d = 0; d < dim; d += kLanes) P::write_key(to + d / kPair, load(key + d));
        }
    }
    const int64_t pairs = padded / kPair;
    for (int64_t pair = 0; pair < pairs; pair++)
        for (int64_t d = 0; d < dim; d += kLanes) {
            Vec rows[kPair];
            for (int i = 0; i < kPair; i++) rows[i] = load(values[pair * kPair + i] + d);
            const Vec both = P::pair(rows);
            std::memcpy(tile.values + d * pairs + pair * kLanes, &both, sizeof both);
        }
}

// acc[r][lane] += sum over n of rows[r][n * step] * b[n][lane].
template <typename T>
inline void multiply(Vec (&acc)[kRows][kTileVecs], const typename Product<T>::Element* const* rows,
                     int64_t step, const typename Product<T>::Element (*b)[kTileQueries],
                     int64_t count) {
    typedef Product<T> P;
    for (int64_t n = 0; n < count; n++) {
        typename P::Operand lanes[kTileVecs];
        for (int v = 0; v < kTileVecs; v++) lanes[v] = P::read(b[n] + v * kLanes);
        for (int r = 0; r < kRows; r++)
            for (int v = 0; v < kTileVecs; v++)
                acc[r][v] = P::add(acc[r][v], rows[r][n * step], lanes[v]);
    }
}

// Asks for keys [first, first + kRows) and their values, which the next round of the tile reads: the
// processor's own prefetching ends with the page, and a block's keys of one head are a page.
template <typename S>
inline void prefetch_keys(const Call& call, const Row& row, int64_t head, int64_t first,
                          int64_t end) {
    if (first >= end) return;
    const S* at = keys_of<S>(call, row, first / call.block_tokens, head) +
                  first % call.block_tokens * call.head_dim;
    const char* keys = reinterpret_cast<const char*>(at);
    const char* values = reinterpret_cast<const char*>(at + values_offset<S>(call));
    for (int64_t i = 0; i < kRows * call.head_dim * int64_t(sizeof(S)); i += 64) {
        __builtin_prefetch(keys + i, 0, 2);
        __builtin_prefetch(values + i, 0, 2);
    }
}

template <typename T, typename S>
void score(const Call& call, const Row& row, int64_t head, int64_t next, int64_t end, int padded,
           Tile<T>& tile) {
    for (int key = 0; key < padded; key += kRows) {
        prefetch_keys<S>(call, row, head, next + key, end);
        Vec acc[kRows][kTileVecs] = {};
        multiply<T>(acc, tile.key_rows + key, 1, tile.queries, tile.dim / Tile<T>::kPair);
        for (int r = 0; r < kRows; r++)
            for (int v = 0; v < kTileVecs; v++) {
                if (std::is_same<S, int8_t>::value) acc[r][v] *= tile.key_scales[key + r];
                store(tile.scores[key + r] + v * kLanes, acc[r][v]);
            }
    }
}

inline Vec masked(Vec score, int64_t key, VecI32 last_key, int64_t window) {
    const VecI32 ahead = last_key - int32_t(key);  // how far the key lies behind its query
    VecI32 hidden = ahead < 0;
    if (window) hidden |= ahead >= int32_t(window);
    return hidden ? splat(kHidden) : score;
}

// Overwrites the scores of keys that queries may not see. Only the last keys, or those at the
// window's ends, are concerned.
template <typename T> void mask(const Call& call, Tile<T>& tile, int64_t first, int padded) {
    const int64_t window = call.sliding_window;
    const int64_t visible = window ? first : tile.first_position + 1;
    for (int key = int(std::max<int64_t>(0, visible - first)); key < padded; key++)
        for (int v = 0; v < kTileVecs; v++) {
            float* at = tile.scores[key] + v * kLanes;
            store(at, masked(load(at), first + key, tile.last_key[v], window));
        }
}

// Turns scores into weights relative to the new maximum, and notes by what the old ones shrink.
template <typename T, typename S> void soften(const Call& call, Tile<T>& tile, int padded) {
    constexpr int kPair = Tile<T>::kPair;
    const float factor = call.scale * kLog2E;
    for (int v = 0; v < kTileVecs; v++) {
        Vec best = splat(kHidden);
        for (int key = 0; key < padded; key++) {
            const Vec x = load(tile.scores[key] + v * kLanes);
            best = x > best ? x : best;
        }
        best *= factor;
        const Vec top = best > tile.top[v] ? best : tile.top[v];
        tile.keep[v] = exp2(tile.top[v] - top);
        tile.top[v] = top;
        Vec total{};
        for (int key = 0; key < padded; key += kPair) {
            Vec weights[kPair];
            for (int i = 0; i < kPair; i++) {
                weights[i] = exp2(load(tile.scores[key + i] + v * kLanes) * factor - top);
                total += weights[i];
                if (std::is_same<S, int8_t>::value) weights[i] *= tile.value_scales[key + i];
            }
            Product<T>::write_weights(tile.weights[key / kPair] + v * kLanes, weights);
        }
        tile.total[v] = tile.total[v] * tile.keep[v] + total;
    }
}

template <typename T> void weigh_values(Tile<T>& tile, int padded) {
    const int64_t pairs = padded / Tile<T>::kPair;
    for (int64_t d = 0; d < tile.dim; d += kRows) {
        Vec acc[kRows][kTileVecs];
        const typename Tile<T>::Element* rows[kRows];
        for (int r = 0; r < kRows; r++) {
            rows[r] = tile.values + d / kLanes * kLanes * pairs + d % kLanes + r;
            for (int v = 0; v < kTileVecs; v++)
                acc[r][v] = load(tile.out[d + r] + v * kLanes) * tile.keep[v];
        }
        multiply<T>(acc, rows, kLanes, tile.weights, pairs);
        for (int r = 0; r < kRows; r++)
            for (int v = 0; v < kTileVecs; v++) store(tile.out[d + r] + v * kLanes, acc[r][v]);
    }
}

template <typename T>
void finish_tile(const Call& call, const Row& row, int64_t head, int64_t first, Tile<T>& tile) {
    for (int v = 0; v < kTileVecs; v++) {
        const Vec factor = 1.0f / tile.total[v];
        const int count = std::min(kLanes, tile.num_queries - v * kLanes);
        for (int64_t d = 0; d < tile.dim; d += kLanes) {
            Vec rows[kLanes];
            for (int i = 0; i < kLanes; i++) rows[i] = load(tile.out[d + i] + v * kLanes) * factor;
            transpose(rows);
            for (int i = 0; i < count; i++)
                store(query_at(call, static_cast<T*>(call.out), call.out_token_stride, row, head,
                               first + v * kLanes + i) + d, rows[i]);
        }
    }
}

template <typename T, typename S>
void attend_tile(const Call& call, const Plan& plan, const TileOf& which) {
    static thread_local Tile<T> own_tile;
    Tile<T>* found = &own_tile;
    asm volatile("" : "+r"(found));  // or GCC looks the thread's variable up in every inner loop
    Tile<T>& tile = *found;
    const Row& row = plan.rows[which.row];
    const int64_t head = which.head, first_query = which.first_query, window = call.sliding_window;
    start_tile(call, row, head, first_query, tile);
    const int64_t last_query = first_query + tile.num_queries - 1;
    const int64_t end = row.start + last_query / group_of(call) + 1;
    int64_t key = window ? std::max<int64_t>(0, tile.first_position - window + 1) : 0;
    for (key = key / kTileKeys * kTileKeys; key < end; key += kTileKeys) {
        const int count = int(std::min<int64_t>(kTileKeys, end - key));
        const int padded = (count + kRows - 1) / kRows * kRows;
        load_keys<T, S>(call, row, head, key, count, padded, tile);
        score<T, S>(call, row, head, key + kTileKeys, end, padded, tile);
        if (window || key + padded - 1 > tile.first_position) mask(call, tile, key, padded);
        soften<T, S>(call, tile, padded);
        weigh_values(tile, padded);
    }
    finish_tile(call, row, head, first_query, tile);
}

}  // namespace penstock
