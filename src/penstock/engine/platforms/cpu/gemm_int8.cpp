// Linears over weights in 8 bits. See quantized.h.

#include "quantized.h"

PENSTOCK_OPERATION(linear_int8, penstock::FewBitsLinear, penstock::few_bits_linear<8>)

// What multiplies here, for people.
extern "C" PENSTOCK_EXPORT const char* penstock_dot_unit() { return penstock::kDotUnit; }
