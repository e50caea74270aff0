// Who computes what in one step.
//
// Rows of many queries are cut into tiles of queries. Rows of few queries are cut along the context
// into stretches that begin at fixed positions, so that what a sequence's softmax adds up, and in
// which order, depends neither on the number of threads nor on the other rows of the batch: those
// decide only how many kv heads an item takes at a time.
#pragma once

#include <algorithm>

#include "attention.h"

namespace penstock {

// Up to this many queries of one kv head, reading the keys costs more than the arithmetic.
constexpr int64_t kFewQueries = 8;
constexpr int64_t kStretchKeys = 256;
constexpr int64_t kChunkTokens = 32;
constexpr int64_t kItemsPerThread = 4;
// What starting an item costs, in keys of one head.
constexpr int64_t kItemCost = 8;

inline bool few_queries(const Row& row, int64_t group) {
    return row.num_tokens == 1 || row.num_tokens * group <= kFewQueries;
}

class Planner {
  public:
    Planner(Plan& plan, const Call& call, int64_t num_threads, int64_t tile_queries)
        : plan_(plan), call_(call), group_(group_of(call)), num_threads_(num_threads),
          tile_queries_(tile_queries) {}

    void make() {
        plan_.chunks.clear();
        plan_.tiles.clear();
        plan_.items.clear();
        plan_.joins.clear();
        plan_.cost_before.assign(1, 0);
        int64_t num_stretches = 0;
        for (const Row& row : plan_.rows)
            if (few_queries(row, group_)) num_stretches += stretches(row);
        heads_at_once_ = call_.num_kv_heads;
        if (num_stretches < num_threads_ * kItemsPerThread)
            heads_at_once_ = std::max<int64_t>(1, call_.num_kv_heads / num_threads_);
        for (size_t i = 0; i < plan_.rows.size(); i++) {
            if (few_queries(plan_.rows[i], group_)) add_items(i);
            else add_tiles(i);
        }
        make_room();
    }

  private:
    // The first position that any query of the row sees.
    int64_t first_key(const Row& row) const {
        return call_.sliding_window ? std::max<int64_t>(0, row.start - call_.sliding_window + 1) : 0;
    }

    int64_t stretches(const Row& row) const {
        return (row.end() - 1) / kStretchKeys - first_key(row) / kStretchKeys + 1;
    }

    void add_items(int64_t i) {
        const Row& row = plan_.rows[i];
        const int64_t count = stretches(row), num_queries = row.num_tokens * group_;
        const int64_t step = num_queries * call_.num_kv_heads, partial = num_partials_;
        for (int64_t head = 0; head < call_.num_kv_heads; head += heads_at_once_) {
            const int64_t end_head = std::min(head + heads_at_once_, call_.num_kv_heads);
            int64_t first = first_key(row), to = count > 1 ? partial + head * num_queries : -1;
            while (first < row.end()) {
                const int64_t end =
                    std::min((first / kStretchKeys + 1) * kStretchKeys, row.end());
                plan_.items.push_back({i, head, end_head, first, end, to});
                const int64_t cost = (end - first + kItemCost) * (end_head - head);
                plan_.cost_before.push_back(plan_.cost_before.back() + cost);
                first = end;
                if (count > 1) to += step;
            }
        }
        if (count == 1) return;
        num_partials_ += step * count;
        for (int64_t head = 0; head < call_.num_kv_heads; head++)
            plan_.joins.push_back({i, head, partial + head * num_queries, step, count});
    }

    // Head by head, so that tiles at work together read the same keys. Last queries first: they see
    // the most, and a long tile should not start at the end.
    void add_tiles(int64_t i) {
        const Row& row = plan_.rows[i];
        const int64_t num_queries = row.num_tokens * group_;
        for (int64_t at = row.start; at < row.end(); at += kChunkTokens)
            plan_.chunks.push_back({i, at, std::min(at + kChunkTokens, row.end())});
        for (int64_t head = 0; head < call_.num_kv_heads; head++)
            for (int64_t first = (num_queries - 1) / tile_queries_ * tile_queries_; first >= 0;
                 first -= tile_queries_)
                plan_.tiles.push_back({i, head, first});
    }

    void make_room() {
        const int64_t wanted = num_partials_ * (2 + call_.head_dim);
        if (wanted <= plan_.partials_capacity) return;
        plan_.partials.reset(new float[wanted]);
        plan_.partials_capacity = wanted;
    }

    Plan& plan_;
    const Call& call_;
    const int64_t group_, num_threads_, tile_queries_;
    int64_t heads_at_once_ = 1, num_partials_ = 0;
};

}  // namespace penstock
