// Attention for rows of many queries, which is bound by arithmetic.
//
// The blocked online softmax of FlashAttention (Dao, 2023), with queries across the vector lanes:
// scores are held transposed, [key][query], and so is the output, [dim][query]. Then the maximum
// and the sum of a softmax need no reduction across lanes, keys need no re-ordering at all, and of
// each product one operand is a broadcast.
#pragma once

#include <algorithm>

#include "attention.h"

namespace penstock {

// How products over T run. An Element holds kPair consecutive values of the summed dimension.
template <typename T> struct Product {
    typedef float Element;
    typedef Vec Operand;
    static constexpr int kPair = 1;
    static Element element(const T* values, int64_t) { return to_float(*values); }
    static Operand read(const Element* p) { return load(p); }
    static Vec add(Vec acc, Element a, Operand b) { return acc + a * b; }
    static void write_weights(Element* to, const Vec* weights) { store(to, weights[0]); }
};

#ifdef __AVX512BF16__
template <> struct Product<BFloat16> {
    typedef uint32_t Element;
    typedef __m512bh Operand;
    static constexpr int kPair = 2;
    static Element element(const BFloat16* values, int64_t stride) {
        return values[0].bits | uint32_t(values[stride].bits) << 16;
    }
    static Operand read(const Element* p) { return (__m512bh)_mm512_loadu_si512(p); }
    static Vec add(Vec acc, Element a, Operand b) {
        return (Vec)_mm512_dpbf16_ps((__m512)acc, (__m512bh)_mm512_set1_epi32(int(a)), b);
    }
    // Two rows of weights become the low and high halves of each lane.
    static void write_weights(Element* to, const Vec* weights) {
        const __m512i low =
            _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh((__m512)weights[0]));
        const __m512i high =
            _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh((__m512)weights[1]));
        _mm512_storeu_si512(to, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
    }
};
#endif

constexpr int kTileVecs = 4;
constexpr int kTileQueries = kTileVecs * kLanes;
constexpr int kTileKeys = 64;
constexpr int kRows = 4;  // kRows x kTileVecs accumulators at a time
constexpr int kMaxDim = 256;
constexpr float kHidden = -1e30f;  // a masked score; finite, so that differences stay finite

template <typename T> struct Tile {
    typedef typename Product<T>::Element Element;
    static constexpr int kPair = Product<T>::kPair;

    int64_t dim, first_position;
    int num_queries;
    VecI32 last_key[kTileVecs];
    Vec top[kTileVecs], total[kTileVecs], keep[kTileVecs];
    alignas(64) Element queries[kMaxDim / kPair][kTileQueries];
    alignas(64) Element keys[kTileKeys * kMaxDim / kPair];    // [key][dim / pair]
    alignas(64) Element values[kTileKeys / kPair * kMaxDim];  // [key / pair][dim]
    alignas(64) float scores[kTileKeys][kTileQueries];
    alignas(64) Element weights[kTileKeys / kPair][kTileQueries];
    alignas(64) float out[kMaxDim][kTileQueries];
};

template <typename T>
void start_tile(const Call& call, const Row& row, int64_t head, int64_t first, Tile<T>& tile) {
    const int64_t group = group_of(call);
    tile.dim = call.head_dim;
    tile.num_queries = int(std::min<int64_t>(kTileQueries, row.num_tokens * group - first));
    tile.first_position = row.start + first / group;
    for (int i = 0; i < kTileQueries; i++) {
        const int64_t query = first + std::min(i, tile.num_queries - 1);
        const T* q = query_at(call, static_cast<const T*>(call.q), call.q_token_stride, row, head,
                              query);
        for (int64_t d = 0; d < tile.dim; d += Tile<T>::kPair)
            tile.queries[d / Tile<T>::kPair][i] = Product<T>::element(q + d, 1);
        tile.last_key[i / kLanes][i % kLanes] = int32_t(row.start + query / group);
    }
    for (int v = 0; v < kTileVecs; v++) {
        tile.top[v] = splat(kHidden);
        tile.total[v] = Vec{};
    }
    std::memset(tile.out, 0, sizeof(float) * tile.dim * kTileQueries);
}

// Copies keys [first, first + count) and their values in; what is missing to kTileKeys becomes 0.
template <typename T>
void load_keys(const Call& call, const Row& row, int64_t head, int64_t first, int count,
               Tile<T>& tile) {
    constexpr int kPair = Tile<T>::kPair;
    const int64_t dim = tile.dim;
    static const T zeros[kMaxDim] = {};
    const T* values[kTileKeys];
    for (int i = 0; i < kTileKeys; i++) {
        const T* key = zeros;
        values[i] = zeros;
        if (i < count) {
            const int64_t position = first + i;
            key = keys_of<T>(call, row, position / call.block_tokens, head) +
                  position % call.block_tokens * dim;
            values[i] = key + values_offset(call);
        }
        for (int64_t d = 0; d < dim; d += kPair)
            tile.keys[(i * dim + d) / kPair] = Product<T>::element(key + d, 1);
    }
    for (int i = 0; i < kTileKeys; i += kPair) {
        const int64_t to_next = values[i + kPair - 1] - values[i];
        for (int64_t d = 0; d < dim; d++)
            tile.values[i / kPair * dim + d] = Product<T>::element(values[i] + d, to_next);
    }
}

// acc[row][lane] += sum over n of a[row * a_stride + n * a_step] * b[n][lane].
template <typename T>
inline void multiply(Vec (&acc)[kRows][kTileVecs], const typename Product<T>::Element* a,
                     int64_t a_stride, int64_t a_step,
                     const typename Product<T>::Element (*b)[kTileQueries], int64_t count) {
    typedef Product<T> P;
    for (int64_t n = 0; n < count; n++) {
        typename P::Operand lanes[kTileVecs];
        for (int v = 0; v < kTileVecs; v++) lanes[v] = P::read(b[n] + v * kLanes);
        for (int r = 0; r < kRows; r++)
            for (int v = 0; v < kTileVecs; v++)
                acc[r][v] = P::add(acc[r][v], a[r * a_stride + n * a_step], lanes[v]);
    }
}

template <typename T> void score(Tile<T>& tile, int count) {
    const int64_t steps = tile.dim / Tile<T>::kPair;
    for (int key = 0; key < count; key += kRows) {
        Vec acc[kRows][kTileVecs] = {};
        multiply<T>(acc, tile.keys + key * steps, steps, 1, tile.queries, steps);
        for (int r = 0; r < kRows; r++)
            for (int v = 0; v < kTileVecs; v++)
                store(tile.scores[key + r] + v * kLanes, acc[r][v]);
    }
}

inline Vec masked(Vec score, int64_t key, VecI32 last_key, int64_t window) {
    const VecI32 ahead = last_key - int32_t(key);  // how far the key lies behind its query
    VecI32 hidden = ahead < 0;
    if (window) hidden |= ahead >= int32_t(window);
    return hidden ? splat(kHidden) : score;
}

// Turns scores into weights relative to the new maximum, and notes by what the old ones shrink.
template <typename T>
void soften(const Call& call, Tile<T>& tile, int64_t first, int count, bool mask) {
    constexpr int kPair = Tile<T>::kPair;
    for (int v = 0; v < kTileVecs; v++) {
        Vec top = tile.top[v];
        for (int key = 0; key < count; key++) {
            float* at = tile.scores[key] + v * kLanes;
            Vec x = load(at) * call.scale;
            if (mask) x = masked(x, first + key, tile.last_key[v], call.sliding_window);
            store(at, x);
            top = x > top ? x : top;
        }
        tile.keep[v] = exp(tile.top[v] - top);
        tile.top[v] = top;
        Vec total = tile.total[v] * tile.keep[v];
        for (int key = 0; key < kTileKeys; key += kPair) {
            Vec weights[kPair];
            for (int i = 0; i < kPair; i++) {
                weights[i] = Vec{};
                if (key + i < count) weights[i] = exp(load(tile.scores[key + i] + v * kLanes) - top);
                total += weights[i];
            }
            Product<T>::write_weights(tile.weights[key / kPair] + v * kLanes, weights);
        }
        tile.total[v] = total;
    }
}

template <typename T> void weigh_values(Tile<T>& tile, int count) {
    constexpr int kPair = Tile<T>::kPair;
    for (int64_t d = 0; d < tile.dim; d += kRows) {
        Vec acc[kRows][kTileVecs];
        for (int r = 0; r < kRows; r++)
            for (int v = 0; v < kTileVecs; v++)
                acc[r][v] = load(tile.out[d + r] + v * kLanes) * tile.keep[v];
        multiply<T>(acc, tile.values + d, 1, tile.dim, tile.weights, (count + kPair - 1) / kPair);
        for (int r = 0; r < kRows; r++)
            for (int v = 0; v < kTileVecs; v++) store(tile.out[d + r] + v * kLanes, acc[r][v]);
    }
}

template <typename T>
void finish_tile(const Call& call, const Row& row, int64_t head, int64_t first, Tile<T>& tile) {
    for (int i = 0; i < tile.num_queries; i++) {
        T* out = query_at(call, static_cast<T*>(call.out), call.out_token_stride, row, head,
                          first + i);
        const float factor = 1.0f / tile.total[i / kLanes][i % kLanes];
        for (int64_t d = 0; d < tile.dim; d++) out[d] = from_float<T>(tile.out[d][i] * factor);
    }
}

template <typename T> void attend_tile(const Call& call, const Plan& plan, const TileOf& which) {
    static thread_local Tile<T> tile;
    const Row& row = plan.rows[which.row];
    const int64_t head = which.head, first_query = which.first_query, window = call.sliding_window;
    start_tile(call, row, head, first_query, tile);
    const int64_t last_query = first_query + tile.num_queries - 1;
    const int64_t end = row.start + last_query / group_of(call) + 1;
    int64_t key = window ? std::max<int64_t>(0, tile.first_position - window + 1) : 0;
    for (; key < end; key += kTileKeys) {
        const int count = int(std::min<int64_t>(kTileKeys, end - key));
        const bool mask = key + count - 1 > tile.first_position || (window && end - key > window);
        load_keys(call, row, head, key, count, tile);
        score(tile, count);
        soften(call, tile, key, count, mask);
        weigh_values(tile, count);
    }
    finish_tile(call, row, head, first_query, tile);
}

}  // namespace penstock
