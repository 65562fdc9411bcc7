// SPDX-License-Identifier: Apache-2.0
// Opens and closes the libraries of the CUDA backend together.
#include "cuda/library_state.h"

fd_status fd_cuda_library_open(fd_ctx *ctx) {
  fd_status st = fd_cuda_matmul_open(ctx);
  if (st == FD_OK) st = fd_cuda_collective_open(ctx);
  return st;
}

void fd_cuda_library_close(fd_ctx *ctx) {
  fd_cuda_collective_close(ctx);
  fd_dnn_close(ctx);
  fd_cuda_gemm_close(ctx);
  fd_cuda_matmul_close(ctx);
}

fd_status fd_cuda_library_prepare(fd_ctx *ctx, enum fd_op op, const void *args, size_t *scratch_bytes) {
  if (op != FD_OP_matmul) return FD_FAIL(FD_ERR_ARG, "%s: no library does this op", fd_op_info(op)->name);
  return fd_cuda_matmul_prepare(ctx, args, scratch_bytes);
}
