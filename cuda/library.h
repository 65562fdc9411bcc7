// SPDX-License-Identifier: Apache-2.0
// What libraries do for the CUDA backend: matrix products (cuBLASLt), sums over ranks (NCCL).
// cuda/library.c, matmul.c and collective.c on a GPU; tests/emulate/library.c has the same functions on the CPU.
#ifndef FD_CUDA_LIBRARY_H
#define FD_CUDA_LIBRARY_H

#include "cuda/cuda.h"

#ifdef __cplusplus
extern "C" {
#endif

fd_status fd_cuda_library_open(fd_ctx *ctx);
void fd_cuda_library_close(fd_ctx *ctx);
/** Checks shapes, makes plans (cached by shape), says how much scratch the op needs. */
fd_status fd_cuda_library_prepare(fd_ctx *ctx, enum fd_op op, const void *args, size_t *scratch_bytes);

/** "cuBLASLt 13.1, NCCL 2.28.9" */
void fd_cuda_library_versions(char *out, size_t bytes);
/** Later ops come after all sums that were started. */
fd_status fd_cuda_library_join(fd_ctx *ctx);
/** FD_ERR_COMM if a library of another rank has failed, which would leave this one waiting for ever. */
fd_status fd_cuda_library_check(fd_ctx *ctx);

#ifdef __cplusplus
}
#endif

#endif
