// SPDX-License-Identifier: Apache-2.0
// Sums and parts between ranks of the CPU backend: MPI moves them while later nodes run (the executor calls fd_comm_progress).
#include "comm/comm.h"
#include "cpu/cpu.h"

static fd_status check_start(fd_ctx *ctx, enum fd_op op, const fd_tensor *x, int request, bool parts) {
  const int ranks = fd_comm_size(ctx->comm);
  if (request < 0) return fd_op_wrong_arg(op, "request = %d, expected 0 or more", request);
  if (fd_tensor_numel(x) >= (int64_t)1 << 30) return fd_op_wrong_slot(op, "x", x, "less than 2^30 elements");
  if (parts && fd_tensor_numel(x) % ranks) return fd_op_wrong_slot(op, "x", x, "a multiple of %d ranks", ranks);
  return FD_OK;
}

#define START(op, kind)                                                                                    \
  fd_status cpu_##op##_prepare(fd_ctx *ctx, const struct fd_##op##_args *a, size_t *scratch_bytes) {       \
    (void)scratch_bytes;                                                                                   \
    return check_start(ctx, FD_OP_##op, a->x, a->request, kind != FD_COMM_ALL_REDUCE);                     \
  }                                                                                                        \
  fd_status cpu_##op(fd_ctx *ctx, const struct fd_##op##_args *a) {                                        \
    return fd_comm_collective_start(ctx->comm, kind, a->request, a->x->data, fd_tensor_numel(a->x), a->x->dtype); \
  }
START(reduce_start, FD_COMM_ALL_REDUCE)
START(reduce_scatter_start, FD_COMM_REDUCE_SCATTER)
START(all_gather_start, FD_COMM_ALL_GATHER)

fd_status cpu_reduce_wait_prepare(fd_ctx *ctx, const struct fd_reduce_wait_args *a, size_t *scratch_bytes) {
  (void)ctx, (void)scratch_bytes;
  CPU_CHECK_ARG(reduce_wait, a->request >= 0, "request = %d, expected 0 or more", a->request);
  return FD_OK;
}

fd_status cpu_reduce_wait(fd_ctx *ctx, const struct fd_reduce_wait_args *a) {
  return fd_comm_reduce_wait(ctx->comm, a->request);
}
