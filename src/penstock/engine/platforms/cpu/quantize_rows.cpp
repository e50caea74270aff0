// What stands around a linear in few bits: its activations' codes, and rows of an embedding.

#include "quantized.h"

namespace penstock {

typedef int8_t VecI8 __attribute__((vector_size(kLanes)));

// Mirrored by `_QuantizeArgs` in quantized.py.
struct QuantizeRows {
    const int64_t* num_tokens;
    const void* x_TK;
    int8_t* codes_TK;   // [T, num_groups * padded_length]
    float* scales_TG;
    int32_t* sums_TG;   // of the codes
    const int32_t* order_K;  // column k is input order_K[k]; or null
    int64_t x_stride, num_groups, group_length, padded_length;
    int64_t is_bf16;
};

// Below this a row counts as zero: 127 over it would not be a float any more.
constexpr float kSmallest = 1e-35f;

// kLanes inputs of a row from k on.
template <typename T, bool kOrdered>
inline Vec load_inputs(const T* x, const int32_t* order, int64_t k) {
    if (!kOrdered) return load(x + k);
    Vec out;
    for (int i = 0; i < kLanes; i++) out[i] = to_float(x[order[k + i]]);
    return out;
}

template <typename T, bool kOrdered>
inline float load_input(const T* x, const int32_t* order, int64_t k) {
    return to_float(kOrdered ? x[order[k]] : x[k]);
}

// The greatest magnitude; NaN if there is one. As integers, magnitudes compare as floats do, and
// NaN is above all of them.
template <typename T, bool kOrdered>
float greatest(const T* x, const int32_t* order, int64_t first, int64_t last) {
    VecI32 most{};
    int64_t k = first;
    for (; k + kLanes <= last; k += kLanes) {
        const Vec value = load_inputs<T, kOrdered>(x, order, k);
        const VecI32 bits = (VecI32)value & 0x7fffffff;
        most = most > bits ? most : bits;
    }
    int32_t out = 0;
    for (int i = 0; i < kLanes; i++) out = std::max(out, most[i]);
    for (; k < last; k++) {
        const float value = load_input<T, kOrdered>(x, order, k);
        int32_t bits;
        std::memcpy(&bits, &value, sizeof bits);
        out = std::max(out, bits & 0x7fffffff);
    }
    float value;
    std::memcpy(&value, &out, sizeof value);
    return value;
}

// One group of a row. What is not finite makes the scale not finite, and so the outputs.
template <typename T, bool kOrdered>
void quantize_group(const QuantizeRows& call, const T* x, int8_t* codes, float* scale,
                    int32_t* sum, int64_t first) {
    const int64_t length = call.group_length;
    const float most = greatest<T, kOrdered>(x, call.order_K, first, first + length);
    const bool zero = most < kSmallest;
    const float factor = zero ? 0.0f : 127.0f / most;
    // Added to a small float, it leaves the float's nearest integer in the low bits.
    constexpr float kMagic = 12582912.0f;
    constexpr int32_t kMagicBits = 0x4b400000;
    VecI32 sums{};
    int64_t k = 0;
    for (; k + kLanes <= length; k += kLanes) {
        const Vec shifted = load_inputs<T, kOrdered>(x, call.order_K, first + k) * factor + kMagic;
        const VecI32 code = (VecI32)shifted - kMagicBits;
        sums += code;
        const VecI8 bytes = __builtin_convertvector(code, VecI8);
        std::memcpy(codes + k, &bytes, sizeof bytes);
    }
    int32_t total = 0;
    for (int i = 0; i < kLanes; i++) total += sums[i];
    for (; k < length; k++) {
        const float shifted = load_input<T, kOrdered>(x, call.order_K, first + k) * factor + kMagic;
        int32_t bits;
        std::memcpy(&bits, &shifted, sizeof bits);
        codes[k] = int8_t(bits - kMagicBits);
        total += codes[k];
    }
    std::memset(codes + length, 0, call.padded_length - length);
    *scale = zero ? 0.0f : most / 127.0f;
    *sum = total;
}

template <typename T, bool kOrdered> void quantize_rows_as(const QuantizeRows& call) {
    const int64_t groups = call.num_groups;
#pragma omp for schedule(static)
    for (int64_t i = 0; i < *call.num_tokens * groups; i++) {
        const int64_t token = i / groups, g = i % groups;
        quantize_group<T, kOrdered>(call, static_cast<const T*>(call.x_TK) + token * call.x_stride,
                                    call.codes_TK + i * call.padded_length, call.scales_TG + i,
                                    call.sums_TG + i, g * call.group_length);
    }
}

void quantize_rows(const QuantizeRows& call) {
    const bool ordered = call.order_K != nullptr;
    if (call.is_bf16)
        ordered ? quantize_rows_as<BFloat16, true>(call) : quantize_rows_as<BFloat16, false>(call);
    else ordered ? quantize_rows_as<float, true>(call) : quantize_rows_as<float, false>(call);
}

// Mirrored by `_EmbedArgs` in quantized.py.
struct EmbedRows {
    const int64_t* num_tokens;
    const int64_t* ids_T;
    const uint8_t* panels;
    const int32_t* order_K;  // as above
    void* out_TK;
    int64_t bits, group_length;  // the latter without padding
    int64_t is_bf16;
    PanelLayout layout;
};

inline float read_scale(const uint8_t* scales, int64_t index, bool half) {
    if (half) {
        uint16_t bits;
        std::memcpy(&bits, scales + index * 2, sizeof bits);
        return half_to_float(bits);
    }
    float value;
    std::memcpy(&value, scales + index * 4, sizeof value);
    return value;
}

inline int code_at(const uint8_t* words, int64_t bits, int64_t output, int64_t k) {
    if (bits == 8) return words[k / 4 * kStepBytes + output * 4 + k % 4];
    const uint8_t two = words[k / 8 * kStepBytes + output * 4 + k % 4];
    return k % 8 < 4 ? two & 15 : two >> 4;
}

template <typename T> void embed_row(const EmbedRows& call, int64_t id, T* out) {
    const PanelLayout& layout = call.layout;
    const int64_t output = id % kPanel, length = call.group_length;
    const bool half = layout.half_scales;
    const uint8_t* group = call.panels + id / kPanel * layout.panel_bytes(int(call.bits));
    for (int64_t g = 0; g < layout.num_groups; g++) {
        const float scale = read_scale(group, output, half);
        const float offset =
            layout.has_offsets
                ? read_scale(group + kPanel * layout.scale_bytes(), output, half)
                : -scale * float(1 << (call.bits - 1));
        const uint8_t* words = group + layout.header_bytes();
        for (int64_t k = 0; k < length; k++) {
            const int64_t column = g * length + k;
            out[call.order_K == nullptr ? column : call.order_K[column]] =
                from_float<T>(float(code_at(words, call.bits, output, k)) * scale + offset);
        }
        group += layout.group_bytes(int(call.bits));
    }
}

// An id that is none makes a row of NaN, which nobody takes for an embedding.
template <typename T> void embed_rows_as(const EmbedRows& call) {
    const int64_t width = call.layout.num_groups * call.group_length;
#pragma omp for schedule(static)
    for (int64_t t = 0; t < *call.num_tokens; t++) {
        T* out = static_cast<T*>(call.out_TK) + t * width;
        const int64_t id = call.ids_T[t];
        if (id >= 0 && id < call.layout.num_outputs) embed_row(call, id, out);
        else std::fill(out, out + width, from_float<T>(__builtin_nanf("")));
    }
}

void embed_rows(const EmbedRows& call) {
    if (call.is_bf16) embed_rows_as<BFloat16>(call);
    else embed_rows_as<float>(call);
}

}  // namespace penstock

PENSTOCK_OPERATION(quantize_rows, penstock::QuantizeRows, penstock::quantize_rows)
PENSTOCK_OPERATION(embed_few_bits, penstock::EmbedRows, penstock::embed_rows)
