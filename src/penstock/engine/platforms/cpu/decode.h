// Attention for rows of few queries, which is bound by reading keys and values.
//
// An item is one kv head of one row over one stretch of the context: it handles all query heads of
// that kv head together and so reads each byte once. Softmax is computed online in float32 (Milakov
// and Gimelshein, 2018); stretches are joined at the end (Flash-Decoding, Dao et al., 2023).
#pragma once

#include <algorithm>
#include <limits>

#include "attention.h"

namespace penstock {

constexpr int kTokens = kLanes;  // keys handled at a time: one vector of scores per query

template <int NV> struct Query {  // one query head of one token, NV vectors wide
    Vec q[NV], acc[NV];
    float top, total;
    int64_t first_key, last_key;  // what it may see
};

template <typename T, int NV> inline void load_query(const Call& call, const T* from, Query<NV>& to) {
    for (int i = 0; i < NV; i++) {
        to.q[i] = load(from + i * kLanes) * call.scale;
        to.acc[i] = Vec{};
    }
    to.top = -std::numeric_limits<float>::infinity();
    to.total = 0;
}

// Folds keys [first, first + count), count <= kTokens and all in one block, into one query.
template <typename T, int NV>
inline void fold(Query<NV>& query, const T* keys, const T* values, int64_t first, int count) {
    const float kHidden = -std::numeric_limits<float>::infinity();
    float raw[kTokens];
    for (int t = 0; t < count; t++) {
        const T* key = keys + t * NV * kLanes;
        Vec dot = query.q[0] * load(key);
        for (int i = 1; i < NV; i++) dot += query.q[i] * load(key + i * kLanes);
        raw[t] = sum(dot);
    }
    for (int t = count; t < kTokens; t++) raw[t] = kHidden;
    for (int t = 0; t < count; t++)
        if (first + t > query.last_key || first + t < query.first_key) raw[t] = kHidden;
    Vec scores = load(raw);
    const float top = std::max(query.top, max(scores));
    if (top == kHidden) return;  // nothing visible yet
    const float keep = std::exp(query.top - top);
    const Vec weights = exp(scores - top);
    query.top = top;
    query.total = query.total * keep + sum(weights);
    Vec acc[NV];
    for (int i = 0; i < NV; i++) acc[i] = query.acc[i] * keep;
    for (int t = 0; t < count; t++) {
        const T* value = values + t * NV * kLanes;
        const Vec weight = splat(weights[t]);
        for (int i = 0; i < NV; i++) acc[i] += weight * load(value + i * kLanes);
    }
    for (int i = 0; i < NV; i++) query.acc[i] = acc[i];
}

constexpr int kQueries = 8;  // queries that share one pass over the keys

template <typename T, int NV> void attend_item(const Call& call, const int64_t* item) {
    const Row row = row_of(call, item[0]);
    const int64_t head = item[1], first_key = item[2], end_key = item[3];
    const int64_t group = call.num_heads / call.num_kv_heads;
    const int64_t num_queries = row.num_tokens * group;
    float* partial = call.partials + item[4] * (2 + NV * kLanes);
    Query<NV> queries[kQueries];
    for (int64_t done = 0; done < num_queries; done += kQueries) {
        const int count = int(std::min<int64_t>(kQueries, num_queries - done));
        for (int i = 0; i < count; i++) {
            const int64_t token = (done + i) / group, q_head = head * group + (done + i) % group;
            load_query<T, NV>(call,
                              static_cast<const T*>(call.q) +
                                  (row.first + token) * call.q_token_stride + q_head * NV * kLanes,
                              queries[i]);
            queries[i].last_key = row.start + token;
            queries[i].first_key =
                call.sliding_window ? queries[i].last_key - call.sliding_window + 1 : 0;
        }
        for (int64_t key = first_key; key < end_key;) {
            const int64_t block = key / call.block_tokens, offset = key % call.block_tokens;
            const int tokens = int(std::min<int64_t>(
                {kTokens, call.block_tokens - offset, end_key - key}));
            const T* keys = keys_of<T>(call, row, block, head) + offset * NV * kLanes;
            const T* values = keys + values_offset(call);
            for (int i = 0; i < count; i++) fold<T, NV>(queries[i], keys, values, key, tokens);
            key += tokens;
        }
        for (int i = 0; i < count; i++) {
            float* to = partial + (done + i) * (2 + NV * kLanes);
            to[0] = queries[i].top;
            to[1] = queries[i].total;
            for (int j = 0; j < NV; j++) store(to + 2 + j * kLanes, queries[i].acc[j]);
        }
    }
}

// Puts the stretches of one row and kv head together and writes the output.
template <typename T, int NV> void join(const Call& call, const int64_t* which) {
    const Row row = row_of(call, which[0]);
    const int64_t group = call.num_heads / call.num_kv_heads, width = 2 + NV * kLanes;
    const int64_t num_queries = row.num_tokens * group;
    for (int64_t query = 0; query < num_queries; query++) {
        const float* from = call.partials + (which[2] + query) * width;
        float top = -std::numeric_limits<float>::infinity();
        for (int64_t s = 0; s < which[3]; s++) top = std::max(top, from[s * num_queries * width]);
        Vec acc[NV] = {};
        float total = 0;
        for (int64_t s = 0; s < which[3]; s++) {
            const float* part = from + s * num_queries * width;
            const float keep = std::exp(part[0] - top);
            total += part[1] * keep;
            for (int i = 0; i < NV; i++) acc[i] += load(part + 2 + i * kLanes) * keep;
        }
        T* out = static_cast<T*>(call.out) + (row.first + query / group) * call.out_token_stride +
                 (which[1] * group + query % group) * NV * kLanes;
        for (int i = 0; i < NV; i++) store(out + i * kLanes, acc[i] / total);
    }
}

}  // namespace penstock
