// SPDX-License-Identifier: Apache-2.0
// What cuda/collective.c calls of NCCL, for its emulation by MPI (nccl.c): the same names and meaning as in NCCL's own header.
#ifndef FD_EMULATE_NCCL_H
#define FD_EMULATE_NCCL_H

#include <cuda_runtime_api.h>

typedef struct fd_emu_nccl *ncclComm_t;
typedef struct {
  char internal[128];
} ncclUniqueId;
typedef enum { ncclSuccess = 0, ncclUnhandledCudaError = 1, ncclSystemError = 2, ncclInternalError = 3, ncclInvalidArgument = 4, ncclInvalidUsage = 5,
               ncclRemoteError = 6, ncclInProgress = 7 } ncclResult_t;
typedef enum { ncclFloat32 = 7, ncclFloat64 = 8, ncclBfloat16 = 9 } ncclDataType_t;
typedef enum { ncclSum = 0 } ncclRedOp_t;

ncclResult_t ncclGetVersion(int *version);
ncclResult_t ncclGetUniqueId(ncclUniqueId *id);
ncclResult_t ncclCommDestroy(ncclComm_t comm);
ncclResult_t ncclCommAbort(ncclComm_t comm);
ncclResult_t ncclCommGetAsyncError(ncclComm_t comm, ncclResult_t *error);
const char *ncclGetErrorString(ncclResult_t result);
ncclResult_t ncclAllReduce(const void *from, void *to, size_t n, ncclDataType_t type, ncclRedOp_t op, ncclComm_t comm, cudaStream_t stream);
ncclResult_t ncclReduceScatter(const void *from, void *to, size_t part, ncclDataType_t type, ncclRedOp_t op, ncclComm_t comm, cudaStream_t stream);
ncclResult_t ncclAllGather(const void *from, void *to, size_t part, ncclDataType_t type, ncclComm_t comm, cudaStream_t stream);

struct fd_comm;
/** MPI knows the ranks, a unique id here does not: they are those of the caller's context. */
ncclResult_t fd_emu_nccl_init(ncclComm_t *out, struct fd_comm *comm, int ranks, ncclUniqueId id, int rank);
#define ncclCommInitRank(out, ranks, id, rank) fd_emu_nccl_init(out, ctx->comm, ranks, id, rank)
/** From now on ncclCommGetAsyncError says this. */
void fd_emu_nccl_fail(ncclResult_t error);

#endif
