// SPDX-License-Identifier: Apache-2.0
// Leaks on purpose, beside MPI and HDF5 whose own leaks are suppressed: tests/leak_is_found.sh.
#include <hdf5.h>
#include <stdio.h>
#include <stdlib.h>

#include "comm/comm.h"

static void *volatile kept;

__attribute__((noinline)) static void planted_leak(void) {
  kept = malloc(123);
  kept = NULL;
}

int main(void) {
  fd_comm *comm = NULL;
  if (fd_comm_create(&comm) != FD_OK) return 1;
  hid_t type = H5Tcopy(H5T_C_S1);
  H5Tclose(type);
  planted_leak();
  fd_comm_destroy(&comm);
  puts("came to its end");
  return 0;
}
