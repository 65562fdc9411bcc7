// SPDX-License-Identifier: Apache-2.0
// Runs of ops as CUDA graphs: recorded by stream capture, then launched as one. A matrix product's rows are an argument of its kernel, so a
// recording holds for the counts that it saw. Invariant: between begin and end nothing runs, so a recording that fails has changed nothing; nothing
// in it concerns other ranks (src/graph/exec.c).
#include <stdlib.h>

#include "cuda/library.h"

struct fd_cuda_recording {
  cudaGraphExec_t exec;
  int n;
  struct {
    const void *at;
    int32_t value;
  } saw[FD_CUDA_WORDS];
};

fd_status fd_cuda_record_begin(fd_ctx *ctx) {
  struct fd_cuda *c = ctx->state;
  struct fd_cuda_recording *r = calloc(1, sizeof *r);
  if (!r) return FD_FAIL(FD_ERR_NOMEM, "no memory for a recording");
  /* relaxed: a library may load a kernel at its first use, which stricter modes forbid */
  const fd_status st = FD_CUDA(cudaStreamBeginCapture(c->stream, cudaStreamCaptureModeRelaxed));
  if (st != FD_OK) free(r);
  else c->recording = r;
  return st;
}

fd_status fd_cuda_record_end(fd_ctx *ctx, void **out) {
  struct fd_cuda *c = ctx->state;
  struct fd_cuda_recording *r = c->recording;
  cudaGraph_t graph = NULL;
  if (!r) return FD_FAIL(FD_ERR_ARG, "cuda: no recording was begun");
  c->recording = NULL;
  fd_status st = FD_CUDA(cudaStreamEndCapture(c->stream, &graph));
  if (st == FD_OK && out) st = FD_CUDA(cudaGraphInstantiate(&r->exec, graph, 0));
  /* its memory on the device now, where a failure means that ops are issued, and not at the first replay */
  if (st == FD_OK && out) st = FD_CUDA(cudaGraphUpload(r->exec, c->stream));
  if (graph) cudaGraphDestroy(graph);
  if (st == FD_OK && out) {
    *out = r;
    return FD_OK;
  }
  (void)cudaGetLastError(); /* it is reported here, not by the next launch */
  if (r->exec) cudaGraphExecDestroy(r->exec);
  free(r);
  return st;
}

bool fd_cuda_record_fits(fd_ctx *ctx, const void *recording) {
  const struct fd_cuda_recording *r = recording;
  int32_t value;
  for (int i = 0; i < r->n; i++)
    if (!fd_cuda_word(ctx->state, r->saw[i].at, &value) || value != r->saw[i].value) return false;
  return true;
}

fd_status fd_cuda_replay(fd_ctx *ctx, void *recording) {
  struct fd_cuda *c = ctx->state;
  const struct fd_cuda_recording *r = recording;
  fd_status st = fd_cuda_collective_check(ctx);
  if (st == FD_OK) st = FD_CUDA(cudaGraphLaunch(r->exec, c->stream));
  return st;
}

void fd_cuda_record_free(fd_ctx *ctx, void **recording) {
  struct fd_cuda_recording *r = *recording;
  if (!r) return;
  (void)cudaStreamSynchronize(fd_cuda_stream(ctx)); /* it may be running */
  cudaGraphExecDestroy(r->exec);
  free(r);
  *recording = NULL;
}

fd_status fd_cuda_record_saw(fd_ctx *ctx, const void *at, int32_t value) {
  struct fd_cuda_recording *r = fd_cuda_of(ctx)->recording;
  if (!r) return FD_OK;
  for (int i = 0; i < r->n; i++)
    if (r->saw[i].at == at) return FD_OK;
  if (r->n == FD_CUDA_WORDS) return FD_FAIL(FD_ERR_UNSUPPORTED, "cuda: more than %d counts in one recording", FD_CUDA_WORDS);
  r->saw[r->n].at = at;
  r->saw[r->n++].value = value;
  return FD_OK;
}
