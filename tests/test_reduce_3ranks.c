// SPDX-License-Identifier: Apache-2.0
// The ops between ranks through a graph, on 1, 2 and 3 ranks: other ops run between start and wait, the value is not touched, and what
// comes after the wait reads the sum (all of it, or this rank's part) or everybody's parts. Exact: small integers. Built once more for the
// CUDA backend (tests/emulate), which records what lies between sums in the second run and replays it in the third.
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "comm/comm.h"
#include "graph/backend.h"
#include "graph/build.h"
#include "graph/internal.h"

static int failed;
#define CHECK(c)                                                                                            \
  do {                                                                                                      \
    if (!(c)) failed = 1, fprintf(stderr, "%s:%d: %s (%s)\n", __FILE__, __LINE__, #c, fd_status_message()); \
  } while (0)

#ifdef FD_EMULATE
#include "cuda/cuda.h"
#include "tests/emulate/nccl.h"
#define BACKEND "cuda"
#else
#define BACKEND "cpu"
#endif
enum { ROWS = 37, COLS = 18, N = ROWS * COLS }; /* 2 and 3 ranks have equal parts */

static void test_graph(fd_comm *comm, fd_dtype dtype) {
  const struct fd_backend *backend = NULL;
  fd_ctx *ctx = NULL;
  fd_graph *g = NULL;
  size_t bytes = 0;
  void *arena = NULL;
  const int64_t shape[2] = {ROWS, COLS}, one[1] = {1};
  CHECK(fd_backend_find(BACKEND, &backend) == FD_OK && fd_ctx_create_with(backend, 1, comm, FD_CTX_SHARE_DEVICE, &ctx) == FD_OK);
  if (!ctx) return;
  CHECK(fd_graph_create(ctx, "reduce", &g) == FD_OK);
  fd_var x = fd_graph_input(g, "x", dtype, 2, shape), z = fd_graph_input(g, "z", dtype, 2, shape), d = fd_graph_input(g, "d", FD_F64, 1, one);
  fd_graph_emit(g, FD_OP_reduce_start, &(struct fd_reduce_start_args){.request = 4}, &x);
  fd_graph_emit(g, FD_OP_reduce_start, &(struct fd_reduce_start_args){.request = 0}, &d);
  fd_var y = fd_add(g, z, z, 0); /* runs beside it; then its memory is free again */
  y = fd_add(g, y, z, 0);
  fd_graph_emit(g, FD_OP_reduce_wait, &(struct fd_reduce_wait_args){.request = 4}, &x);
  fd_graph_emit(g, FD_OP_reduce_wait, &(struct fd_reduce_wait_args){.request = 0}, &d);
  fd_var sum = fd_add(g, x, y, 0);
  fd_graph_keep(g, sum);
  fd_var part = fd_graph_input(g, "part", dtype, 2, shape), parts = fd_graph_input(g, "parts", dtype, 2, shape);
  fd_graph_emit(g, FD_OP_reduce_scatter_start, &(struct fd_reduce_scatter_start_args){.request = 1}, &part);
  fd_graph_emit(g, FD_OP_all_gather_start, &(struct fd_all_gather_start_args){.request = 2}, &parts);
  fd_graph_emit(g, FD_OP_reduce_wait, &(struct fd_reduce_wait_args){.request = 2}, &parts);
  fd_graph_emit(g, FD_OP_reduce_wait, &(struct fd_reduce_wait_args){.request = 1}, &part);
  CHECK(fd_graph_plan(g, &bytes) == FD_OK && backend->alloc(ctx, bytes, &arena) == FD_OK && fd_graph_attach(g, arena, bytes) == FD_OK);
  for (int step = 0; step < 3; step++) { /* the same graph every step, its requests free again */
    float f[N], zeros_are_not[N];
    fd_bf16 h[N], hz[N];
    for (int i = 0; i < N; i++) {
      f[i] = (float)((comm->rank + 1) * (i % 5) + step);
      zeros_are_not[i] = (float)(i % 3);
      h[i] = fd_f32_to_bf16(f[i]);
      hz[i] = fd_f32_to_bf16(zeros_are_not[i]);
    }
    double mine = 0.5 * (comm->rank + 1), all = 0;
    size_t size = N * fd_dtype_bytes(dtype);
    CHECK(fd_graph_set(g, x, dtype == FD_F32 ? (void *)f : (void *)h, size) == FD_OK);
    CHECK(fd_graph_set(g, z, dtype == FD_F32 ? (void *)zeros_are_not : (void *)hz, size) == FD_OK);
    CHECK(fd_graph_set(g, d, &mine, sizeof mine) == FD_OK);
    CHECK(fd_graph_set(g, part, dtype == FD_F32 ? (void *)f : (void *)h, size) == FD_OK);
    CHECK(fd_graph_set(g, parts, dtype == FD_F32 ? (void *)f : (void *)h, size) == FD_OK);
    CHECK(fd_graph_run(g) == FD_OK);
    CHECK(fd_graph_read(g, sum, dtype == FD_F32 ? (void *)f : (void *)h, size) == FD_OK);
    CHECK(fd_graph_read(g, d, &all, sizeof all) == FD_OK);
    int n = comm->size, wrong = 0;
    for (int i = 0; i < N; i++)
      wrong += (dtype == FD_F32 ? f[i] : fd_bf16_to_f32(h[i])) != (float)(n * (n + 1) / 2 * (i % 5) + n * step + 3 * (i % 3));
    CHECK(wrong == 0 && all == 0.25 * n * (n + 1));
    CHECK(fd_graph_read(g, part, dtype == FD_F32 ? (void *)f : (void *)h, size) == FD_OK);
    for (int i = comm->rank * (N / n); i < (comm->rank + 1) * (N / n); i++)
      wrong += (dtype == FD_F32 ? f[i] : fd_bf16_to_f32(h[i])) != (float)(n * (n + 1) / 2 * (i % 5) + n * step);
    CHECK(wrong == 0);
    CHECK(fd_graph_read(g, parts, dtype == FD_F32 ? (void *)f : (void *)h, size) == FD_OK);
    for (int i = 0; i < N; i++) wrong += (dtype == FD_F32 ? f[i] : fd_bf16_to_f32(h[i])) != (float)((i / (N / n) + 1) * (i % 5) + step);
    CHECK(wrong == 0);
#ifdef FD_EMULATE
    if (!ctx->record) CHECK(g->n_recordings == 0 && comm->size > 1 && getenv("FD_EMU_ONE_GPU"));
    else /* what lies between sums */
      CHECK(g->n_recordings == (comm->size > 1 ? 2 : 1) && (g->recordings[0].what != NULL) == (step > 0));
#endif
  }
  fd_graph_destroy(&g);
  backend->free(ctx, arena);
  fd_ctx_destroy(&ctx);
}

/* Started in one run of ops and awaited in another, as gradients are. */
static void test_two_runs(fd_comm *comm) {
  const struct fd_backend *backend = NULL;
  fd_ctx *ctx = NULL;
  fd_graph *g = NULL;
  size_t bytes = 0;
  void *arena = NULL;
  const int64_t n = N;
  CHECK(fd_backend_find(BACKEND, &backend) == FD_OK && fd_ctx_create(backend, 1, comm, &ctx) == FD_OK);
  CHECK(fd_graph_create(ctx, "two runs", &g) == FD_OK);
  fd_var x = fd_graph_input(g, "x", FD_F32, 1, &n);
  fd_graph_emit(g, FD_OP_reduce_start, &(struct fd_reduce_start_args){.request = 3}, &x);
  fd_graph_emit(g, FD_OP_reduce_wait, &(struct fd_reduce_wait_args){.request = 3}, &x);
  fd_var y = fd_add(g, x, x, 0);
  fd_graph_keep(g, y);
  CHECK(fd_graph_plan(g, &bytes) == FD_OK && backend->alloc(ctx, bytes, &arena) == FD_OK && fd_graph_attach(g, arena, bytes) == FD_OK);
  for (int step = 0; step < 4; step++) {
    float f[N];
    int wrong = 0;
    for (int i = 0; i < N; i++) f[i] = (float)((comm->rank + 1) * (i % 5) + step);
    CHECK(fd_graph_set(g, x, f, sizeof f) == FD_OK);
    CHECK(fd_graph_run_nodes(g, 0, 1) == FD_OK);
    CHECK(fd_graph_run_nodes(g, 1, fd_graph_n_nodes(g)) == FD_OK);
    CHECK(fd_graph_read(g, y, f, sizeof f) == FD_OK);
    for (int i = 0; i < N; i++) wrong += f[i] != (float)(comm->size * (comm->size + 1) * (i % 5) + 2 * comm->size * step);
    CHECK(wrong == 0);
  }
  CHECK(fd_comm_take_wait_s(comm) >= 0);
  fd_graph_destroy(&g);
  backend->free(ctx, arena);
  fd_ctx_destroy(&ctx);
}

#ifdef FD_EMULATE
/* One GPU for all: they share it only if they are told to, through MPI, and nothing is recorded. Every rank gets the same message. */
static void test_one_gpu(fd_comm *comm) {
  fd_ctx *ctx = NULL;
  const struct fd_backend *backend = NULL;
  setenv("FD_EMU_ONE_GPU", "1", 1);
  CHECK(fd_backend_find(BACKEND, &backend) == FD_OK);
  const fd_status st = fd_ctx_create_with(backend, 1, comm, 0, &ctx);
  CHECK(comm->size == 1 ? st == FD_OK : st == FD_ERR_UNSUPPORTED && strstr(fd_status_message(), "ranks 0 and 1 use the same GPU") != NULL);
  fd_ctx_destroy(&ctx);
  test_graph(comm, FD_F32);
  test_graph(comm, FD_BF16);
  unsetenv("FD_EMU_ONE_GPU");
}

/* Another rank's failure ends a wait that would never end, with this rank and its host. */
static void test_failure(fd_comm *comm) {
  fd_ctx *ctx = NULL;
  float x = 1, *device = NULL;
  if (comm->size == 1) return;
  CHECK(fd_ctx_create_with(&fd_cuda_backend, 1, comm, 0, &ctx) == FD_OK);
  CHECK(ctx->backend->alloc(ctx, sizeof x, (void **)&device) == FD_OK && ctx->backend->to_device(ctx, device, &x, sizeof x) == FD_OK);
  fd_tensor t = {.data = device, .shape = {1}, .ndim = 1, .dtype = FD_F32};
  fd_emu_nccl_fail(ncclRemoteError);
  CHECK(fd_op_run(ctx, FD_OP_reduce_start, &(struct fd_reduce_start_args){.x = &t}) == FD_ERR_COMM);
  fd_emu_nccl_fail(ncclSuccess);
  char who[128];
  snprintf(who, sizeof who, "rank %d on %s", comm->rank, comm->host);
  CHECK(strstr(fd_status_message(), who) && strstr(fd_status_message(), "remote process exited"));
  ctx->backend->free(ctx, device);
  fd_ctx_destroy(&ctx);
}
#endif

int main(void) {
  fd_comm *world = NULL;
  if (fd_comm_create(&world) != FD_OK) return fprintf(stderr, "%s\n", fd_status_message()), 1;
  for (int size = 1; size <= world->size && size <= 3; size++) {
    fd_comm *comm = NULL;
    CHECK(fd_comm_split(world, world->rank < size ? 0 : -1, &comm) == FD_OK);
    if (comm) {
      test_graph(comm, FD_F32);
      test_graph(comm, FD_BF16);
      test_two_runs(comm);
#ifdef FD_EMULATE
      test_one_gpu(comm);
      test_failure(comm);
#endif
    }
    fd_comm_destroy(&comm);
  }
  int64_t any = failed;
  CHECK(fd_comm_allreduce_i64(world, &any, 1, FD_COMM_MAX) == FD_OK);
  fd_comm_destroy(&world);
  return failed || any;
}
