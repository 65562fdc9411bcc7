// SPDX-License-Identifier: Apache-2.0
// The CPU backend: its tables, its memory, and the checks that all ops share.
#include "cpu/cpu.h"
#include "cpu/conv2d.h"

#include <stdlib.h>
#include <sys/mman.h>
#include <time.h>

/* ---- tables ------------------------------------------------------------------------------------------------------ */

/* Every op of ops.def: one without a kernel or a prepare function fails to link. */
#define X(name, slots) .name = cpu_##name,
static const struct fd_ops kernels = {
#include "op/ops.def"
};
#undef X

typedef fd_status prepare_fn(fd_ctx *ctx, const void *args, size_t *scratch_bytes);
#define X(name, slots) (prepare_fn *)(void (*)(void))cpu_##name##_prepare,
static prepare_fn *const prepares[FD_OP_COUNT] = {
#include "op/ops.def"
};
#undef X

int64_t cpu_grain = 16384;

/* ---- counts ------------------------------------------------------------------------------------------------------ */

fd_status cpu_rows_used(enum fd_op op, const fd_tensor *count, int64_t rows, int64_t *used) {
  *used = rows;
  if (!count) return FD_OK;
  int32_t n = *(const int32_t *)count->data;
  if (n < 0 || n > rows) return fd_op_wrong_arg(op, "count = %d, expected 0..%lld", (int)n, (long long)rows);
  *used = n;
  return FD_OK;
}

/* ---- the backend ------------------------------------------------------------------------------------------------- */

static fd_status cpu_open(fd_ctx *ctx) {
  ctx->state = calloc(1, sizeof(struct cpu_state));
  return ctx->state ? FD_OK : FD_FAIL(FD_ERR_NOMEM, "no memory for the CPU backend");
}

static void cpu_close(fd_ctx *ctx) {
  struct cpu_state *s = ctx->state;
  if (s && s->dnnl_close) s->dnnl_close(s->dnnl);
  free(s);
  ctx->state = NULL;
}

enum { HUGE_PAGE = 2 << 20 };

static fd_status cpu_alloc(fd_ctx *ctx, size_t bytes, void **out) {
  void *p = NULL;
  size_t size = bytes ? bytes : 1;
  bool large = size >= 2 * (size_t)HUGE_PAGE;
  if (posix_memalign(&p, large ? HUGE_PAGE : 64, size) != 0)
    return FD_FAIL(FD_ERR_NOMEM, "no memory: %zu bytes wanted", bytes);
  if (large) madvise(p, size, MADV_HUGEPAGE); /* advice: a system without huge pages runs as well, slower */
  /* zeroed by the threads that will use it: pages come from the memory next to them */
  #pragma omp parallel num_threads(large ? ctx->n_threads : 1)
  {
    int64_t lo, hi;
    cpu_share((int64_t)size, HUGE_PAGE, &lo, &hi);
    memset((char *)p + lo, 0, (size_t)(hi - lo));
  }
  *out = p;
  return FD_OK;
}

static void cpu_free(fd_ctx *ctx, void *p) {
  (void)ctx;
  free(p);
}

static fd_status cpu_copy(fd_ctx *ctx, void *dst, const void *src, size_t bytes) {
  (void)ctx;
  if (bytes) memcpy(dst, src, bytes);
  return FD_OK;
}

static fd_status cpu_sync(fd_ctx *ctx) {
  (void)ctx;
  return FD_OK; /* ops are done when they return */
}

/* ---- points in time ---------------------------------------------------------------------------------------------- */

static fd_status cpu_mark(fd_ctx *ctx, void **point) {
  (void)ctx;
  if (!*point) *point = malloc(sizeof(struct timespec));
  if (!*point) return FD_FAIL(FD_ERR_NOMEM, "no memory for a point in time");
  clock_gettime(CLOCK_MONOTONIC, *point);
  return FD_OK;
}

static fd_status cpu_seconds(fd_ctx *ctx, const void *from, const void *to, double *seconds) {
  (void)ctx;
  const struct timespec *a = from, *b = to;
  *seconds = (double)(b->tv_sec - a->tv_sec) + 1e-9 * (double)(b->tv_nsec - a->tv_nsec);
  return FD_OK;
}

static void cpu_mark_free(fd_ctx *ctx, void **point) {
  (void)ctx;
  free(*point);
  *point = NULL;
}

static fd_status cpu_prepare(fd_ctx *ctx, enum fd_op op, const void *args, size_t *scratch_bytes) {
  fd_status st = fd_op_check(op, args);
  *scratch_bytes = 0;
  return st == FD_OK ? prepares[op](ctx, args, scratch_bytes) : st;
}

fd_status cpu_check(const fd_ctx *ctx, enum fd_op op, const void *args) {
  fd_ctx plain = {.backend = &fd_cpu_backend, .n_threads = 1, .comm = ctx->comm};
  size_t ignored;
  return cpu_prepare(&plain, op, args, &ignored);
}

const struct fd_backend fd_cpu_backend = {
    .name = "cpu",
    .ops = &kernels,
    .open = cpu_open,
    .close = cpu_close,
    .alloc = cpu_alloc,
    .free = cpu_free,
    .to_device = cpu_copy,
    .from_device = cpu_copy,
    .sync = cpu_sync,
    .prepare = cpu_prepare,
    .kept_bytes = cpu_conv2d_kept_bytes,
    .mark = cpu_mark,
    .seconds = cpu_seconds,
    .mark_free = cpu_mark_free,
};
