// What the attention operation is given, and where a sequence's keys and values stand.
//
// A sequence's block i is at base + i * block_stride; inside it one layer's keys are
// [kv_head][token][dim] at layer_offset, its values right behind. Where they are stored as int8, each
// head's [token][dim] is followed by float32 scales [token]. The query heads that share a kv head
// are "queries" of it alike: query i of a row is head i % group of token i / group.
#pragma once

#include <cmath>
#include <memory>
#include <type_traits>
#include <vector>

#ifdef __AVX2__
#include <immintrin.h>
#endif

#include "common.h"

namespace penstock {

typedef int8_t VecI8 __attribute__((vector_size(kLanes)));

// GCC's conversion of generic vectors by more than a factor of two goes value by value.
inline Vec load(const int8_t* p) {
#if defined(__AVX512F__)
    return (Vec)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p)));
#elif defined(__AVX2__)
    return (Vec)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p)));
#else
    VecI8 narrow;
    std::memcpy(&narrow, p, sizeof narrow);
    return __builtin_convertvector(__builtin_convertvector(narrow, VecI32), Vec);
#endif
}

// The queries at positions [start, start + num_tokens) of the sequence whose KV begins at `base`;
// they stand at `first` in the flat token axis of q, k, v and out.
struct Row {
    int64_t base, start, num_tokens, first;
    int64_t end() const { return start + num_tokens; }
};

// Tokens [first, end) of a row, to be stored by themselves because tiles of other threads read them.
struct Chunk {
    int64_t row, first, end;
};

// A tile of queries of one kv head, for rows of many queries.
struct TileOf {
    int64_t row, head, first_query;
};

// Keys [first, end) of kv heads [head, end_head), for rows of few queries. The results go to
// `partial` on, query by query within head by head, or straight to the output where it is -1.
struct Item {
    int64_t row, head, end_head, first, end, partial;
};

// Stretches to be put together: that of one kv head after `step` partials.
struct Join {
    int64_t row, head, partial, step, num_stretches;
};

// What one step computes. Its address is all that a recorded call knows of it: every step
// overwrites the contents.
struct Plan {
    std::vector<Row> rows;
    std::vector<Chunk> chunks;
    std::vector<TileOf> tiles;
    std::vector<Item> items;
    std::vector<int64_t> cost_before;  // of all items before each, and last of all of them
    std::vector<Join> joins;
    std::unique_ptr<float[]> partials;  // [partial][max, sum, acc * dim]
    int64_t partials_capacity = 0;
};

// Mirrored by `_Args` in attention/cpu_native.py. Strides are in elements unless in bytes by name.
struct Call {
    const int64_t* num_tokens;  // not needed: the plan has the rows
    const Plan* plan;
    void* out;
    const void* q;
    const void* k;
    const void* v;
    int64_t q_token_stride, k_token_stride, v_token_stride, out_token_stride;
    int64_t block_stride_bytes, layer_offset_bytes;
    int64_t num_heads, num_kv_heads, head_dim, block_tokens;
    int64_t sliding_window;  // 0: none
    int64_t is_bf16;         // q, k, v and out; else float32
    int64_t kv_is_int8, kv_is_bf16;  // as what keys and values are stored; else float32
    float scale;
};

// One kv head's keys or values of a block, scales included, in elements of what is stored.
template <typename S> inline int64_t head_size(const Call& call) {
    const int64_t scale_bytes = std::is_same<S, int8_t>::value ? sizeof(float) : 0;
    return call.block_tokens * (call.head_dim + scale_bytes);
}

// The keys [token][dim] of one block, layer and head; the values are `values_offset` further on.
template <typename S> inline S* keys_of(const Call& call, const Row& row, int64_t block, int64_t head) {
    char* at = reinterpret_cast<char*>(row.base) + block * call.block_stride_bytes +
               call.layer_offset_bytes;
    return reinterpret_cast<S*>(at) + head * head_size<S>(call);
}

template <typename S> inline int64_t values_offset(const Call& call) {
    return call.num_kv_heads * head_size<S>(call);
}

// The scales [token] of a head's keys or values.
inline float* scales_of(const Call& call, const int8_t* head) {
    return reinterpret_cast<float*>(const_cast<int8_t*>(head) + call.block_tokens * call.head_dim);
}

inline int64_t group_of(const Call& call) { return call.num_heads / call.num_kv_heads; }

// The head_dim values of query `i` of a row and kv head, in q or (with its stride) in out.
template <typename T>
inline T* query_at(const Call& call, T* base, int64_t token_stride, const Row& row, int64_t head,
                   int64_t i) {
    const int64_t group = group_of(call);
    return base + (row.first + i / group) * token_stride +
           (head * group + i % group) * call.head_dim;
}

// Stores one token's `dim` values at token `i` of a head's [token][dim].
template <typename T, typename S>
inline void store_token(const Call&, S* head, int64_t i, const T* from, int64_t dim) {
    for (int64_t d = 0; d < dim; d += kLanes) store(head + i * dim + d, load(from + d));
}

// In int8, the largest of them as 127 or -127. A NaN or an infinity makes the scale NaN, so that
// what attends to it shows it, as it would in floats.
template <typename T>
inline void store_token(const Call& call, int8_t* head, int64_t i, const T* from, int64_t dim) {
    Vec most{}, spoilt{};
    for (int64_t d = 0; d < dim; d += kLanes) {
        const Vec x = load(from + d), size = x < 0 ? -x : x;
        most = size > most ? size : most;
        spoilt += x - x;  // 0, or NaN
    }
    const float largest = max(most) + sum(spoilt);
    // Below this, 127 over it would not be a float any more.
    const float factor = largest > 1e-35f ? 127.0f / largest : 0.0f;
    const Vec magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
    for (int64_t d = 0; d < dim; d += kLanes) {
        const Vec rounded = load(from + d) * factor + magic;
        const VecI8 out = __builtin_convertvector((VecI32)rounded - (VecI32)magic, VecI8);
        std::memcpy(head + i * dim + d, &out, sizeof out);
    }
    scales_of(call, head)[i] = largest / 127.0f;
}

// Stores keys and values at positions [first, end) of heads [head, end_head).
template <typename T, typename S>
void store_kv(const Call& call, const Row& row, int64_t head, int64_t end_head, int64_t first,
              int64_t end) {
    const int64_t dim = call.head_dim;
    for (int64_t position = first; position < end; position++) {
        const int64_t token = row.first + position - row.start;
        const int64_t block = position / call.block_tokens, i = position % call.block_tokens;
        const T* k = static_cast<const T*>(call.k) + token * call.k_token_stride;
        const T* v = static_cast<const T*>(call.v) + token * call.v_token_stride;
        for (int64_t h = head; h < end_head; h++) {
            S* keys = keys_of<S>(call, row, block, h);
            store_token(call, keys, i, k + h * dim, dim);
            store_token(call, keys + values_offset<S>(call), i, v + h * dim, dim);
        }
    }
}

}  // namespace penstock
