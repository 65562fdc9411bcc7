// SPDX-License-Identifier: Apache-2.0
// Sums and parts between ranks by NCCL, on a stream of their own: `start` waits for the gradients by an event, `wait` makes the ops behind it
// wait for the result. Ranks that share one GPU cannot use NCCL (it refuses); theirs go through host memory and MPI.
// Bytes over each link: ring all-reduce 2 (n - 1) / n of the tensor, reduce-scatter and all-gather (n - 1) / n.
// Invariant: when a run of ops ends (join), the stream of ops comes after all that was started, so a wait in a later run has nothing to do. Nothing
// here is ever recorded: src/graph/exec.c says why.
#include <nccl.h>
#include <stdlib.h>
#include <string.h>

#include "comm/comm.h"
#include "cuda/library.h"

enum { MAX_REQUESTS = 1024 };

struct fd_nccl {
  ncclComm_t comm; /* NULL: through MPI */
  cudaEvent_t done[MAX_REQUESTS];
  bool open[MAX_REQUESTS]; /* started in this run of ops */
  int n_open;
  void *host[MAX_REQUESTS]; /* pinned copies, for MPI */
  size_t host_bytes[MAX_REQUESTS];
};

static fd_status nccl_status(fd_ctx *ctx, ncclResult_t r, const char *what) {
  if (r == ncclSuccess || r == ncclInProgress) return FD_OK;
  return FD_FAIL(FD_ERR_COMM, "NCCL: rank %d on %s: %s: %s (NCCL_DEBUG=WARN tells more)", fd_comm_rank(ctx->comm),
                 ctx->comm ? ctx->comm->host : "this host", what, ncclGetErrorString(r));
}
#define NCCL(call) nccl_status(ctx, (call), #call)

fd_status fd_cuda_collective_open(fd_ctx *ctx) {
  fd_status st = FD_OK;
  ncclUniqueId id;
  struct fd_nccl *c = calloc(1, sizeof *c);
  if (!c) st = FD_FAIL(FD_ERR_NOMEM, "no memory");
  fd_cuda_of(ctx)->nccl = c;
  if (fd_comm_size(ctx->comm) == 1) return st;
  FD_TRY(fd_agree(ctx->comm, st));
  if (fd_cuda_of(ctx)->shared) { /* on some node: all ranks go through MPI */
    ctx->record = false; /* MPI is not on a stream */
    return FD_OK;
  }
  setenv("NCCL_RUNTIME_CONNECT", "0", 0); /* NCCL takes its buffers now, not with the first sum, when the memory is given away */
  memset(&id, 0, sizeof id);
  if (ctx->comm->rank == 0) st = NCCL(ncclGetUniqueId(&id));
  FD_TRY(fd_agree(ctx->comm, st));
  FD_TRY(fd_comm_bcast(ctx->comm, &id, sizeof id, 0));
  FD_TRY(NCCL(ncclCommInitRank(&c->comm, ctx->comm->size, id, ctx->comm->rank)));
done:
  return st;
}

void fd_cuda_collective_close(fd_ctx *ctx) {
  struct fd_nccl *c = fd_cuda_of(ctx)->nccl;
  if (!c) return;
  for (int i = 0; i < MAX_REQUESTS; i++) {
    if (c->done[i]) cudaEventDestroy(c->done[i]);
    if (c->host[i]) cudaFreeHost(c->host[i]);
  }
  if (c->comm) ncclCommDestroy(c->comm);
  free(c);
  fd_cuda_of(ctx)->nccl = NULL;
}

static ncclDataType_t type_of(fd_dtype t) { return t == FD_BF16 ? ncclBfloat16 : t == FD_F64 ? ncclFloat64 : ncclFloat32; }

/* An error of another rank shows here; the communicator is broken then, and so is the job. */
fd_status fd_cuda_collective_check(fd_ctx *ctx) {
  ncclResult_t r = ncclSuccess;
  struct fd_nccl *c = fd_cuda_of(ctx)->nccl;
  if (!c->comm) return FD_OK;
  fd_status st = NCCL(ncclCommGetAsyncError(c->comm, &r));
  if (st == FD_OK) st = nccl_status(ctx, r, "a sum over ranks failed");
  if (st != FD_OK) ncclCommAbort(c->comm), c->comm = NULL;
  return st;
}

static ncclResult_t issue(fd_ctx *ctx, enum fd_comm_kind kind, const fd_tensor *x) {
  const struct fd_cuda *cuda = ctx->state;
  const struct fd_nccl *c = cuda->nccl;
  const size_t n = (size_t)fd_tensor_numel(x), part = n / (size_t)ctx->comm->size;
  void *mine = (char *)x->data + part * (size_t)ctx->comm->rank * fd_dtype_bytes(x->dtype);
  switch (kind) {
    case FD_COMM_REDUCE_SCATTER: return ncclReduceScatter(x->data, mine, part, type_of(x->dtype), ncclSum, c->comm, cuda->comm_stream);
    case FD_COMM_ALL_GATHER: return ncclAllGather(mine, x->data, part, type_of(x->dtype), c->comm, cuda->comm_stream);
    default: return ncclAllReduce(x->data, x->data, n, type_of(x->dtype), ncclSum, c->comm, cuda->comm_stream);
  }
}

static fd_status start_through_host(fd_ctx *ctx, enum fd_comm_kind kind, const fd_tensor *x, int request) {
  fd_status st = FD_OK;
  struct fd_nccl *c = fd_cuda_of(ctx)->nccl;
  const size_t bytes = fd_tensor_bytes(x);
  if (c->host_bytes[request] < bytes) {
    if (c->host[request]) cudaFreeHost(c->host[request]);
    c->host[request] = NULL;
    FD_TRY(FD_CUDA(cudaMallocHost(&c->host[request], bytes)));
    c->host_bytes[request] = bytes;
  }
  FD_TRY(ctx->backend->from_device(ctx, c->host[request], x->data, bytes));
  FD_TRY(fd_comm_collective_start(ctx->comm, kind, request, c->host[request], fd_tensor_numel(x), x->dtype));
done:
  return st;
}

static fd_status start(fd_ctx *ctx, enum fd_comm_kind kind, const fd_tensor *x, int request) {
  fd_status st = FD_OK;
  struct fd_cuda *cuda = ctx->state;
  struct fd_nccl *c = cuda->nccl;
  if (fd_comm_size(ctx->comm) == 1) return FD_OK;
  if (request < 0 || request >= MAX_REQUESTS)
    return FD_FAIL(FD_ERR_ARG, "between ranks: request %d, expected 0 to %d", request, MAX_REQUESTS - 1);
  if (!c->comm) return start_through_host(ctx, kind, x, request);
  if (!c->done[request]) FD_TRY(FD_CUDA(cudaEventCreateWithFlags(&c->done[request], cudaEventDisableTiming)));
  FD_TRY(fd_cuda_collective_check(ctx));
  FD_TRY(FD_CUDA(cudaEventRecord(cuda->comm_event, cuda->stream)));
  FD_TRY(FD_CUDA(cudaStreamWaitEvent(cuda->comm_stream, cuda->comm_event, 0)));
  FD_TRY(nccl_status(ctx, issue(ctx, kind, x), "a collective could not be started"));
  FD_TRY(FD_CUDA(cudaEventRecord(c->done[request], cuda->comm_stream)));
  if (!c->open[request]) c->n_open++;
  c->open[request] = true;
done:
  return st;
}

#define START(op, kind) \
  fd_status cuda_##op(fd_ctx *ctx, const struct fd_##op##_args *a) { return start(ctx, kind, a->x, a->request); }
START(reduce_start, FD_COMM_ALL_REDUCE)
START(reduce_scatter_start, FD_COMM_REDUCE_SCATTER)
START(all_gather_start, FD_COMM_ALL_GATHER)

fd_status cuda_reduce_wait(fd_ctx *ctx, const struct fd_reduce_wait_args *a) {
  struct fd_cuda *cuda = ctx->state;
  struct fd_nccl *c = cuda->nccl;
  if (fd_comm_size(ctx->comm) == 1) return FD_OK;
  if (c->comm) return c->open[a->request] ? FD_CUDA(cudaStreamWaitEvent(cuda->stream, c->done[a->request], 0)) : FD_OK;
  fd_status st = fd_comm_reduce_wait(ctx->comm, a->request);
  return st == FD_OK ? ctx->backend->to_device(ctx, a->x->data, c->host[a->request], fd_tensor_bytes(a->x)) : st;
}

fd_status fd_cuda_collective_join(fd_ctx *ctx) {
  fd_status st = FD_OK;
  struct fd_cuda *cuda = ctx->state;
  struct fd_nccl *c = cuda->nccl;
  if (c->n_open == 0) return FD_OK;
  FD_TRY(FD_CUDA(cudaEventRecord(cuda->join_event[0], cuda->stream)));
  FD_TRY(FD_CUDA(cudaEventRecord(cuda->comm_event, cuda->comm_stream)));
  FD_TRY(FD_CUDA(cudaStreamWaitEvent(cuda->stream, cuda->comm_event, 0)));
  FD_TRY(FD_CUDA(cudaEventRecord(cuda->join_event[1], cuda->stream)));
  cuda->joined = true;
done:
  memset(c->open, 0, sizeof c->open);
  c->n_open = 0;
  return st;
}
