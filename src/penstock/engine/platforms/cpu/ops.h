// How kernels are called.
//
// An operation is a function of its arguments that all threads of a team call together. It shares
// its work out by `omp for` and returns only when all of it is done: the last loop keeps its
// barrier. So the same function serves a call of its own (penstock_run) and a place in a recorded
// program (penstock_replay), where one team goes through all operations of a step.
//
// Arguments are structs that Python mirrors; what changes from step to step (the number of tokens,
// an attention plan) stands behind a pointer in them, so that a recorded call stays valid.
#pragma once

#include <cstdint>

#include "common.h"

namespace penstock {

typedef void (*Operation)(const void* args);

}  // namespace penstock

// Defines the exported function penstock_op_NAME from `function(const Args&)`.
#define PENSTOCK_OPERATION(name, Args, function)                                     \
    extern "C" PENSTOCK_EXPORT void penstock_op_##name(const void* args) {           \
        function(*static_cast<const Args*>(args));                                   \
    }
