// The small operations between the matrix products, each in one pass and one call.
//
// At decode they cost torch several calls apiece, which together rival the reading of the weights.

#include <cmath>

#include <omp.h>

#include "common.h"

namespace penstock {

// Below this many elements, waking the other threads costs more than they save.
constexpr int64_t kParallelElements = 1 << 15;

// Rows are addressed as [outer][inner], so that heads inside a wider projection need no copy.
struct Rows {
    int64_t num_outer, num_inner, outer_stride, inner_stride, dim;
};

// `to` may be `from`.
template <typename T>
inline void norm_row(T* to, const T* from, const T* weight, int64_t dim, float eps) {
    Vec squares{};
    int64_t i = 0;
    for (; i + kLanes <= dim; i += kLanes) squares += load(from + i) * load(from + i);
    float total = sum(squares);
    for (; i < dim; i++) total += to_float(from[i]) * to_float(from[i]);
    const float factor = 1.0f / std::sqrt(total / float(dim) + eps);
    // transformers rounds to the dtype before it multiplies by the weight, and so do we.
    for (i = 0; i + kLanes <= dim; i += kLanes)
        store(to + i, rounded<T>(load(from + i) * factor) * load(weight + i));
    for (; i < dim; i++) {
        const float normed = to_float(from_float<T>(to_float(from[i]) * factor));
        to[i] = from_float<T>(normed * to_float(weight[i]));
    }
}

template <typename T>
inline void rope_row(T* left, const float* c, const float* s, int64_t half) {
    T* right = left + half;
    int64_t i = 0;
    for (; i + kLanes <= half; i += kLanes) {
        const Vec a = load(left + i), b = load(right + i);
        store(left + i, a * load(c + i) - b * load(s + i));
        store(right + i, b * load(c + i) + a * load(s + i));
    }
    for (; i < half; i++) {
        const float a = to_float(left[i]), b = to_float(right[i]);
        left[i] = from_float<T>(a * c[i] - b * s[i]);
        right[i] = from_float<T>(b * c[i] + a * s[i]);
    }
}

template <typename T>
void rms_norm(T* out, const T* x, const T* weight, Rows rows, float eps, int num_threads) {
    const int64_t num_rows = rows.num_outer * rows.num_inner, dim = rows.dim;
#pragma omp parallel for num_threads(num_threads) if (num_rows * dim > kParallelElements)
    for (int64_t r = 0; r < num_rows; r++)
        norm_row(out + r * dim,
                 x + r / rows.num_inner * rows.outer_stride + r % rows.num_inner * rows.inner_stride,
                 weight, dim, eps);
}

template <typename T>
void silu_mul(T* out, const T* gate_up, int64_t num_tokens, int64_t dim, int64_t stride,
              int num_threads) {
#pragma omp parallel for num_threads(num_threads) if (num_tokens * dim > kParallelElements)
    for (int64_t t = 0; t < num_tokens; t++) {
        const T *gate = gate_up + t * stride, *up = gate + dim;
        T* to = out + t * dim;
        int64_t i = 0;
        for (; i + kLanes <= dim; i += kLanes) {
            const Vec x = load(gate + i);
            // `exp` ends at 88; below -88 silu is smaller than any normal float anyway.
            const Vec minus = x < -88.0f ? splat(88.0f) : -x;
            store(to + i, rounded<T>(x / (exp(minus) + 1.0f)) * load(up + i));
        }
        for (; i < dim; i++) {
            const float x = to_float(gate[i]);
            const float silu = to_float(from_float<T>(x / (1.0f + std::exp(-x))));
            to[i] = from_float<T>(silu * to_float(up[i]));
        }
    }
}

// Queries and keys of all tokens in place: normed by head where there are weights, then rotated.
struct QueryKey {
    void *q, *k;
    const void *q_norm, *k_norm;
    const float *cos, *sin;
    int64_t num_tokens, num_heads, num_kv_heads, q_token_stride, q_head_stride, k_token_stride,
        k_head_stride, dim;
    float eps;
};

template <typename T> void rope(const QueryKey& call, int num_threads) {
    const int64_t heads = call.num_heads + call.num_kv_heads, dim = call.dim;
    const int64_t num_rows = call.num_tokens * heads;
#pragma omp parallel for num_threads(num_threads) if (num_rows * dim > 2 * kParallelElements)
    for (int64_t r = 0; r < num_rows; r++) {
        const int64_t token = r / heads, head = r % heads, kv_head = head - call.num_heads;
        T* x = kv_head < 0 ? static_cast<T*>(call.q) + token * call.q_token_stride +
                                 head * call.q_head_stride
                           : static_cast<T*>(call.k) + token * call.k_token_stride +
                                 kv_head * call.k_head_stride;
        const T* norm = static_cast<const T*>(kv_head < 0 ? call.q_norm : call.k_norm);
        if (norm != nullptr) norm_row(x, x, norm, dim, call.eps);
        rope_row(x, call.cos + token * dim, call.sin + token * dim, dim / 2);
    }
}

}  // namespace penstock

using penstock::BFloat16;
using penstock::Rows;

extern "C" {

PENSTOCK_EXPORT void penstock_rms_norm(void* out, const void* x, const void* weight, int64_t num_outer,
                       int64_t num_inner, int64_t outer_stride, int64_t inner_stride, int64_t dim,
                       float eps, int num_threads, int is_bf16) {
    const Rows rows{num_outer, num_inner, outer_stride, inner_stride, dim};
    if (is_bf16)
        penstock::rms_norm(static_cast<BFloat16*>(out), static_cast<const BFloat16*>(x),
                           static_cast<const BFloat16*>(weight), rows, eps, num_threads);
    else
        penstock::rms_norm(static_cast<float*>(out), static_cast<const float*>(x),
                           static_cast<const float*>(weight), rows, eps, num_threads);
}

PENSTOCK_EXPORT void penstock_silu_mul(void* out, const void* gate_up, int64_t num_tokens, int64_t dim,
                       int64_t stride, int num_threads, int is_bf16) {
    if (is_bf16)
        penstock::silu_mul(static_cast<BFloat16*>(out), static_cast<const BFloat16*>(gate_up),
                           num_tokens, dim, stride, num_threads);
    else
        penstock::silu_mul(static_cast<float*>(out), static_cast<const float*>(gate_up),
                           num_tokens, dim, stride, num_threads);
}

PENSTOCK_EXPORT void penstock_rope(const penstock::QueryKey* call, int num_threads, int is_bf16) {
    if (is_bf16) penstock::rope<BFloat16>(*call, num_threads);
    else penstock::rope<float>(*call, num_threads);
}
}
