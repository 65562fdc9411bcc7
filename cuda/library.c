// SPDX-License-Identifier: Apache-2.0
// Opens and closes the libraries of the CUDA backend together.
#include "cuda/library_state.h"

fd_status fd_cuda_library_open(fd_ctx *ctx) {
  fd_status st = fd_cuda_matmul_open(ctx);
  if (st == FD_OK) st = fd_cuda_dnn_open(ctx);
  if (st == FD_OK) st = fd_cuda_collective_open(ctx);
  return st;
}

void fd_cuda_library_close(fd_ctx *ctx) {
  fd_cuda_collective_close(ctx);
  fd_cuda_dnn_close(ctx);
  fd_cuda_matmul_close(ctx);
}

fd_status fd_cuda_library_prepare(fd_ctx *ctx, enum fd_op op, const void *args, size_t *scratch_bytes) {
  return op == FD_OP_matmul ? fd_cuda_matmul_prepare(ctx, args, scratch_bytes) : fd_cuda_dnn_prepare(ctx, op, args, scratch_bytes);
}
