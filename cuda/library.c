// SPDX-License-Identifier: Apache-2.0
// Opens and closes the libraries of the CUDA backend together.
#include <cublasLt.h>
#include <nccl.h>
#include <stdio.h>

#include "cuda/cudnn_graph.h"
#include "cuda/library.h"

fd_status fd_cuda_library_open(fd_ctx *ctx) {
  fd_status st = fd_cuda_gemm_open(ctx);
  if (st == FD_OK) st = fd_cuda_collective_open(ctx);
  return st;
}

void fd_cuda_library_close(fd_ctx *ctx) {
  fd_cuda_collective_close(ctx);
  fd_dnn_close(ctx);
  fd_cuda_gemm_close(ctx);
}

void fd_cuda_library_versions(char *out, size_t bytes) {
  int nccl = 0;
  const size_t blas = cublasLtGetVersion(), dnn = cudnnGetVersion();
  (void)ncclGetVersion(&nccl);
  snprintf(out, bytes, "cuBLASLt %zu.%zu, cuDNN %zu.%zu.%zu, NCCL %d.%d.%d", blas / 10000, blas / 100 % 100, dnn / 10000, dnn / 100 % 100, dnn % 100,
           nccl / 10000, nccl / 100 % 100, nccl % 100);
}
