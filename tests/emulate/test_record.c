// SPDX-License-Identifier: Apache-2.0
// Recording runs of ops: the first is issued, the second recorded, later ones replayed; a recording serves the counts that it saw and no
// others, holds for the memory that it saw, and what cannot be recorded is issued as before.
#include <stdio.h>
#include <string.h>

#include "cuda/cuda.h"
#include "graph/build.h"
#include "graph/internal.h"
#include "tests/emulate/emulate.h"

static int failed;
#define CHECK(c)                                                                                            \
  do {                                                                                                      \
    if (!(c)) failed = 1, fprintf(stderr, "%s:%d: %s (%s)\n", __FILE__, __LINE__, #c, fd_status_message()); \
  } while (0)
#define OK(call) CHECK((call) == FD_OK)

enum { T = 32, D = 8 };

struct world {
  fd_ctx *ctx;
  fd_graph *g;
  fd_var x, w, count, y;
  void *arena;
  float *weights; /* device */
  size_t bytes;
};

/* y = x + x w of the rows in use: a product whose rows are an argument, and a kernel that reads the count. */
static void open_world(struct world *u, unsigned flags) {
  const int64_t x[] = {T, D}, w[] = {D, D}, one = 1;
  memset(u, 0, sizeof *u);
  OK(fd_ctx_create_with(&fd_cuda_backend, 1, NULL, flags, &u->ctx));
  OK(fd_graph_create(u->ctx, "record", &u->g));
  u->x = fd_graph_input(u->g, "x", FD_F32, 2, x);
  u->count = fd_graph_input(u->g, "count", FD_I32, 1, &one);
  u->w = fd_graph_external(u->g, "w", FD_F32, 2, w, 0);
  u->y = fd_add(u->g, fd_linear(u->g, u->x, u->w, 0, u->count), u->x, u->count);
  fd_graph_keep(u->g, u->y);
  OK(fd_graph_plan(u->g, &u->bytes));
  OK(u->ctx->backend->alloc(u->ctx, u->bytes, &u->arena));
  OK(u->ctx->backend->alloc(u->ctx, D * D * sizeof(float), (void **)&u->weights));
  OK(fd_graph_attach(u->g, u->arena, u->bytes));
  fd_graph_bind(u->g, u->w, u->weights);
}

static void close_world(struct world *u) {
  fd_graph_destroy(&u->g);
  u->ctx->backend->free(u->ctx, u->arena);
  u->ctx->backend->free(u->ctx, u->weights);
  fd_ctx_destroy(&u->ctx);
}

/* Every step has other values. */
static void step(struct world *u, int number, int32_t count) {
  float x[T * D], w[D * D], y[T * D];
  for (int i = 0; i < T * D; i++) x[i] = (float)((i * 7 + number) % 11 - 5);
  for (int i = 0; i < D * D; i++) w[i] = (float)((i * 5 + 3 * number) % 7 - 3);
  OK(fd_graph_set(u->g, u->x, x, sizeof x));
  OK(fd_graph_set(u->g, u->count, &count, sizeof count));
  OK(u->ctx->backend->to_device(u->ctx, u->weights, w, sizeof w));
  OK(fd_graph_run(u->g));
  OK(fd_graph_read(u->g, u->y, y, sizeof y));
  int wrong = 0;
  for (int r = 0; r < count; r++)
    for (int o = 0; o < D; o++) {
      float sum = x[r * D + o];
      for (int k = 0; k < D; k++) sum += x[r * D + k] * w[o * D + k];
      wrong += y[r * D + o] != sum;
    }
  CHECK(wrong == 0);
}

static void test_counts(void) {
  static const int32_t counts[] = {32, 32, 32, 8, 32, 16, 8, 8, 4, 16, 32};
  struct world u;
  open_world(&u, 0);
  const long before = fd_emu_graph_launches();
  for (int i = 0; i < (int)(sizeof counts / sizeof *counts); i++) step(&u, i, counts[i]);
  CHECK(u.g->n_recordings == 4 && fd_emu_graph_launches() - before == 10); /* of 32, 8, 16 and 4 rows */
  /* other memory: recorded anew */
  void *other = NULL;
  OK(u.ctx->backend->alloc(u.ctx, u.bytes, &other));
  OK(fd_graph_attach(u.g, other, u.bytes));
  CHECK(u.g->n_recordings == 0);
  for (int i = 0; i < 3; i++) step(&u, i, 8);
  CHECK(u.g->n_recordings == 1);
  float *weights = u.weights;
  OK(u.ctx->backend->alloc(u.ctx, D * D * sizeof(float), (void **)&u.weights));
  fd_graph_bind(u.g, u.w, u.weights);
  for (int i = 0; i < 3; i++) step(&u, i, 8);
  fd_graph_bind(u.g, u.w, u.weights); /* the same again: nothing to forget */
  CHECK(u.g->n_recordings == 1);
  u.ctx->backend->free(u.ctx, weights);
  u.ctx->backend->free(u.ctx, u.arena);
  u.arena = other;
  close_world(&u);
}

static void count_op(void *user, fd_ctx *ctx, enum fd_op op, const void *args, bool done) {
  (void)ctx, (void)op, (void)args;
  *(int *)user += done;
}

static void test_not_recorded(void) {
  struct world u;
  int ops = 0;
  long before = fd_emu_graph_launches();
  open_world(&u, FD_CTX_NO_RECORD);
  for (int i = 0; i < 4; i++) step(&u, i, 16);
  CHECK(fd_emu_graph_launches() == before);
  close_world(&u);
  open_world(&u, 0);
  for (int i = 0; i < 3; i++) step(&u, i, 16);
  before = fd_emu_graph_launches();
  fd_op_set_hook(count_op, &ops); /* every op is seen, so none is hidden in a recording */
  step(&u, 3, 16);
  fd_op_set_hook(NULL, NULL);
  CHECK(ops >= 2 && fd_emu_graph_launches() == before);
  step(&u, 4, 16);
  CHECK(fd_emu_graph_launches() == before + 1);
  close_world(&u);
}

/* An op that waits for the device cannot be recorded: said once, and the numbers stay right. */
static fd_status waiting_add(fd_ctx *ctx, const struct fd_add_fwd_args *a) {
  const fd_status st = ctx->backend->sync(ctx);
  return st == FD_OK ? cuda_add_fwd(ctx, a) : st;
}

static void test_refused(void) {
  struct world u;
  struct fd_ops ops = *fd_cuda_backend.ops;
  struct fd_backend backend = fd_cuda_backend;
  const long before = fd_emu_graph_launches();
  ops.add_fwd = waiting_add;
  backend.ops = &ops;
  open_world(&u, 0);
  u.ctx->backend = &backend;
  for (int i = 0; i < 4; i++) step(&u, i, 16);
  CHECK(!u.ctx->record && fd_emu_graph_launches() == before);
  close_world(&u);
}

static void test_tile(void) {
  struct world u;
  int64_t capacity = 32 * 128;
  open_world(&u, 0);
  CHECK(fd_count_tile(u.ctx, &capacity, 16) == 512 && capacity == 4096);
  capacity = 100;
  CHECK(fd_count_tile(u.ctx, &capacity, 16) == 16 && capacity == 128);
  close_world(&u);
}

int main(void) {
  test_counts();
  test_not_recorded();
  test_refused();
  test_tile();
  return failed;
}
