// SPDX-License-Identifier: Apache-2.0
// What every file of the CUDA backend includes: the contracts, the context's state, and how a CUDA error becomes a status.
#ifndef FD_CUDA_CUDA_H
#define FD_CUDA_CUDA_H

#include "cuda/kernel.h"

#ifdef __cplusplus
extern "C" {
#endif
#include "op/ctx.h"
#ifdef __cplusplus
}
#endif

#ifdef __cplusplus
extern "C" {
#endif

enum { FD_CUDA_WORDS = 64 };

extern const struct fd_backend fd_cuda_backend;

/** ctx->state of the CUDA backend. */
struct fd_cuda {
  int device;
  int sm_count;
  cudaStream_t stream;      /* all ops */
  cudaStream_t comm_stream; /* collectives */
  cudaEvent_t comm_event;
  void *blas;               /* cublasLtHandle_t and its plans (cuda/matmul.c) */
  void *gemm;               /* the same for batches (cuda/gemm.c) */
  void *dnn;                /* cudnnHandle_t and its plans (cuda/cudnn_graph.c) */
  void *nccl;               /* ncclComm_t (cuda/collective.c) */
  struct {
    const void *at;
    int32_t value;
  } words[FD_CUDA_WORDS]; /* counts that the host wrote, by their place on the device */
  int n_words;
};

/** Rows in use at launch: the host's copy of `count`, or `rows`. */
fd_status fd_cuda_count(fd_ctx *ctx, const fd_tensor *count, int64_t rows, int64_t *used);

/** The status of a CUDA call; the message names the call and the CUDA error. */
fd_status fd_cuda_status(cudaError_t e, const char *what, const char *file, int line);
#define FD_CUDA(call) fd_cuda_status((call), #call, __FILE__, __LINE__)

static inline struct fd_cuda *fd_cuda_of(fd_ctx *ctx) { return (struct fd_cuda *)ctx->state; }
static inline cudaStream_t fd_cuda_stream(fd_ctx *ctx) { return fd_cuda_of(ctx)->stream; }

#define X(name, slots) fd_status cuda_##name(fd_ctx *ctx, const struct fd_##name##_args *a);
#include "op/ops.def"
#undef X

#ifdef __cplusplus
}
#endif

#endif
