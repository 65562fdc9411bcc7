// SPDX-License-Identifier: Apache-2.0
// Signals. Invariant: the handler only writes a flag.
#include "train/stop.h"

#include <signal.h>
#include <string.h>

static volatile sig_atomic_t caught;

static void remember(int number) { caught = number; }

void fd_stop_install(void) {
  struct sigaction a;
  memset(&a, 0, sizeof a);
  sigemptyset(&a.sa_mask);
  a.sa_handler = remember;
  a.sa_flags = SA_RESTART; /* reads and writes go on */
  sigaction(SIGUSR1, &a, NULL);
  a.sa_flags = (int)((unsigned)SA_RESTART | (unsigned)SA_RESETHAND);
  sigaction(SIGTERM, &a, NULL);
  signal(SIGXFSZ, SIG_IGN);
}

fd_status fd_stop_requested(fd_comm *comm, int *signal_number) {
  fd_status st = FD_OK;
  int64_t any = caught;
  FD_TRY(fd_comm_allreduce_i64(comm, &any, 1, FD_COMM_MAX));
  *signal_number = (int)any;
done:
  return st;
}
