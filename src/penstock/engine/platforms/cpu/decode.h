// Attention for rows of few queries, which is bound by reading keys and values.
//
// An item is kv heads [head, end_head) of one row over one stretch of the context: it handles all
// query heads of a kv head together and so reads each byte once. Softmax is computed online in
// float32 (Milakov and Gimelshein, 2018); stretches are joined at the end (Flash-Decoding, Dao et
// al., 2023).
#pragma once

#include <algorithm>
#include <limits>

#include "attention.h"

namespace penstock {

constexpr int kAheadTokens = 32;  // how far ahead keys and values are asked for
constexpr int kFoldTokens = kLanes;  // keys handled at a time: one vector of scores
constexpr float kMinusInf = -std::numeric_limits<float>::infinity();

// One query of head_dim = NV * kLanes over keys and values of S, and what it has gathered so far.
template <typename T, typename S, int NV, bool Paired> struct Gathered {
    Vec q[NV], acc[NV];

    void start(const T* query) {
        for (int i = 0; i < NV; i++) {
            q[i] = load(query + i * kLanes);
            acc[i] = Vec{};
        }
    }
    // Products with a key, still to be summed over the lanes.
    Vec products(const S* key) const {
        Vec out = q[0] * load(key);
        for (int i = 1; i < NV; i++) out += q[i] * load(key + i * kLanes);
        return out;
    }
    typedef float Weight;
    // Two tokens' values, and their sum by two weights.
    struct Pair {
        Vec a[NV], b[NV];
        Pair(const S* value, const S* next_value) {
            for (int i = 0; i < NV; i++) {
                a[i] = load(value + i * kLanes);
                b[i] = load(next_value + i * kLanes);
            }
        }
        void add_to(Vec* sums, const Weight* two) const {
            for (int i = 0; i < NV; i++) sums[i] += a[i] * two[0] + b[i] * two[1];
        }
    };
    void write(float* to) const {
        for (int i = 0; i < NV; i++) store(to + i * kLanes, acc[i]);
    }
};

#ifdef __AVX512BF16__
// The same with products of bfloat16 pairs: along the dimension for keys, across two tokens for
// values. Interleaving two values leaves each accumulator with every other run of four dimensions.
// An int8 is a bfloat16 without rounding.
template <typename S, int NV> struct Gathered<BFloat16, S, NV, true> {
    __m512bh q[NV / 2];
    Vec acc[NV];

    static __m512i read(const BFloat16* p) { return _mm512_loadu_si512(p); }
    static __m512i read(const int8_t* p) {
        return (__m512i)_mm512_cvtne2ps_pbh((__m512)load(p + kLanes), (__m512)load(p));
    }
    static Vec dot(Vec acc, __m512i a, __m512bh b) {
        return (Vec)_mm512_dpbf16_ps((__m512)acc, (__m512bh)a, b);
    }
    void start(const BFloat16* query) {
        for (int i = 0; i < NV / 2; i++) q[i] = (__m512bh)read(query + i * 32);
        for (int i = 0; i < NV; i++) acc[i] = Vec{};
    }
    Vec products(const S* key) const {
        Vec even{}, odd{};
        for (int i = 0; i < NV / 2; i += 2) even = dot(even, read(key + i * 32), q[i]);
        for (int i = 1; i < NV / 2; i += 2) odd = dot(odd, read(key + i * 32), q[i]);
        return even + odd;
    }
    typedef BFloat16 Weight;
    struct Pair {
        __m512i both[NV];
        Pair(const S* value, const S* next_value) {
            for (int i = 0; i < NV; i += 2) {
                const __m512i a = read(value + i * kLanes), b = read(next_value + i * kLanes);
                both[i] = _mm512_unpacklo_epi16(a, b);
                both[i + 1] = _mm512_unpackhi_epi16(a, b);
            }
        }
        void add_to(Vec* sums, const Weight* two) const {
            int bits;
            std::memcpy(&bits, two, sizeof bits);
            const __m512bh weights = (__m512bh)_mm512_set1_epi32(bits);
            for (int i = 0; i < NV; i++) sums[i] = dot(sums[i], both[i], weights);
        }
    };
    void write(float* to) const {
        for (int i = 0; i < NV; i += 2)
            for (int d = 0; d < 2 * kLanes; d++)
                to[i * kLanes + d] = acc[i + d / 4 % 2][d / 8 * 4 + d % 4];
    }
};
#endif

template <typename T, typename S, int NV> struct Query {
    Gathered<T, S, NV, sizeof(T) == 2 && NV % 2 == 0> gathered;
    Vec total;  // sums of weights, lane by lane
    float top;
    int64_t first_key, last_key;  // what it may see
};

// Sums neighbours: a's in the lower half of the lanes, b's in the upper.
inline Vec fold_pairs(Vec a, Vec b) {
    VecI32 even, odd;
    for (int i = 0; i < kLanes; i++) {
        even[i] = 2 * i;
        odd[i] = 2 * i + 1;
    }
    return __builtin_shuffle(a, b, even) + __builtin_shuffle(a, b, odd);
}

// Asks for one token's values. The processor's own prefetching ends with the page, and a block's keys
// of one head are a page: without this, memory's latency is paid for every block. One token at a
// time, between the products: many requests at once would be waited for.
template <int NV, typename S> inline void prefetch(const S* from) {
    const char* at = reinterpret_cast<const char*>(from);
    for (int i = 0; i < NV * kLanes * int(sizeof(S)); i += 64) __builtin_prefetch(at + i, 0, 3);
}

template <int Num> struct Scores {
    Vec of[Num];
};

// The scores of Num queries with Count keys from `first` on (in the first lanes when complete).
// Keys past the last one are read as the last one: `fold` hides them.
// Asks for key `first` of `ahead` in passing, unless that is null.
template <int Count, int Num, typename T, typename S, int NV>
inline Scores<Num> raw_scores(const Query<T, S, NV>* queries, const S* keys, int first, int last,
                              const S* ahead) {
    Scores<Num> out;
    if constexpr (Count == 1) {
        if (ahead != nullptr) prefetch<NV>(ahead + first * NV * kLanes);
        const S* key = keys + std::min(first, last) * NV * kLanes;
        for (int i = 0; i < Num; i++) out.of[i] = queries[i].gathered.products(key);
    } else {
        const auto a = raw_scores<Count / 2, Num>(queries, keys, first, last, ahead);
        const auto b = raw_scores<Count / 2, Num>(queries, keys, first + Count / 2, last, ahead);
        for (int i = 0; i < Num; i++) out.of[i] = fold_pairs(a.of[i], b.of[i]);
    }
    return out;
}

// A stretch of keys of one head that lie side by side, and their values.
template <typename S> struct Run {
    const S *keys, *values;
    Vec key_scales, value_scales;  // of int8
    int64_t first;  // position
    int count;      // at most kFoldTokens
};

template <typename S>
inline Run<S> run_at(const Call& call, const Row& row, int64_t head, int64_t first, int64_t end) {
    const int64_t block = first / call.block_tokens, offset = first % call.block_tokens;
    const S* keys = keys_of<S>(call, row, block, head);
    const S* values = keys + values_offset<S>(call);
    Run<S> run;
    run.keys = keys + offset * call.head_dim;
    run.values = values + offset * call.head_dim;
    run.first = first;
    run.count = int(std::min<int64_t>({kFoldTokens, call.block_tokens - offset, end - first}));
    if constexpr (std::is_same<S, int8_t>::value) {
        run.key_scales = run.value_scales = Vec{};
        std::memcpy(&run.key_scales, scales_of(call, keys) + offset, run.count * sizeof(float));
        std::memcpy(&run.value_scales, scales_of(call, values) + offset, run.count * sizeof(float));
    }
    return run;
}

// Keys and values to be asked for.
template <typename S> struct Ahead {
    const S *keys = nullptr, *values = nullptr;
};

// What the thread reads at `key` of the item and head; past the item's end, what follows: the next
// head, then the next item (null: none).
template <typename S>
inline Ahead<S> ahead_at(const Call& call, const Plan& plan, const Item* item, const Item* next,
                         int64_t head, int64_t key) {
    if (key >= item->end) {
        key -= item->end;
        if (++head == item->end_head) {
            if (next == nullptr) return {};
            item = next;
            head = item->head;
        }
        key += item->first;
        if (key >= item->end) return {};
    }
    const S* keys = keys_of<S>(call, plan.rows[item->row], key / call.block_tokens, head) +
                    key % call.block_tokens * call.head_dim;
    return {keys, keys + values_offset<S>(call)};
}

// Folds a run into Num queries, and asks for what comes later (or nothing, where that is null).
template <int Num, typename T, typename S, int NV>
inline void fold(Query<T, S, NV>* queries, const Run<S>& run, float scale, Ahead<S> ahead) {
    constexpr bool kScaled = std::is_same<S, int8_t>::value;
    const auto raw = raw_scores<kFoldTokens, Num>(queries, run.keys, 0, run.count - 1, ahead.keys);
    typedef decltype(queries->gathered) Gatherer;
    typename Gatherer::Weight weights[Num][kFoldTokens];
    VecI32 lane;
    for (int i = 0; i < kLanes; i++) lane[i] = i;
    for (int i = 0; i < Num; i++) {
        Query<T, S, NV>& query = queries[i];
        const int end = int(std::min<int64_t>(run.count, query.last_key + 1 - run.first));
        const int begin = int(std::max<int64_t>(0, query.first_key - run.first));
        const VecI32 visible = (lane >= begin) & (lane < end);
        Vec score = raw.of[i] * scale;
        if (kScaled) score *= run.key_scales;
        score = visible ? score : splat(kMinusInf);
        const float top = std::max(query.top, max(score));
        if (top > query.top) {
            const float keep = std::exp(query.top - top);
            for (int j = 0; j < NV; j++) query.gathered.acc[j] *= keep;
            query.total *= keep;
            query.top = top;
        }
        // Nothing visible yet: the difference of two infinities is not a number, so pick 0 by hand.
        const Vec found = visible ? exp(score - top) : Vec{};
        query.total += found;
        store(weights[i], kScaled ? found * run.value_scales : found);
    }
    // In variables of their own: stores into `queries` might, for all the compiler knows, change
    // the values that are read next.
    Vec sums[Num][NV];
    for (int i = 0; i < Num; i++) std::memcpy(sums[i], queries[i].gathered.acc, sizeof sums[i]);
    for (int t = 0; t < run.count; t += 2) {
        if (ahead.values != nullptr) {
            prefetch<NV>(ahead.values + t * NV * kLanes);
            prefetch<NV>(ahead.values + (t + 1) * NV * kLanes);
        }
        const S* value = run.values + t * NV * kLanes;
        const S* next = t + 1 < run.count ? value + NV * kLanes : value;
        const typename Gatherer::Pair pair(value, next);
        for (int i = 0; i < Num; i++) pair.add_to(sums[i], weights[i] + t);
    }
    for (int i = 0; i < Num; i++) std::memcpy(queries[i].gathered.acc, sums[i], sizeof sums[i]);
}

constexpr int kQueries = 8;  // queries that share one pass over the keys

template <typename T, typename S, int NV>
inline void fold_all(Query<T, S, NV>* queries, int num, const Run<S>& run, float scale,
                     Ahead<S> ahead) {
    int i = 0;
    for (; i + 2 <= num; i += 2) {
        fold<2>(queries + i, run, scale, ahead);
        ahead = {};
    }
    if (i < num) fold<1>(queries + i, run, scale, ahead);
}

template <typename T, typename S, int NV>
void write_query(const Query<T, S, NV>& query, float* to) {
    to[0] = query.top;
    to[1] = sum(query.total);
    query.gathered.write(to + 2);
}

// The queries of one kv head over the item's keys; results go to `partial` or to the output.
template <typename T, typename S, int NV>
void attend_head(const Call& call, const Plan& plan, const Item& item, const Item* next,
                 int64_t head, float* partial) {
    const Row& row = plan.rows[item.row];
    const int64_t group = group_of(call), num_queries = row.num_tokens * group;
    Query<T, S, NV> queries[kQueries];
    for (int64_t done = 0; done < num_queries; done += kQueries) {
        const int num = int(std::min<int64_t>(kQueries, num_queries - done));
        for (int i = 0; i < num; i++) {
            Query<T, S, NV>& query = queries[i];
            query.gathered.start(query_at(call, static_cast<const T*>(call.q), call.q_token_stride,
                                          row, head, done + i));
            query.total = Vec{};
            query.top = kMinusInf;
            query.last_key = row.start + (done + i) / group;
            query.first_key = call.sliding_window ? query.last_key - call.sliding_window + 1 : 0;
        }
        for (int64_t key = item.first; key < item.end;) {
            const Run<S> run = run_at<S>(call, row, head, key, item.end);
            fold_all(queries, num, run, call.scale,
                     ahead_at<S>(call, plan, &item, next, head, key + kAheadTokens));
            key += run.count;
        }
        for (int i = 0; i < num; i++) {
            if (partial != nullptr) {
                write_query(queries[i], partial + (done + i) * (2 + NV * kLanes));
                continue;
            }
            float found[2 + NV * kLanes];
            write_query(queries[i], found);
            T* out = query_at(call, static_cast<T*>(call.out), call.out_token_stride, row, head,
                              done + i);
            for (int j = 0; j < NV; j++) store(out + j * kLanes, load(found + 2 + j * kLanes) / found[1]);
        }
    }
}

template <typename T, typename S, int NV>
void attend_item(const Call& call, const Plan& plan, const Item& item, const Item* next) {
    const Row& row = plan.rows[item.row];
    const int64_t num_queries = row.num_tokens * group_of(call);
    store_kv<T, S>(call, row, item.head, item.end_head, std::max(item.first, row.start), item.end);
    for (int64_t head = item.head; head < item.end_head; head++) {
        const int64_t at = item.partial + (head - item.head) * num_queries;
        float* partial = item.partial < 0 ? nullptr : plan.partials.get() + at * (2 + NV * kLanes);
        attend_head<T, S, NV>(call, plan, item, next, head, partial);
    }
}

// Puts the stretches of one row and kv head together and writes the output.
template <typename T, int NV> void join(const Call& call, const Plan& plan, const Join& which) {
    const Row& row = plan.rows[which.row];
    const int64_t width = 2 + NV * kLanes, num_queries = row.num_tokens * group_of(call);
    for (int64_t query = 0; query < num_queries; query++) {
        const float* from = plan.partials.get() + (which.partial + query) * width;
        const int64_t step = which.step * width;
        float top = kMinusInf;
        for (int64_t s = 0; s < which.num_stretches; s++) top = std::max(top, from[s * step]);
        Vec acc[NV] = {};
        float total = 0;
        for (int64_t s = 0; s < which.num_stretches; s++) {
            const float* part = from + s * step;
            const float keep = std::exp(part[0] - top);
            total += part[1] * keep;
            for (int i = 0; i < NV; i++) acc[i] += load(part + 2 + i * kLanes) * keep;
        }
        T* out = query_at(call, static_cast<T*>(call.out), call.out_token_stride, row, which.head,
                          query);
        for (int i = 0; i < NV; i++) store(out + i * kLanes, acc[i] / total);
    }
}

}  // namespace penstock
