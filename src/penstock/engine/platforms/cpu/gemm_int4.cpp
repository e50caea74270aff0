// Linears over weights in 4 bits. See quantized.h.

#include "quantized.h"

PENSTOCK_OPERATION(linear_int4, penstock::FewBitsLinear, penstock::few_bits_linear<4>)
