// SPDX-License-Identifier: Apache-2.0
// Sums over ranks of the CPU backend: MPI moves them while later nodes run (the executor calls fd_comm_progress).
#include "comm/comm.h"
#include "cpu/reduce.h"

fd_status cpu_reduce_start(fd_ctx *ctx, const struct fd_reduce_start_args *args) {
  return fd_comm_reduce_start(ctx->comm, args->request, args->x->data, fd_tensor_numel(args->x), args->x->dtype);
}

fd_status cpu_reduce_wait(fd_ctx *ctx, const struct fd_reduce_wait_args *args) {
  return fd_comm_reduce_wait(ctx->comm, args->request);
}
