// SPDX-License-Identifier: Apache-2.0
// The emulated twin of the CUDA backend's libraries: matrix products by the CPU backend, sums over ranks by MPI, on
// copies. So a whole step runs through the CUDA backend's own code on a machine without a GPU.
#include "cuda/library.h"

#include <stdlib.h>
#include <string.h>

#include "comm/comm.h"
#include "cpu/cpu.h"

struct twin {
  fd_ctx *cpu;
};

fd_status fd_cuda_library_open(fd_ctx *ctx) {
  struct twin *t = calloc(1, sizeof *t);
  fd_cuda_of(ctx)->blas = t;
  return t ? fd_ctx_create(&fd_cpu_backend, 1, ctx->comm, &t->cpu) : FD_FAIL(FD_ERR_NOMEM, "no memory");
}

void fd_cuda_library_close(fd_ctx *ctx) {
  struct twin *t = fd_cuda_of(ctx)->blas;
  if (t) fd_ctx_destroy(&t->cpu);
  free(t);
  fd_cuda_of(ctx)->blas = NULL;
}

fd_status fd_cuda_library_prepare(fd_ctx *ctx, enum fd_op op, const void *args, size_t *scratch_bytes) {
  size_t ignored;
  *scratch_bytes = 0;
  return fd_cpu_backend.prepare(((struct twin *)fd_cuda_of(ctx)->blas)->cpu, op, args, &ignored);
}

/* Copies every slot to the host, runs the CPU's op there, copies the outputs back. */
static fd_status through_cpu(fd_ctx *ctx, enum fd_op op, const void *args) {
  fd_status st = FD_OK;
  const struct fd_op_info *info = fd_op_info(op);
  fd_ctx *cpu = ((struct twin *)fd_cuda_of(ctx)->blas)->cpu;
  char copy[FD_OP_ARGS_MAX];
  fd_tensor host[FD_MAX_SLOTS] = {{0}}, **slot = fd_op_slots(copy);
  void *scratch = NULL;
  size_t bytes = 0;
  memcpy(copy, args, info->args_bytes);
  for (int s = 0; s < info->n_slots; s++) {
    if (!slot[s]) continue;
    host[s] = *slot[s];
    host[s].flags = 0; /* the copy's address is no identity */
    size_t n = (fd_tensor_bytes(slot[s]) + 127) & ~(size_t)63;
    host[s].data = aligned_alloc(64, n);
    if (!host[s].data) FD_TRY(FD_FAIL(FD_ERR_NOMEM, "no memory"));
    FD_TRY(FD_CUDA(cudaMemcpy(host[s].data, slot[s]->data, fd_tensor_bytes(slot[s]), cudaMemcpyDeviceToHost)));
    slot[s] = &host[s];
  }
  FD_TRY(fd_cpu_backend.prepare(cpu, op, copy, &bytes));
  scratch = aligned_alloc(64, (bytes + 127) & ~(size_t)63);
  if (!scratch) FD_TRY(FD_FAIL(FD_ERR_NOMEM, "no memory"));
  cpu->scratch = scratch;
  cpu->scratch_bytes = bytes;
  FD_TRY(fd_op_run(cpu, op, copy));
  for (int s = 0; s < info->n_slots; s++)
    if (slot[s] && info->dir[s] != 'i')
      FD_TRY(FD_CUDA(cudaMemcpy(fd_op_slots((void *)args)[s]->data, host[s].data, fd_tensor_bytes(&host[s]), cudaMemcpyHostToDevice)));
done:
  for (int s = 0; s < info->n_slots; s++) free(host[s].data);
  free(scratch);
  return st;
}

#define TWIN(name) \
  fd_status cuda_##name(fd_ctx *ctx, const struct fd_##name##_args *a) { return through_cpu(ctx, FD_OP_##name, a); }
TWIN(matmul)

/* The copy must outlive the request, so the sum is awaited at once. */
fd_status cuda_reduce_start(fd_ctx *ctx, const struct fd_reduce_start_args *a) {
  fd_status st = FD_OK;
  size_t bytes = fd_tensor_bytes(a->x);
  void *host = malloc(bytes ? bytes : 1);
  if (!host) return FD_FAIL(FD_ERR_NOMEM, "no memory");
  FD_TRY(FD_CUDA(cudaMemcpy(host, a->x->data, bytes, cudaMemcpyDeviceToHost)));
  FD_TRY(fd_comm_reduce_start(ctx->comm, a->request, host, fd_tensor_numel(a->x), a->x->dtype));
  FD_TRY(fd_comm_reduce_wait(ctx->comm, a->request));
  FD_TRY(FD_CUDA(cudaMemcpy(a->x->data, host, bytes, cudaMemcpyHostToDevice)));
done:
  free(host);
  return st;
}

fd_status cuda_reduce_wait(fd_ctx *ctx, const struct fd_reduce_wait_args *a) {
  (void)ctx, (void)a;
  return FD_OK;
}
