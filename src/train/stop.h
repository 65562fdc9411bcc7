// SPDX-License-Identifier: Apache-2.0
// Asking a run to stop: SIGUSR1 (and SIGTERM) mean a checkpoint at the next step boundary and exit 0.
#ifndef FD_TRAIN_STOP_H
#define FD_TRAIN_STOP_H

#include "comm/comm.h"

/** Take SIGUSR1 and SIGTERM (a second SIGTERM ends the process), and ignore SIGXFSZ, so that a file that may not grow is an
 *  error like a full disk. Before any of them can come: first thing in a run. */
void fd_stop_install(void);

/** The signal that any rank has had so far, 0 if none: signals reach ranks at different steps, so all decide here. Once a step.
 *  Collective. */
fd_status fd_stop_requested(fd_comm *comm, int *signal_number);

#endif
