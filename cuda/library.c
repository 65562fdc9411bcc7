// SPDX-License-Identifier: Apache-2.0
// Opens and closes the libraries of the CUDA backend together.
#include <cublasLt.h>
#include <cudnn_graph.h>
#include <nccl.h>
#include <stdio.h>

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

void fd_cuda_library_versions(char *out, size_t bytes) {
  int nccl = 0;
  const size_t blas = cublasLtGetVersion();
  (void)ncclGetVersion(&nccl);
  const size_t dnn = cudnnGetVersion();
  snprintf(out, bytes, "cuBLASLt %zu.%zu, cuDNN %zu.%zu.%zu, NCCL %d.%d.%d", blas / 10000, blas / 100 % 100, dnn / 10000, dnn / 100 % 100, dnn % 100,
           nccl / 10000, nccl / 100 % 100, nccl % 100);
}

fd_status fd_cuda_library_join(fd_ctx *ctx) { return fd_cuda_collective_join(ctx); }

fd_status fd_cuda_library_check(fd_ctx *ctx) { return fd_cuda_collective_check(ctx); }
