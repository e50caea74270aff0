// The small operations between the matrix products, each in one pass and one call.
//
// At decode they cost torch several calls apiece, which together rival the reading of the weights.

#include <cmath>

#include "ops.h"

namespace penstock {

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

// out = x / rms(x) * weight, over rows that are addressed as [token][inner]: heads inside a wider
// projection need no copy.
struct RmsNorm {
    const int64_t* num_tokens;
    void* out;
    const void *x, *weight;
    int64_t num_inner, token_stride, inner_stride, dim;
    float eps;
};

template <typename T> void rms_norm(const RmsNorm& call) {
    const int64_t num_inner = call.num_inner, dim = call.dim;
#pragma omp for schedule(static)
    for (int64_t r = 0; r < *call.num_tokens * num_inner; r++)
        norm_row(static_cast<T*>(call.out) + r * dim,
                 static_cast<const T*>(call.x) + r / num_inner * call.token_stride +
                     r % num_inner * call.inner_stride,
                 static_cast<const T*>(call.weight), dim, call.eps);
}

// hidden += delta, then out = the norm of hidden. All contiguous.
struct AddRmsNorm {
    const int64_t* num_tokens;
    void *out, *hidden;
    const void *delta, *weight;
    int64_t dim;
    float eps;
};

template <typename T> void add_rms_norm(const AddRmsNorm& call) {
    const int64_t dim = call.dim;
#pragma omp for schedule(static)
    for (int64_t t = 0; t < *call.num_tokens; t++) {
        T* hidden = static_cast<T*>(call.hidden) + t * dim;
        const T* delta = static_cast<const T*>(call.delta) + t * dim;
        int64_t i = 0;
        for (; i + kLanes <= dim; i += kLanes)
            store(hidden + i, load(hidden + i) + load(delta + i));
        for (; i < dim; i++) hidden[i] = from_float<T>(to_float(hidden[i]) + to_float(delta[i]));
        norm_row(static_cast<T*>(call.out) + t * dim, hidden, static_cast<const T*>(call.weight),
                 dim, call.eps);
    }
}

// out = silu(gate) * up of [gate | up].
struct SiluMul {
    const int64_t* num_tokens;
    void* out;
    const void* gate_up;
    int64_t dim, stride;
};

template <typename T> void silu_mul(const SiluMul& call) {
    // Pieces of a row, so that a single token is enough work for all threads.
    constexpr int64_t kPiece = 512;
    const int64_t dim = call.dim, pieces = (dim + kPiece - 1) / kPiece;
#pragma omp for schedule(static)
    for (int64_t piece = 0; piece < *call.num_tokens * pieces; piece++) {
        const int64_t t = piece / pieces, from = piece % pieces * kPiece;
        const int64_t end = from + kPiece < dim ? from + kPiece : dim;
        const T *gate = static_cast<const T*>(call.gate_up) + t * call.stride, *up = gate + dim;
        T* to = static_cast<T*>(call.out) + t * dim;
        int64_t i = from;
        for (; i + kLanes <= end; i += kLanes) {
            const Vec x = load(gate + i);
            // `exp` ends at 88; below -88 silu is smaller than any normal float anyway.
            const Vec minus = x < -88.0f ? splat(88.0f) : -x;
            store(to + i, rounded<T>(x / (exp(minus) + 1.0f)) * load(up + i));
        }
        for (; i < end; i++) {
            const float x = to_float(gate[i]);
            const float silu = to_float(from_float<T>(x / (1.0f + std::exp(-x))));
            to[i] = from_float<T>(silu * to_float(up[i]));
        }
    }
}

// Queries and keys of all tokens in place: normed by head where there are weights, then rotated.
struct QueryKey {
    const int64_t* num_tokens;
    void *q, *k;
    const void *q_norm, *k_norm;
    const float *cos, *sin;
    int64_t num_heads, num_kv_heads, q_token_stride, q_head_stride, k_token_stride, k_head_stride,
        dim;
    float eps;
};

template <typename T> void rope(const QueryKey& call) {
    const int64_t heads = call.num_heads + call.num_kv_heads, dim = call.dim;
#pragma omp for schedule(static)
    for (int64_t r = 0; r < *call.num_tokens * heads; r++) {
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

// Cosines and sines of positions times frequencies, both halves of a row alike.
struct CosSin {
    const int64_t* num_tokens;
    float *cos, *sin;  // [T][2 * half]
    const int64_t* positions;
    const float* inv_freq;
    int64_t half;
    float scale;
};

void cos_sin(const CosSin& call) {
    const int64_t half = call.half;
#pragma omp for schedule(static)
    for (int64_t t = 0; t < *call.num_tokens; t++) {
        float *c = call.cos + t * 2 * half, *s = call.sin + t * 2 * half;
        for (int64_t i = 0; i < half; i++) {
            const float angle = float(call.positions[t]) * call.inv_freq[i];
            c[i] = c[half + i] = std::cos(angle) * call.scale;
            s[i] = s[half + i] = std::sin(angle) * call.scale;
        }
    }
}

// Rows of a plain matrix: an embedding that is no output head.
struct GatherRows {
    const int64_t* num_tokens;
    void* out;
    const int64_t* ids;
    const void* matrix;
    int64_t row_bytes;
};

void gather_rows(const GatherRows& call) {
#pragma omp for schedule(static)
    for (int64_t t = 0; t < *call.num_tokens; t++)
        std::memcpy(static_cast<char*>(call.out) + t * call.row_bytes,
                    static_cast<const char*>(call.matrix) + call.ids[t] * call.row_bytes,
                    call.row_bytes);
}

}  // namespace penstock

using namespace penstock;

PENSTOCK_OPERATION(rms_norm_bf16, RmsNorm, rms_norm<BFloat16>)
PENSTOCK_OPERATION(rms_norm_f32, RmsNorm, rms_norm<float>)
PENSTOCK_OPERATION(add_rms_norm_bf16, AddRmsNorm, add_rms_norm<BFloat16>)
PENSTOCK_OPERATION(add_rms_norm_f32, AddRmsNorm, add_rms_norm<float>)
PENSTOCK_OPERATION(silu_mul_bf16, SiluMul, silu_mul<BFloat16>)
PENSTOCK_OPERATION(silu_mul_f32, SiluMul, silu_mul<float>)
PENSTOCK_OPERATION(rope_bf16, QueryKey, rope<BFloat16>)
PENSTOCK_OPERATION(rope_f32, QueryKey, rope<float>)
PENSTOCK_OPERATION(cos_sin, CosSin, cos_sin)
PENSTOCK_OPERATION(gather_rows, GatherRows, gather_rows)
