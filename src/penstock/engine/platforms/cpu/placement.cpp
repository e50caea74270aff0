// Binding the team of OpenMP threads: one processor each.

#include <sched.h>

#include "common.h"

#include <omp.h>

extern "C" {

// Thread i of the calling thread's team runs on cpus[i] from now on. Returns how many could not be
// bound, those included that OpenMP does not give (OMP_THREAD_LIMIT, OMP_DYNAMIC).
//
// libgomp keeps its threads, and their numbers, through regions of one thread and of all of them,
// which are the ones that we have. A region of some threads, two or more, ends the others, and
// those that replace them would run wherever the calling thread may.
PENSTOCK_EXPORT int penstock_bind(const int* cpus, int count) {
    int bound = 0;
#pragma omp parallel num_threads(count) reduction(+ : bound)
    {
        cpu_set_t set;
        CPU_ZERO(&set);
        CPU_SET(cpus[omp_get_thread_num()], &set);
        bound += sched_setaffinity(0, sizeof set, &set) == 0;
    }
    return count - bound;
}
}
