// SPDX-License-Identifier: Apache-2.0
// Cores of this process, from its affinity: mpirun binds a rank to one core unless told otherwise.
#include "base/threads.h"

#include <omp.h>
#include <sched.h>
#include <stdlib.h>
#include <unistd.h>

int fd_threads_available(void) {
  for (size_t cpus = 1024; cpus <= 1u << 20; cpus *= 2) { /* the set must be as large as the kernel's */
    cpu_set_t *set = CPU_ALLOC(cpus);
    if (!set) return 1;
    size_t bytes = CPU_ALLOC_SIZE(cpus);
    int n = sched_getaffinity(0, bytes, set) == 0 ? CPU_COUNT_S(bytes, set) : 0;
    CPU_FREE(set);
    if (n > 0) return n;
  }
  return 1;
}

int fd_threads_online(void) {
  long n = sysconf(_SC_NPROCESSORS_ONLN);
  return n > 0 ? (int)n : 1;
}

int fd_threads_setup(void) {
  const char *given = getenv("OMP_NUM_THREADS");
  int n = given && atoi(given) > 0 ? atoi(given) : fd_threads_available();
  omp_set_num_threads(n);
  return n;
}
