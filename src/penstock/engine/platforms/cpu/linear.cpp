// Linears over packed weights: the entry points.

#include "linear.h"

using penstock::BFloat16;
using penstock::Embed;
using penstock::Linear;

PENSTOCK_OPERATION(linear_bf16, Linear, penstock::linear<BFloat16>)
PENSTOCK_OPERATION(linear_f32, Linear, penstock::linear<float>)
PENSTOCK_OPERATION(pack, penstock::Pack, penstock::pack)
PENSTOCK_OPERATION(embed_bf16, Embed, penstock::embed<BFloat16>)
PENSTOCK_OPERATION(embed_f32, Embed, penstock::embed<float>)

// How many floats a vector of this build has: 16 means AVX-512.
extern "C" PENSTOCK_EXPORT int penstock_lanes() { return penstock::kLanes; }
