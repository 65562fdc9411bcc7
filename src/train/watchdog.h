// SPDX-License-Identifier: Apache-2.0
// A thread that ends the job when a step takes too long: a rank that stands still would let all others wait for ever.
#ifndef FD_TRAIN_WATCHDOG_H
#define FD_TRAIN_WATCHDOG_H

#include "comm/comm.h"

typedef struct fd_watchdog fd_watchdog;

/** Start watching, with the step -1 and the phase "start". seconds <= 0: *out = NULL, nothing is watched; all functions
 *  accept that. Ranks of a node see each other's place, so that one that cannot speak any more is named by another. Collective. */
fd_status fd_watchdog_create(fd_comm *comm, double seconds, fd_watchdog **out);
/** Collective, before the communicator goes. */
void fd_watchdog_destroy(fd_watchdog **w);

/** A step begins: the clock starts again. Also before a checkpoint or sampling, which have their own time then. Cheap. Local. */
void fd_watchdog_step(fd_watchdog *w, int64_t step);
/** Where this rank is within the step; the clock goes on. `phase` is a literal of at most 31 characters. Cheap. Local. */
void fd_watchdog_phase(fd_watchdog *w, const char *phase);

/** For tests: call this instead of ending the job (exit code of FD_ERR_COMM). `report` is what was written to stderr. Before the
 *  clock can run out. */
void fd_watchdog_on_expiry(fd_watchdog *w, void (*f)(void *user, const char *report), void *user);

#endif
