// SPDX-License-Identifier: Apache-2.0
// The parts of cuda/library.c: each library opens, closes and prepares its own ops.
#ifndef FD_CUDA_LIBRARY_STATE_H
#define FD_CUDA_LIBRARY_STATE_H

#include "cuda/library.h"

fd_status fd_cuda_matmul_open(fd_ctx *ctx);
void fd_cuda_matmul_close(fd_ctx *ctx);
fd_status fd_cuda_matmul_prepare(fd_ctx *ctx, const struct fd_matmul_args *a, size_t *scratch_bytes);

/* Both open themselves with their first plan. */
void fd_cuda_gemm_close(fd_ctx *ctx);
void fd_dnn_close(fd_ctx *ctx);

fd_status fd_cuda_collective_open(fd_ctx *ctx);
void fd_cuda_collective_close(fd_ctx *ctx);
fd_status fd_cuda_collective_join(fd_ctx *ctx);
fd_status fd_cuda_collective_check(fd_ctx *ctx);

#endif
