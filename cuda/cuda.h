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

enum {
  FD_CUDA_WORDS = 64,
  FD_CUDA_COUNT_STEPS = 8 /* values of a count: each has plans of cuBLASLt and a recording of its own */
};

extern const struct fd_backend fd_cuda_backend;

/** ctx->state of the CUDA backend. */
struct fd_cuda {
  int device;
  bool shared;              /* on some node two ranks use one GPU, so NCCL cannot be used */
  int sm_count;
  cudaStream_t stream;      /* all ops */
  cudaStream_t comm_stream; /* collectives */
  cudaEvent_t comm_event;
  cudaEvent_t join_event[2]; /* around the wait for all sums: what was not hidden behind computation */
  bool joined;               /* they were recorded and not read yet */
  char *stage;               /* pinned, two halves: copies to the device start here, so that the caller's memory is free at once */
  size_t stage_used;         /* of the half in use */
  int stage_half;
  cudaEvent_t stage_done[2]; /* behind the last copy from each half */
  void *blas;               /* cublasLtHandle_t and its plans (cuda/gemm.c) */
  void *dnn;                /* cudnnHandle_t and its plans (cuda/cudnn_graph.c) */
  void *nccl;               /* ncclComm_t (cuda/collective.c) */
  struct {
    const void *at;
    int32_t value;
  } words[FD_CUDA_WORDS]; /* counts that the host wrote, by their place on the device */
  int n_words;
  struct fd_cuda_recording *recording; /* being made (cuda/record.c); NULL: ops run */
};

/* ---- recordings (cuda/record.c) ---- */

fd_status fd_cuda_record_begin(fd_ctx *ctx);
fd_status fd_cuda_record_end(fd_ctx *ctx, void **out);
bool fd_cuda_record_fits(fd_ctx *ctx, const void *recording);
fd_status fd_cuda_replay(fd_ctx *ctx, void *recording);
void fd_cuda_record_free(fd_ctx *ctx, void **recording);
/** A count was looked at: the recording being made holds for this value only. */
fd_status fd_cuda_record_saw(fd_ctx *ctx, const void *at, int32_t value);
/** The host's copy of a word on the device; false: not known. */
bool fd_cuda_word(const struct fd_cuda *c, const void *at, int32_t *value);

/** Rows in use at launch: the host's copy of `count`, or `rows`. */
fd_status fd_cuda_count(fd_ctx *ctx, const fd_tensor *count, int64_t rows, int64_t *used);

/** The status of a CUDA call; the message names the call and the CUDA error. */
fd_status fd_cuda_status(cudaError_t e, const char *what, const char *file, int line);
#define FD_CUDA(call) fd_cuda_status((call), #call, __FILE__, __LINE__)

static inline struct fd_cuda *fd_cuda_of(fd_ctx *ctx) { return (struct fd_cuda *)ctx->state; }
/** Parts of an op's scratch begin at multiples of 256 bytes. */
static inline size_t fd_cuda_aligned(size_t bytes) { return (bytes + 255) & ~(size_t)255; }
static inline cudaStream_t fd_cuda_stream(fd_ctx *ctx) { return fd_cuda_of(ctx)->stream; }

#define X(name, slots) fd_status cuda_##name(fd_ctx *ctx, const struct fd_##name##_args *a);
#include "op/ops.def"
#undef X

#ifdef __cplusplus
}
#endif

#endif
