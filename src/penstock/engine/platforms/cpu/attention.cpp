// Attention over virtually contiguous KV: the entry points.

#include <omp.h>

#include "attention.h"
#include "decode.h"
#include "prefill.h"

namespace penstock {

template <typename T> void store_kv(const Call& call) {
    const int64_t dim_bytes = call.head_dim * sizeof(T);
    int64_t num_tokens = 0;
    for (int64_t r = 0; r < call.num_rows; r++) num_tokens += row_of(call, r).num_tokens;
#pragma omp parallel for num_threads(call.num_threads) schedule(static) if (num_tokens > 64)
    for (int64_t part = 0; part < call.num_rows * call.num_kv_heads; part++) {
        const Row row = row_of(call, part / call.num_kv_heads);
        const int64_t head = part % call.num_kv_heads;
        const T* k = static_cast<const T*>(call.k) + head * call.head_dim;
        const T* v = static_cast<const T*>(call.v) + head * call.head_dim;
        for (int64_t i = 0; i < row.num_tokens; i++) {
            const int64_t position = row.start + i, token = row.first + i;
            T* to = keys_of<T>(call, row, position / call.block_tokens, head) +
                    position % call.block_tokens * call.head_dim;
            std::memcpy(to, k + token * call.k_token_stride, dim_bytes);
            std::memcpy(to + values_offset(call), v + token * call.v_token_stride, dim_bytes);
        }
    }
}

template <typename T, int NV> void attend(const Call& call) {
#pragma omp parallel num_threads(call.num_threads)
    {
#pragma omp for schedule(dynamic, 1) nowait
        for (int64_t i = 0; i < call.num_tiles; i++) attend_tile<T>(call, call.tiles + i * 3);
#pragma omp for schedule(dynamic, 1)
        for (int64_t i = 0; i < call.num_items; i++) attend_item<T, NV>(call, call.items + i * 5);
#pragma omp for schedule(static)
        for (int64_t i = 0; i < call.num_joins; i++) join<T, NV>(call, call.joins + i * 4);
    }
}

template <typename T> int attend_dim(const Call& call) {
    switch (call.head_dim) {
        case 16: attend<T, 16 / kLanes>(call); return 0;
        case 32: attend<T, 32 / kLanes>(call); return 0;
        case 48: attend<T, 48 / kLanes>(call); return 0;
        case 64: attend<T, 64 / kLanes>(call); return 0;
        case 80: attend<T, 80 / kLanes>(call); return 0;
        case 96: attend<T, 96 / kLanes>(call); return 0;
        case 128: attend<T, 128 / kLanes>(call); return 0;
        case 256: attend<T, 256 / kLanes>(call); return 0;
    }
    return 1;
}

}  // namespace penstock

using penstock::BFloat16;
using penstock::Call;

extern "C" {

// How many queries a tile takes: the planner cuts rows accordingly.
PENSTOCK_EXPORT int penstock_tile_queries() { return penstock::kTileQueries; }

PENSTOCK_EXPORT void penstock_store_kv(const Call* call, int is_bf16) {
    if (is_bf16) penstock::store_kv<BFloat16>(*call);
    else penstock::store_kv<float>(*call);
}

// 0, or 1 for a head_dim that was not compiled in.
PENSTOCK_EXPORT int penstock_attend(const Call* call, int is_bf16) {
    return is_bf16 ? penstock::attend_dim<BFloat16>(*call) : penstock::attend_dim<float>(*call);
}
}
