// SPDX-License-Identifier: Apache-2.0
// Cores of this process.
#ifndef FD_BASE_THREADS_H
#define FD_BASE_THREADS_H

/** Cores this process may run on (its affinity); at least 1. */
int fd_threads_available(void);
/** Cores of the machine that are online. */
int fd_threads_online(void);
/** Threads for computing: OMP_NUM_THREADS if set, else the cores available; tells OpenMP. Returns it. */
int fd_threads_setup(void);

#endif
