// Binding the team of OpenMP threads: one processor each.

#include <sched.h>

#include "common.h"

#include <omp.h>

extern "C" {

// Thread i of the calling thread's team runs on cpus[i] from now on. Returns how many could not be
// bound. libgomp keeps its threads, and their numbers, from one parallel region to the next.
PENSTOCK_EXPORT int penstock_bind(const int* cpus, int count) {
    int failed = 0;
#pragma omp parallel num_threads(count) reduction(+ : failed)
    {
        cpu_set_t set;
        CPU_ZERO(&set);
        CPU_SET(cpus[omp_get_thread_num()], &set);
        failed += sched_setaffinity(0, sizeof set, &set) != 0;
    }
    return failed;
}
}
