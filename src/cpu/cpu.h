// SPDX-License-Identifier: Apache-2.0
// The CPU backend: its table, what kernels share, and one declaration per op (contracts: op/ops.h).
//
// Each op has two functions in its file: cpu_<op>, the kernel, and cpu_<op>_prepare, which checks shapes and scalars and
// says how much scratch the kernel needs. Missing slots and element types are checked before, in cpu.c, for all ops.
// Invariant of every sum over rows: the rows are cut into pieces by their number alone, each piece has its own slot in
// scratch, and slots are added in order. So results do not depend on the number of threads.
#ifndef FD_CPU_CPU_H
#define FD_CPU_CPU_H

#include <omp.h>

#include "op/ctx.h"

extern const struct fd_backend fd_cpu_backend;

#define X(name, slots)                                                                  \
  fd_status cpu_##name(fd_ctx *ctx, const struct fd_##name##_args *a);                  \
  fd_status cpu_##name##_prepare(fd_ctx *ctx, const struct fd_##name##_args *a, size_t *scratch_bytes);
#include "op/ops.def"
#undef X

/** The checks of an op's prepare alone, for another backend's context. Not for ops on oneDNN (matmul, conv2d_*). */
fd_status cpu_check(const fd_ctx *ctx, enum fd_op op, const void *args);

/** ctx->state of this backend. */
struct cpu_state {
  struct cpu_dnnl *dnnl;                /* oneDNN's engine, stream and primitives; made when the first is prepared */
  void (*dnnl_close)(struct cpu_dnnl *); /* set with it */
};

/* ---- checks of prepare ------------------------------------------------------------------------------------------- */

/** In a prepare function whose args are `a`: return FD_ERR_ARG unless `cond`; the rest says what the slot should be. */
#define CPU_CHECK(op, slot, cond, ...)                                                  \
  do {                                                                                  \
    if (!(cond)) return fd_op_wrong_slot(FD_OP_##op, #slot, a->slot, __VA_ARGS__);        \
  } while (0)
#define CPU_CHECK_ARG(op, cond, ...)                                                    \
  do {                                                                                  \
    if (!(cond)) return fd_op_wrong_arg(FD_OP_##op, __VA_ARGS__);                         \
  } while (0)

static inline bool cpu_same_shape(const fd_tensor *s, const fd_tensor *t) {
  if (s->ndim != t->ndim) return false;
  for (int i = 0; i < s->ndim; i++)
    if (s->shape[i] != t->shape[i]) return false;
  return true;
}

/* ---- work of kernels --------------------------------------------------------------------------------------------- */

/** Rows in use: all, or what count holds. FD_ERR_ARG if that is outside 0..rows. */
fd_status cpu_rows_used(enum fd_op op, const fd_tensor *count, int64_t rows, int64_t *used);

/** Elements below which another thread does not pay. Tests set it to 1, so that small shapes run on several threads too. */
extern int64_t cpu_grain;

/** Threads for about `work` elements: no more than pay. */
static inline int cpu_threads(const fd_ctx *ctx, int64_t work) {
  int64_t most = 1 + work / cpu_grain;
  return most < ctx->n_threads ? (int)most : ctx->n_threads;
}

/** This thread's part [lo, hi) of n, in multiples of `step` (a cache line of elements, a row, ...). In a parallel region. */
static inline void cpu_share(int64_t n, int64_t step, int64_t *lo, int64_t *hi) {
  int64_t pieces = (n + step - 1) / step, t = omp_get_thread_num(), nt = omp_get_num_threads();
  int64_t from = pieces * t / nt * step, to = pieces * (t + 1) / nt * step;
  *lo = from < n ? from : n;
  *hi = to < n ? to : n;
}

static inline size_t cpu_align(size_t bytes) { return (bytes + 63) & ~(size_t)63; }

/** Pieces for each of M groups of `rows` rows whose sums are wanted: enough for threads, few enough that slots cost little. */
static inline int64_t cpu_pieces(int64_t M, int64_t rows) {
  int64_t by_rows = (rows + 31) / 32, by_slots = M < 256 ? 256 / (M ? M : 1) : 1;
  int64_t n = by_rows < by_slots ? by_rows : by_slots;
  return n < 1 ? 1 : n;
}
/** Piece `i` of `n_pieces` of n rows: the fixed cut behind sums over rows. */
static inline int64_t cpu_cut(int64_t n, int64_t n_pieces, int64_t i) { return n * i / n_pieces; }

#endif
