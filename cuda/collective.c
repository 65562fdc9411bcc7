// SPDX-License-Identifier: Apache-2.0
// Sums over ranks by NCCL, on a stream of their own: `start` waits for the gradients by an event, `wait` makes the ops behind it wait
// for the sum. Ranks that share one GPU cannot use NCCL (it refuses); their sums go through host memory and MPI.
// Ring all-reduce moves 2 (n - 1) / n of the bytes over each link.
#include <nccl.h>
#include <stdlib.h>
#include <string.h>

#include "comm/comm.h"
#include "cuda/library_state.h"

enum { MAX_REQUESTS = 1024 };

struct fd_nccl {
  ncclComm_t comm; /* NULL: through MPI */
  cudaEvent_t done[MAX_REQUESTS];
  void *host[MAX_REQUESTS]; /* pinned copies, for MPI */
  size_t host_bytes[MAX_REQUESTS];
};

static fd_status nccl_status(fd_ctx *ctx, ncclResult_t r, const char *what) {
  if (r == ncclSuccess || r == ncclInProgress) return FD_OK;
  return FD_FAIL(FD_ERR_COMM, "NCCL: rank %d on %s: %s: %s", fd_comm_rank(ctx->comm), ctx->comm ? ctx->comm->host : "this host", what,
                 ncclGetErrorString(r));
}
#define NCCL(call) nccl_status(ctx, (call), #call)

fd_status fd_cuda_collective_open(fd_ctx *ctx) {
  fd_status st = FD_OK;
  ncclUniqueId id;
  int shared = 0, n = 0;
  struct fd_nccl *c = calloc(1, sizeof *c);
  if (!c) return FD_FAIL(FD_ERR_NOMEM, "no memory");
  fd_cuda_of(ctx)->nccl = c;
  if (fd_comm_size(ctx->comm) == 1) return FD_OK;
  FD_TRY(FD_CUDA(cudaGetDeviceCount(&n)));
  shared = ctx->comm->node_size > n;
  int64_t any = shared;
  FD_TRY(fd_comm_allreduce_i64(ctx->comm, &any, 1, FD_COMM_MAX));
  if (any) return FD_OK; /* some node shares a GPU: all ranks go through MPI */
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
static fd_status check_async(fd_ctx *ctx) {
  ncclResult_t r = ncclSuccess;
  struct fd_nccl *c = fd_cuda_of(ctx)->nccl;
  fd_status st = NCCL(ncclCommGetAsyncError(c->comm, &r));
  if (st == FD_OK) st = nccl_status(ctx, r, "an earlier collective");
  if (st != FD_OK) ncclCommAbort(c->comm), c->comm = NULL;
  return st;
}

fd_status cuda_reduce_start(fd_ctx *ctx, const struct fd_reduce_start_args *a) {
  fd_status st = FD_OK;
  struct fd_cuda *cuda = ctx->state;
  struct fd_nccl *c = cuda->nccl;
  const size_t bytes = fd_tensor_bytes(a->x);
  if (fd_comm_size(ctx->comm) == 1) return FD_OK;
  if (a->request < 0 || a->request >= MAX_REQUESTS)
    return FD_FAIL(FD_ERR_ARG, "reduce_start: request %d, expected 0 to %d", a->request, MAX_REQUESTS - 1);
  if (!c->done[a->request]) FD_TRY(FD_CUDA(cudaEventCreateWithFlags(&c->done[a->request], cudaEventDisableTiming)));
  if (!c->comm) {
    if (c->host_bytes[a->request] < bytes) {
      if (c->host[a->request]) cudaFreeHost(c->host[a->request]);
      c->host[a->request] = NULL;
      FD_TRY(FD_CUDA(cudaMallocHost(&c->host[a->request], bytes)));
      c->host_bytes[a->request] = bytes;
    }
    FD_TRY(ctx->backend->from_device(ctx, c->host[a->request], a->x->data, bytes));
    return fd_comm_reduce_start(ctx->comm, a->request, c->host[a->request], fd_tensor_numel(a->x), a->x->dtype);
  }
  FD_TRY(check_async(ctx));
  FD_TRY(FD_CUDA(cudaEventRecord(cuda->comm_event, cuda->stream)));
  FD_TRY(FD_CUDA(cudaStreamWaitEvent(cuda->comm_stream, cuda->comm_event, 0)));
  FD_TRY(NCCL(ncclAllReduce(a->x->data, a->x->data, (size_t)fd_tensor_numel(a->x), type_of(a->x->dtype), ncclSum, c->comm, cuda->comm_stream)));
  FD_TRY(FD_CUDA(cudaEventRecord(c->done[a->request], cuda->comm_stream)));
done:
  return st;
}

fd_status cuda_reduce_wait(fd_ctx *ctx, const struct fd_reduce_wait_args *a) {
  struct fd_cuda *cuda = ctx->state;
  struct fd_nccl *c = cuda->nccl;
  if (fd_comm_size(ctx->comm) == 1) return FD_OK;
  if (c->comm) return FD_CUDA(cudaStreamWaitEvent(cuda->stream, c->done[a->request], 0));
  fd_status st = fd_comm_reduce_wait(ctx->comm, a->request);
  return st == FD_OK ? ctx->backend->to_device(ctx, a->x->data, c->host[a->request], fd_tensor_bytes(a->x)) : st;
}
