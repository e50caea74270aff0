// What one call of attention is given, and where a sequence's keys and values stand.
//
// A sequence's block i is at base + i * block_stride; inside it one layer's keys are
// [kv_head][token][dim] at layer_offset, its values right behind. The query heads that share a kv
// head are "queries" of it alike: query i of a row is head i % group of token i / group.
#pragma once

#include <cmath>

#include "common.h"

namespace penstock {

// Mirrored by `_Call` in attention/cpu_native.py. Strides are in elements unless in bytes by name.
struct Call {
    void* out;
    const void* q;
    const void* k;
    const void* v;
    const int64_t* rows;   // [num_rows][4]: base address, start, num_tokens, first flat token
    const int64_t* tiles;  // [num_tiles][3]: row, kv head, first query
    const int64_t* items;  // [num_items][5]: row, kv head, first key, past the last key, partial
    const int64_t* joins;  // [num_joins][4]: row, kv head, first partial, number of stretches
    float* partials;       // [partial][max, sum, acc * dim]
    int64_t num_rows, num_tiles, num_items, num_joins;
    int64_t q_token_stride, k_token_stride, v_token_stride, out_token_stride;
    int64_t block_stride_bytes, layer_offset_bytes;
    int64_t num_heads, num_kv_heads, head_dim, block_tokens;
    int64_t sliding_window;  // 0: none
    int64_t num_threads;
    float scale;
};

struct Row {
    int64_t base, start, num_tokens, first;
};

inline Row row_of(const Call& call, int64_t row) {
    const int64_t* p = call.rows + row * 4;
    return {p[0], p[1], p[2], p[3]};
}

// The keys [token][dim] of one block, layer and head; the values are `values_offset` further on.
template <typename T> inline T* keys_of(const Call& call, const Row& row, int64_t block, int64_t head) {
    char* at = reinterpret_cast<char*>(row.base) + block * call.block_stride_bytes +
               call.layer_offset_bytes;
    return reinterpret_cast<T*>(at) + head * call.block_tokens * call.head_dim;
}

inline int64_t values_offset(const Call& call) {
    return call.num_kv_heads * call.block_tokens * call.head_dim;
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

}  // namespace penstock
