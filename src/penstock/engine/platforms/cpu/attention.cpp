// Attention over virtually contiguous KV for one head_dim: the operation, and its plan.

#include <omp.h>

#include "attention.h"
#include "decode.h"
#include "ops.h"
#include "plan.h"
#include "prefill.h"

namespace penstock {

// Items of about equal cost for each thread, one after the other.
template <typename T, typename S, int NV> void attend_items(const Call& call, const Plan& plan) {
    const int64_t count = plan.items.size();
    const int64_t thread = omp_get_thread_num(), threads = omp_get_num_threads();
    const auto& before = plan.cost_before;
    const auto first_of = [&](int64_t t) {
        const int64_t cost = before[count] * t / threads;
        return std::lower_bound(before.begin(), before.begin() + count, cost) - before.begin();
    };
    const int64_t end = first_of(thread + 1);
    for (int64_t i = first_of(thread); i < end; i++) {
        const Item* next = i + 1 < end ? &plan.items[i + 1] : nullptr;
        attend_item<T, S, NV>(call, plan, plan.items[i], next);
    }
}

// Few queries: an item stores what it reads itself. Many: tiles of all threads read what is new.
template <typename T, typename S, int NV> void attend(const Call& call) {
    const Plan& plan = *call.plan;
    const int64_t num_chunks = plan.chunks.size(), num_tiles = plan.tiles.size();
    const int64_t num_joins = plan.joins.size();
    if (num_chunks > 0) {
#pragma omp for schedule(static)
        for (int64_t i = 0; i < num_chunks; i++) {
            const Chunk& chunk = plan.chunks[i];
            store_kv<T, S>(call, plan.rows[chunk.row], 0, call.num_kv_heads, chunk.first, chunk.end);
        }
    }
    attend_items<T, S, NV>(call, plan);
    if (num_tiles > 0) {
#pragma omp for schedule(dynamic, 1) nowait
        for (int64_t i = 0; i < num_tiles; i++) attend_tile<T, S>(call, plan, plan.tiles[i]);
    }
#pragma omp barrier
    if (num_joins > 0) {
#pragma omp for schedule(static)
        for (int64_t i = 0; i < num_joins; i++) join<T, NV>(call, plan, plan.joins[i]);
    }
}

#ifndef PENSTOCK_HEAD_DIM
#error "compiled once for each head_dim: -DPENSTOCK_HEAD_DIM=..., a multiple of 16"
#endif
constexpr int kVecs = PENSTOCK_HEAD_DIM / kLanes;

void attend_any(const Call& call) {
    if (call.kv_is_int8) {
        if (call.is_bf16) attend<BFloat16, int8_t, kVecs>(call);
        else attend<float, int8_t, kVecs>(call);
    } else if (call.is_bf16) {
        attend<BFloat16, BFloat16, kVecs>(call);
    } else if (call.kv_is_bf16) {
        attend<float, BFloat16, kVecs>(call);
    } else {
        attend<float, float, kVecs>(call);
    }
}

}  // namespace penstock

PENSTOCK_OPERATION(attend, penstock::Call, penstock::attend_any)

extern "C" {

PENSTOCK_EXPORT penstock::Plan* penstock_plan_new() { return new penstock::Plan; }

PENSTOCK_EXPORT void penstock_plan_free(penstock::Plan* plan) { delete plan; }

// `call` gives the shape, `rows` what a step asks for. Where few queries are, costs are in keys of
// one head (Plan::cost_before); tiles are handed out one by one and have none.
PENSTOCK_EXPORT void penstock_plan(penstock::Plan* plan, const penstock::Call* call,
                                   const penstock::Row* rows, int64_t num_rows,
                                   int64_t num_threads) {
    plan->rows.assign(rows, rows + num_rows);
    penstock::Planner(*plan, *call, num_threads, penstock::kTileQueries).make();
}
}
