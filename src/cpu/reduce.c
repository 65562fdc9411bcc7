// SPDX-License-Identifier: Apache-2.0
// Sums over ranks of the CPU backend: MPI moves them while later nodes run (the executor calls fd_comm_progress).
#include "comm/comm.h"
#include "cpu/cpu.h"

fd_status cpu_reduce_start_prepare(fd_ctx *ctx, const struct fd_reduce_start_args *a, size_t *scratch_bytes) {
  (void)ctx, (void)scratch_bytes;
  CPU_CHECK_ARG(reduce_start, a->request >= 0, "request = %d, expected 0 or more", a->request);
  CPU_CHECK(reduce_start, x, fd_tensor_numel(a->x) < (int64_t)1 << 30, "less than 2^30 elements");
  return FD_OK;
}

fd_status cpu_reduce_start(fd_ctx *ctx, const struct fd_reduce_start_args *a) {
  return fd_comm_reduce_start(ctx->comm, a->request, a->x->data, fd_tensor_numel(a->x), a->x->dtype);
}

fd_status cpu_reduce_wait_prepare(fd_ctx *ctx, const struct fd_reduce_wait_args *a, size_t *scratch_bytes) {
  (void)ctx, (void)scratch_bytes;
  CPU_CHECK_ARG(reduce_wait, a->request >= 0, "request = %d, expected 0 or more", a->request);
  return FD_OK;
}

fd_status cpu_reduce_wait(fd_ctx *ctx, const struct fd_reduce_wait_args *a) {
  return fd_comm_reduce_wait(ctx->comm, a->request);
}
