// SPDX-License-Identifier: Apache-2.0
// NCCL's collectives by MPI, on copies, as late as their stream allows: an op that does not wait for a sum finds that there is none.
#include "tests/emulate/nccl.h"

#include <stdlib.h>
#include <string.h>

#include "comm/comm.h"
#include "tests/emulate/emulate.h"

struct fd_emu_nccl {
  fd_comm *comm; /* borrowed */
};

static ncclResult_t failure = ncclSuccess;

void fd_emu_nccl_fail(ncclResult_t error) { failure = error; }

ncclResult_t ncclGetVersion(int *version) { return *version = 0, ncclSuccess; }

ncclResult_t ncclGetUniqueId(ncclUniqueId *id) {
  memset(id, 0x5a, sizeof *id);
  return ncclSuccess;
}

ncclResult_t fd_emu_nccl_init(ncclComm_t *out, fd_comm *comm, int ranks, ncclUniqueId id, int rank) {
  if (!comm || comm->size != ranks || comm->rank != rank || id.internal[127] != 0x5a) return ncclInvalidArgument;
  *out = malloc(sizeof **out);
  if (!*out) return ncclSystemError;
  (*out)->comm = comm;
  return ncclSuccess;
}

ncclResult_t ncclCommDestroy(ncclComm_t comm) {
  free(comm);
  return ncclSuccess;
}
ncclResult_t ncclCommAbort(ncclComm_t comm) { return ncclCommDestroy(comm); }

ncclResult_t ncclCommGetAsyncError(ncclComm_t comm, ncclResult_t *error) {
  (void)comm;
  *error = failure;
  return ncclSuccess;
}

const char *ncclGetErrorString(ncclResult_t result) {
  return result == ncclSuccess ? "no error" : result == ncclRemoteError ? "remote process exited or there was a network error" : "invalid argument";
}

struct exchange {
  ncclComm_t comm;
  enum fd_comm_kind kind;
  void *data; /* device: all elements */
  int64_t n;
  fd_dtype dtype;
};

static int run_exchange(void *data) {
  const struct exchange *e = data;
  const int request = 0;
  const size_t bytes = (size_t)e->n * fd_dtype_bytes(e->dtype);
  void *host = malloc(bytes ? bytes : 1);
  bool ok = host && cudaMemcpy(host, e->data, bytes, cudaMemcpyDeviceToHost) == cudaSuccess &&
            fd_comm_collective_start(e->comm->comm, e->kind, request, host, e->n, e->dtype) == FD_OK &&
            fd_comm_reduce_wait(e->comm->comm, request) == FD_OK && cudaMemcpy(e->data, host, bytes, cudaMemcpyHostToDevice) == cudaSuccess;
  free(host);
  return !ok;
}

/* Under capture NCCL would want the same of all ranks at the same time, and the launch of the same graphs: the backend does without. */
static ncclResult_t later(enum fd_comm_kind kind, void *data, size_t n, ncclDataType_t type, ncclComm_t comm, cudaStream_t stream) {
  enum cudaStreamCaptureStatus captured;
  if (cudaStreamIsCapturing(stream, &captured) != cudaSuccess || captured != cudaStreamCaptureStatusNone) return ncclInvalidUsage;
  const struct exchange e = {comm, kind, data, (int64_t)n, type == ncclBfloat16 ? FD_BF16 : type == ncclFloat64 ? FD_F64 : FD_F32};
  return fd_emu_host_later(stream, run_exchange, &e, sizeof e) == cudaSuccess ? ncclSuccess : ncclUnhandledCudaError;
}

/* In place only, as collective.c calls them. */
ncclResult_t ncclAllReduce(const void *from, void *to, size_t n, ncclDataType_t type, ncclRedOp_t op, ncclComm_t comm, cudaStream_t stream) {
  return from != to || op != ncclSum ? ncclInvalidArgument : later(FD_COMM_ALL_REDUCE, to, n, type, comm, stream);
}

static size_t size_of(ncclDataType_t type) { return type == ncclBfloat16 ? 2 : type == ncclFloat64 ? 8 : 4; }

ncclResult_t ncclReduceScatter(const void *from, void *to, size_t part, ncclDataType_t type, ncclRedOp_t op, ncclComm_t comm, cudaStream_t stream) {
  const size_t mine = part * (size_t)fd_comm_rank(comm->comm) * size_of(type);
  if ((const char *)to != (const char *)from + mine || op != ncclSum) return ncclInvalidArgument;
  return later(FD_COMM_REDUCE_SCATTER, (char *)to - mine, part * (size_t)fd_comm_size(comm->comm), type, comm, stream);
}

ncclResult_t ncclAllGather(const void *from, void *to, size_t part, ncclDataType_t type, ncclComm_t comm, cudaStream_t stream) {
  const size_t mine = part * (size_t)fd_comm_rank(comm->comm) * size_of(type);
  if ((const char *)from != (const char *)to + mine) return ncclInvalidArgument;
  return later(FD_COMM_ALL_GATHER, to, part * (size_t)fd_comm_size(comm->comm), type, comm, stream);
}
