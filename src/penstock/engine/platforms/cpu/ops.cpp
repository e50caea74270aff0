// Running operations: one by itself, or a recorded sequence of them.

#include "ops.h"

#include <omp.h>

extern "C" {

PENSTOCK_EXPORT void penstock_run(penstock::Operation op, const void* args, int num_threads) {
#pragma omp parallel num_threads(num_threads)
    op(args);
}

// Each operation ends in a barrier, so the next one finds its inputs complete.
PENSTOCK_EXPORT void penstock_replay(const penstock::Operation* ops, const void* const* args,
                                     int64_t count, int num_threads) {
#pragma omp parallel num_threads(num_threads)
    for (int64_t i = 0; i < count; i++) ops[i](args[i]);
}
}
