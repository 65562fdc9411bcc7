// SPDX-License-Identifier: Apache-2.0
// The emulated twin of the CUDA backend's libraries: matrix products by the CPU backend, on copies;
// sums over ranks are cuda/collective.c's own, on NCCL's twin (nccl.c). So a whole step runs through the CUDA backend's own code on a machine without a GPU.
#include "cuda/library_state.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "comm/comm.h"
#include "cpu/cpu.h"
#include "tests/emulate/nccl.h"

struct twin {
  fd_ctx *cpu;
};

fd_status fd_cuda_library_open(fd_ctx *ctx) {
  struct twin *t = calloc(1, sizeof *t);
  fd_status st = t ? fd_ctx_create(&fd_cpu_backend, 1, ctx->comm, &t->cpu) : FD_FAIL(FD_ERR_NOMEM, "no memory");
  fd_cuda_of(ctx)->blas = t;
  fd_emu_nccl_ranks(ctx->comm);
  return st == FD_OK ? fd_cuda_collective_open(ctx) : st;
}

void fd_cuda_library_close(fd_ctx *ctx) {
  struct twin *t = fd_cuda_of(ctx)->blas;
  fd_cuda_collective_close(ctx);
  fd_dnn_close(ctx);
  if (t) fd_ctx_destroy(&t->cpu);
  free(t);
  fd_cuda_of(ctx)->blas = NULL;
}

fd_status fd_cuda_library_prepare(fd_ctx *ctx, enum fd_op op, const void *args, size_t *scratch_bytes) {
  size_t ignored;
  *scratch_bytes = 0;
  return fd_cpu_backend.prepare(((struct twin *)fd_cuda_of(ctx)->blas)->cpu, op, args, &ignored);
}

/* A call of a twin, which a captured stream makes later: the caller's args are copied with the tensors that they name. */
struct call {
  fd_ctx *cpu;
  enum fd_op op;
  char args[FD_OP_ARGS_MAX];
  fd_tensor slot[FD_MAX_SLOTS];
  bool given[FD_MAX_SLOTS];
};

/* Copies every slot to the host, runs the CPU's op there, copies the outputs back. */
static fd_status call_status; /* of the last call; its message is the thread's */

static int run_call(void *data) {
  fd_status st = FD_OK;
  struct call *c = data;
  const struct fd_op_info *info = fd_op_info(c->op);
  fd_tensor host[FD_MAX_SLOTS] = {{0}}, **slot = fd_op_slots(c->args);
  void *scratch = NULL;
  size_t bytes = 0;
  for (int s = 0; s < info->n_slots; s++) {
    slot[s] = NULL;
    if (!c->given[s]) continue;
    host[s] = c->slot[s];
    host[s].flags = 0; /* the copy's address is no identity */
    size_t n = (fd_tensor_bytes(&host[s]) + 127) & ~(size_t)63;
    host[s].data = aligned_alloc(64, n);
    if (!host[s].data) FD_TRY(FD_FAIL(FD_ERR_NOMEM, "no memory"));
    FD_TRY(FD_CUDA(cudaMemcpy(host[s].data, c->slot[s].data, fd_tensor_bytes(&host[s]), cudaMemcpyDeviceToHost)));
    slot[s] = &host[s];
  }
  FD_TRY(fd_cpu_backend.prepare(c->cpu, c->op, c->args, &bytes));
  scratch = aligned_alloc(64, (bytes + 127) & ~(size_t)63);
  if (!scratch) FD_TRY(FD_FAIL(FD_ERR_NOMEM, "no memory"));
  c->cpu->scratch = scratch;
  c->cpu->scratch_bytes = bytes;
  FD_TRY(fd_op_run(c->cpu, c->op, c->args));
  for (int s = 0; s < info->n_slots; s++)
    if (slot[s] && info->dir[s] != 'i')
      FD_TRY(FD_CUDA(cudaMemcpy(c->slot[s].data, host[s].data, fd_tensor_bytes(&host[s]), cudaMemcpyHostToDevice)));
done:
  for (int s = 0; s < info->n_slots; s++) free(host[s].data);
  free(scratch);
  call_status = st;
  return st != FD_OK;
}

static fd_status through_cpu(fd_ctx *ctx, enum fd_op op, const void *args) {
  struct call call = {.cpu = ((struct twin *)fd_cuda_of(ctx)->blas)->cpu, .op = op};
  const struct fd_op_info *info = fd_op_info(op);
  memcpy(call.args, args, info->args_bytes);
  for (int s = 0; s < info->n_slots; s++) {
    const fd_tensor *t = ((fd_tensor *const *)args)[s];
    call.given[s] = t != NULL;
    if (t) call.slot[s] = *t;
  }
  return fd_emu_host(run_call, &call, sizeof call) == cudaSuccess ? FD_OK : call_status;
}

static void first_rows(fd_tensor *t, int64_t rows) {
  const int64_t cols = fd_tensor_cols(t);
  t->ndim = 2;
  t->shape[0] = rows;
  t->shape[1] = cols;
}

/* As cuBLASLt has it: the rows in use are an argument, so a recording holds for this count only. */
fd_status cuda_matmul(fd_ctx *ctx, const struct fd_matmul_args *args) {
  struct fd_matmul_args m = *args;
  fd_tensor a = *args->a, b = *args->b, c = *args->c;
  int64_t used;
  fd_status st = fd_cuda_count(ctx, args->count, fd_tensor_rows(args->a), &used);
  if (st != FD_OK || !args->count) return st == FD_OK ? through_cpu(ctx, FD_OP_matmul, args) : st;
  first_rows(&a, used);
  first_rows(args->trans_a ? &b : &c, used);
  m.a = &a, m.b = &b, m.c = &c, m.count = NULL;
  return through_cpu(ctx, FD_OP_matmul, &m);
}

fd_status fd_cuda_library_join(fd_ctx *ctx) { return fd_cuda_collective_join(ctx); }

fd_status fd_cuda_library_check(fd_ctx *ctx) { return fd_cuda_collective_check(ctx); }

void fd_cuda_library_versions(char *out, size_t bytes) { snprintf(out, bytes, "libraries emulated by the CPU backend and MPI"); }
