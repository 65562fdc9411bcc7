// SPDX-License-Identifier: Apache-2.0
// The CUDA backend: its table, its memory and streams. One rank drives one device, chosen by its number on the node.
// Invariant: every op runs on fd_cuda.stream; only collectives use another stream, tied to it by events.
#include "cuda/cuda.h"

#include <stdlib.h>
#include <string.h>

#include "comm/comm.h"
#include "cpu/cpu.h"
#include "cuda/library.h"

static const struct fd_ops kernels = {
#define X(name, slots) .name = cuda_##name,
#include "op/ops.def"
#undef X
};

fd_status fd_cuda_status(cudaError_t e, const char *what, const char *file, int line) {
  if (e == cudaSuccess) return FD_OK;
  return fd_fail(e == cudaErrorMemoryAllocation ? FD_ERR_NOMEM : FD_ERR_UNSUPPORTED, file, line, "CUDA: %s: %s", what, cudaGetErrorString(e));
}

/* ---- scratch ----------------------------------------------------------------------------------------------------- */

size_t cuda_rmsnorm_bwd_scratch(const struct fd_rmsnorm_bwd_args *a);
size_t cuda_gate_residual_bwd_scratch(const struct fd_gate_residual_bwd_args *a);
size_t cuda_groupnorm_fwd_scratch(const struct fd_groupnorm_fwd_args *a);
size_t cuda_groupnorm_bwd_scratch(const struct fd_groupnorm_bwd_args *a);
size_t cuda_heads_bwd_scratch(const struct fd_heads_bwd_args *a);
size_t cuda_colsum_scratch(const struct fd_colsum_args *a);
size_t cuda_sumsq_scratch(void);
fd_status cuda_attention_prepare(enum fd_op op, const void *args, size_t *scratch_bytes);
fd_status cuda_conv2d_prepare(fd_ctx *ctx, enum fd_op op, const void *args, size_t *scratch_bytes);

static fd_status cuda_prepare(fd_ctx *ctx, enum fd_op op, const void *args, size_t *scratch_bytes) {
  *scratch_bytes = 0;
  switch (op) {
    case FD_OP_conv2d_fwd:
    case FD_OP_conv2d_bwd_data:
    case FD_OP_conv2d_bwd_weights:
    case FD_OP_matmul: break;
    default: {
      const fd_status st = cpu_check(op, args);
      if (st != FD_OK) return st;
    }
  }
  const fd_status st = fd_op_check(op, args);
  if (st != FD_OK) return st;
  switch (op) {
    case FD_OP_rmsnorm_bwd: *scratch_bytes = cuda_rmsnorm_bwd_scratch(args); return FD_OK;
    case FD_OP_gate_residual_bwd: *scratch_bytes = cuda_gate_residual_bwd_scratch(args); return FD_OK;
    case FD_OP_groupnorm_fwd: *scratch_bytes = cuda_groupnorm_fwd_scratch(args); return FD_OK;
    case FD_OP_groupnorm_bwd: *scratch_bytes = cuda_groupnorm_bwd_scratch(args); return FD_OK;
    case FD_OP_heads_bwd: *scratch_bytes = cuda_heads_bwd_scratch(args); return FD_OK;
    case FD_OP_colsum: *scratch_bytes = cuda_colsum_scratch(args); return FD_OK;
    case FD_OP_sumsq: *scratch_bytes = cuda_sumsq_scratch(); return FD_OK;
    case FD_OP_conv2d_fwd:
    case FD_OP_conv2d_bwd_data:
    case FD_OP_conv2d_bwd_weights: return cuda_conv2d_prepare(ctx, op, args, scratch_bytes);
    case FD_OP_attention_fwd:
    case FD_OP_attention_bwd: return cuda_attention_prepare(op, args, scratch_bytes);
    case FD_OP_matmul: return fd_cuda_library_prepare(ctx, op, args, scratch_bytes);
    default: return FD_OK;
  }
}

/* ---- life -------------------------------------------------------------------------------------------------------- */

static void cuda_close(fd_ctx *ctx) {
  struct fd_cuda *c = ctx->state;
  if (!c) return;
  if (c->stream) cudaStreamSynchronize(c->stream);
  fd_cuda_library_close(ctx);
  if (c->comm_event) cudaEventDestroy(c->comm_event);
  if (c->comm_stream) cudaStreamDestroy(c->comm_stream);
  if (c->stream) cudaStreamDestroy(c->stream);
  free(c);
  ctx->state = NULL;
}

static fd_status cuda_open(fd_ctx *ctx) {
  fd_status st = FD_OK;
  struct fd_cuda *c = calloc(1, sizeof *c);
  int n = 0, rank = ctx->comm ? ctx->comm->node_rank : 0, ranks = ctx->comm ? ctx->comm->node_size : 1;
  if (!c) return FD_FAIL(FD_ERR_NOMEM, "no memory for the CUDA backend");
  ctx->state = c;
  cudaError_t e = cudaGetDeviceCount(&n);
  if (e != cudaSuccess || n == 0)
    FD_TRY(FD_FAIL(FD_ERR_UNSUPPORTED, "cuda: no usable GPU (%s); set trainer.backend = \"cpu\" to run without one",
                   e == cudaSuccess ? "none found" : cudaGetErrorString(e)));
  if (ranks > n && !ctx->share_device)
    FD_TRY(FD_FAIL(FD_ERR_UNSUPPORTED, "cuda: %d ranks on this node, but %d GPU%s; start at most %d ranks per node, or set trainer.share_gpu = true",
                   ranks, n, n == 1 ? "" : "s", n));
  c->device = rank % n;
  FD_TRY(FD_CUDA(cudaSetDevice(c->device)));
  FD_TRY(FD_CUDA(cudaDeviceGetAttribute(&c->sm_count, cudaDevAttrMultiProcessorCount, c->device)));
  FD_TRY(FD_CUDA(cudaStreamCreateWithFlags(&c->stream, cudaStreamNonBlocking)));
  FD_TRY(FD_CUDA(cudaStreamCreateWithFlags(&c->comm_stream, cudaStreamNonBlocking)));
  FD_TRY(FD_CUDA(cudaEventCreateWithFlags(&c->comm_event, cudaEventDisableTiming)));
  FD_TRY(fd_cuda_library_open(ctx));
done:
  if (st != FD_OK) cuda_close(ctx);
  return st;
}

static fd_status cuda_alloc(fd_ctx *ctx, size_t bytes, void **out) {
  void *p = NULL;
  size_t free_bytes = 0, total = 0;
  cudaError_t e = cudaMalloc(&p, bytes ? bytes : 1);
  if (e == cudaErrorMemoryAllocation) {
    (void)cudaGetLastError(); /* it is reported here, not by the next launch */
    (void)cudaMemGetInfo(&free_bytes, &total);
    return FD_FAIL(FD_ERR_NOMEM, "cuda: no memory: %.2f GB wanted, %.2f of %.2f GB free on GPU %d; `fdhpc plan` shows what a rank needs",
                   (double)bytes * 1e-9, (double)free_bytes * 1e-9, (double)total * 1e-9, fd_cuda_of(ctx)->device);
  }
  if (e != cudaSuccess) return FD_CUDA(e);
  fd_status st = FD_CUDA(cudaMemsetAsync(p, 0, bytes, fd_cuda_stream(ctx)));
  if (st != FD_OK) {
    cudaFree(p);
    return st;
  }
  *out = p;
  return FD_OK;
}

static void cuda_free(fd_ctx *ctx, void *p) {
  (void)ctx;
  cudaFree(p);
}

/* Counts of rows are copied by the host; matrix products need them when they are launched. So a copy of one word is remembered. */
static void remember_word(struct fd_cuda *c, const void *dst, const void *src) {
  int i = 0;
  while (i < c->n_words && c->words[i].at != dst) i++;
  if (i == FD_CUDA_WORDS) i = c->n_words = 0; /* forgotten words are read back from the device */
  if (i == c->n_words) c->n_words++;
  c->words[i].at = dst;
  memcpy(&c->words[i].value, src, sizeof c->words[i].value);
}

fd_status fd_cuda_count(fd_ctx *ctx, const fd_tensor *count, int64_t rows, int64_t *used) {
  struct fd_cuda *c = ctx->state;
  *used = rows;
  if (!count) return FD_OK;
  for (int i = 0; i < c->n_words; i++)
    if (c->words[i].at == count->data) {
      *used = c->words[i].value < rows ? c->words[i].value : rows;
      return FD_OK;
    }
  int32_t value;
  fd_status st = ctx->backend->from_device(ctx, &value, count->data, sizeof value);
  if (st == FD_OK) *used = value < rows ? value : rows;
  return st;
}

static fd_status cuda_to_device(fd_ctx *ctx, void *dst, const void *src, size_t bytes) {
  if (bytes == sizeof(int32_t)) remember_word(ctx->state, dst, src);
  return FD_CUDA(cudaMemcpyAsync(dst, src, bytes, cudaMemcpyHostToDevice, fd_cuda_stream(ctx)));
}

static fd_status cuda_from_device(fd_ctx *ctx, void *dst, const void *src, size_t bytes) {
  fd_status st = FD_CUDA(cudaMemcpyAsync(dst, src, bytes, cudaMemcpyDeviceToHost, fd_cuda_stream(ctx)));
  return st == FD_OK ? FD_CUDA(cudaStreamSynchronize(fd_cuda_stream(ctx))) : st;
}

static fd_status cuda_sync(fd_ctx *ctx) { return FD_CUDA(cudaStreamSynchronize(fd_cuda_stream(ctx))); }

static bool cuda_usable(void) {
  int n = 0;
  return cudaGetDeviceCount(&n) == cudaSuccess && n > 0;
}

const struct fd_backend fd_cuda_backend = {
    .name = "cuda",
    .ops = &kernels,
    .usable = cuda_usable,
    .open = cuda_open,
    .close = cuda_close,
    .alloc = cuda_alloc,
    .free = cuda_free,
    .to_device = cuda_to_device,
    .from_device = cuda_from_device,
    .sync = cuda_sync,
    .prepare = cuda_prepare,
};
