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

template <typename T>
void rms_norm(T* out, const T* x, const T* weight, Rows rows, float eps, int num_threads) {
    const int64_t num_rows = rows.num_outer * rows.num_inner, dim = rows.dim;
#pragma omp parallel for num_threads(num_threads) if (num_rows * dim > kParallelElements)
    for (int64_t r = 0; r < num_rows; r++) {
        const T* from = x + r / rows.num_inner * rows.outer_stride +
                        r % rows.num_inner * rows.inner_stride;
        T* to = out + r * dim;
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

template <typename T>
void rope(T* x, Rows rows, const float* cos, const float* sin, int num_threads) {
    const int64_t num_rows = rows.num_outer * rows.num_inner, half = rows.dim / 2;
#pragma omp parallel for num_threads(num_threads) if (num_rows * half > kParallelElements)
    for (int64_t r = 0; r < num_rows; r++) {
        T* left = x + r / rows.num_inner * rows.outer_stride +
                  r % rows.num_inner * rows.inner_stride;
        T* right = left + half;
        const float* c = cos + r / rows.num_inner * rows.dim;
        const float* s = sin + r / rows.num_inner * rows.dim;
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

PENSTOCK_EXPORT void penstock_rope(void* x, int64_t num_tokens, int64_t num_heads, int64_t token_stride,
                   int64_t head_stride, int64_t dim, const float* cos, const float* sin,
                   int num_threads, int is_bf16) {
    const Rows rows{num_tokens, num_heads, token_stride, head_stride, dim};
    if (is_bf16) penstock::rope(static_cast<BFloat16*>(x), rows, cos, sin, num_threads);
    else penstock::rope(static_cast<float*>(x), rows, cos, sin, num_threads);
}
}
