// SPDX-License-Identifier: Apache-2.0
// Ops of few lines: add, cast, fill, embed.
#include "graph/graph.h"
#include "optest.h"

static void add(struct ot *t, int64_t R, int64_t D, int64_t ny, int64_t count, fd_dtype dt, fd_dtype yt) {
  ot_reset(t);
  ot_what(t, "add R %d D %d y %d count %d %s %s", (int)R, (int)D, (int)ny, (int)count, fd_dtype_name(dt), fd_dtype_name(yt));
  const int64_t used = count < 0 ? R : count;
  fd_tensor *x = OT_RAND(t, dt, R, D), *y = OT_RAND(t, yt, ny), *z = OT_NEW(t, dt, R, D), *n = count < 0 ? NULL : ot_count(t, count);
  double *ref = calloc((size_t)(R * D + 1), sizeof *ref);
  OT_RUN(t, add_fwd, .x = x, .y = y, .count = n, .z = z);
  for (int64_t i = 0; i < used * D; i++) ref[i] = ot_get(x, i) + ot_get(y, i % ny);
  z->shape[0] = used;
  OT_COMPARE(t, z, ref, 1);
  z->shape[0] = R;
  for (int64_t i = used * D; i < R * D; i++) OT_CHECK(t, isnan(ot_get(z, i)));
  OT_RUN(t, add_fwd, .x = x, .y = y, .count = n, .z = x);
  for (int64_t i = 0; i < used * D; i++) OT_CHECK(t, ot_get(x, i) == ot_get(z, i));
  free(ref);
}

static void cast(struct ot *t, int64_t n, int64_t repeat, fd_dtype from, fd_dtype to, bool acc) {
  ot_reset(t);
  ot_what(t, "cast %d x %d %s to %s acc %d", (int)n, (int)repeat, fd_dtype_name(from), fd_dtype_name(to), acc);
  fd_tensor *x = OT_RAND(t, from, n), *y = acc ? OT_RAND(t, to, repeat, n) : OT_NEW(t, to, repeat, n);
  double *y0 = ot_doubles(y), *ref = calloc((size_t)(n * repeat + 1), sizeof *ref);
  OT_RUN(t, cast, .x = x, .y = y, .acc = acc ? 2 : 0);
  for (int64_t i = 0; i < n * repeat; i++) {
    ref[i] = ot_get(x, i % n) + (acc ? y0[i] : 0);
    if (!acc) OT_CHECK(t, to == FD_F32 ? ot_get(y, i) == ot_get(x, i % n) : ((fd_bf16 *)y->data)[i] == fd_f32_to_bf16((float)ref[i]));
  }
  OT_COMPARE(t, y, ref, 1);
  free(y0), free(ref);
}

static void embed(struct ot *t, int64_t R, int64_t V, int64_t D, int64_t count, fd_dtype tt, fd_dtype yt, bool acc) {
  ot_reset(t);
  ot_what(t, "embed R %d V %d D %d count %d %s %s acc %d", (int)R, (int)V, (int)D, (int)count, fd_dtype_name(tt), fd_dtype_name(yt), acc);
  const int64_t used = count < 0 ? R : count, pad = 1;
  fd_tensor *ids = ot_integers(t, OT_NEW(t, FD_I32, R), 0, V), *table = OT_RAND(t, tt, V, D), *y = OT_NEW(t, yt, R, D),
            *n = count < 0 ? NULL : ot_count(t, count), *dy = OT_RAND(t, yt, R, D), *d = acc ? OT_RAND(t, FD_F32, V, D) : OT_NEW(t, FD_F32, V, D);
  double *ref = calloc((size_t)(R * D + V * D + 1), sizeof *ref);
  OT_RUN(t, embed_fwd, .ids = ids, .table = table, .count = n, .y = y, .scale = 1.7f);
  for (int64_t r = 0; r < used; r++)
    for (int64_t i = 0; i < D; i++) ref[r * D + i] = (double)1.7f * ot_get(table, (int64_t)ot_get(ids, r) * D + i);
  y->shape[0] = used;
  OT_COMPARE(t, y, ref, 1);
  y->shape[0] = R;
  for (int64_t i = used * D; i < R * D; i++) OT_CHECK(t, isnan(ot_get(y, i)));
  for (int64_t i = 0; i < V * D; i++) ref[i] = acc ? ot_get(d, i) : 0;
  for (int64_t r = 0; r < used; r++)
    for (int64_t i = 0; i < D && ot_get(ids, r) != pad; i++) ref[(int64_t)ot_get(ids, r) * D + i] += (double)1.7f * ot_get(dy, r * D + i);
  OT_RUN(t, embed_bwd, .dy = dy, .ids = ids, .count = n, .dtable = d, .scale = 1.7f, .padding_idx = pad, .acc = acc ? 8 : 0);
  OT_COMPARE_SIZE(t, d, ref, R, 1);
  if (used) {
    ot_set(ids, used - 1, (double)V);
    struct fd_embed_fwd_args bad = {.ids = ids, .table = table, .count = n, .y = y, .scale = 1};
    OT_CHECK(t, OT_ON_DEVICE || (fd_op_run(t->ctx, FD_OP_embed_fwd, &bad) == FD_ERR_ARG && strstr(fd_status_message(), "embed_fwd: ids")));
  }
  free(ref);
}

static void fill(struct ot *t) {
  const fd_dtype types[] = {FD_F32, FD_BF16, FD_F64};
  for (int k = 0; k < 3; k++)
    for (int64_t n = 0; n < 200; n += 33) {
      ot_reset(t);
      ot_what(t, "fill %s %d", fd_dtype_name(types[k]), (int)n);
      fd_tensor *y = OT_NEW(t, types[k], n);
      OT_RUN(t, fill, .y = y, .value = -1.5f);
      for (int64_t i = 0; i < n; i++) OT_CHECK(t, ot_get(y, i) == -1.5);
    }
}

static void misuse(struct ot *t) {
  ot_reset(t);
  ot_what(t, "misuse");
  fd_tensor *x = OT_RAND(t, FD_F32, 4, 6), *y5 = OT_RAND(t, FD_F32, 5), *y6 = OT_RAND(t, FD_F32, 6), *i4 = OT_NEW(t, FD_I32, 4),
            *table = OT_RAND(t, FD_F32, 9, 6), *y = OT_NEW(t, FD_F32, 4, 5);
  OT_MISUSE(t, "y is f32 [5]", add_fwd, .x = x, .y = y5, .z = x);
  OT_MISUSE(t, "z is f32 [6]", add_fwd, .x = x, .y = y6, .z = y6);
  OT_MISUSE(t, "y is missing", add_fwd, .x = x, .z = x);
  OT_MISUSE(t, "y is f32 [5]", cast, .x = y6, .y = y5);
  OT_MISUSE(t, "x is i32", cast, .x = i4, .y = x);
  OT_MISUSE(t, "y is missing", fill, .value = 1);
  OT_MISUSE(t, "y is i32", fill, .y = i4);
  OT_MISUSE(t, "ids is f32", embed_fwd, .ids = y6, .table = table, .y = x);
  OT_MISUSE(t, "table is f32 [6]", embed_fwd, .ids = i4, .table = y6, .y = x);
  OT_MISUSE(t, "y is f32 [4, 5]", embed_fwd, .ids = i4, .table = table, .y = y);
  OT_MISUSE(t, "dy is f32 [4, 5]", embed_bwd, .dy = y, .ids = i4, .dtable = table);
}

/* Bytes that ops move at least (graph/graph.h), where that is not the sum of their slots. */
static void cost(struct ot *t) {
  ot_reset(t);
  ot_what(t, "cost");
  fd_tensor *p = OT_NEW(t, FD_F32, 10), *c = OT_NEW(t, FD_BF16, 10), *ids = OT_NEW(t, FD_I32, 3), *table = OT_NEW(t, FD_F32, 50, 4),
            *dy = OT_NEW(t, FD_F32, 3, 4);
  double bytes = 0;
  fd_op_cost(FD_OP_adamw, &(struct fd_adamw_args){.p = p, .g = p, .m = p, .v = p, .ema = p, .compute = c}, NULL, &bytes);
  OT_CHECK(t, bytes == 42 * 10);
  struct fd_embed_bwd_args e = {.dy = dy, .ids = ids, .dtable = table, .acc = 1u << 3};
  fd_op_cost(FD_OP_embed_bwd, &e, NULL, &bytes);
  OT_CHECK(t, bytes == 3 * 4 * 4 + 3 * 4 + 2 * 3 * 4 * 4);
  e.acc = 0;
  fd_op_cost(FD_OP_embed_bwd, &e, NULL, &bytes);
  OT_CHECK(t, bytes == 3 * 4 * 4 + 3 * 4 + 2 * 3 * 4 * 4 + 50 * 4 * 4);
  fd_op_cost(FD_OP_gate_residual_bwd, &(struct fd_gate_residual_bwd_args){.dy = dy, .a = dy, .da = dy}, NULL, &bytes);
  OT_CHECK(t, bytes == 2 * 3 * 4 * 4);
}

static void body(struct ot *t) {
  for (int a = FD_F32; a <= FD_BF16; a++)
    for (int b = FD_F32; b <= FD_BF16; b++) {
      add(t, 6, 35, 35, -1, a, b);
      add(t, 6, 35, 105, 4, a, b);
      add(t, 6, 35, 210, 0, a, b);
      add(t, 3, 7, 1, -1, a, b);
      add(t, 0, 7, 7, -1, a, b);
      add(t, 6, 40, 80, 5, a, b); /* wide access */
      for (int acc = 0; acc < 2; acc++) {
        cast(t, 1, 1, a, b, acc);
        cast(t, 131, 3, a, b, acc);
        cast(t, 0, 1, a, b, acc);
        cast(t, 136, 3, a, b, acc);
        embed(t, 9, 5, 33, -1, a, b, acc);
        embed(t, 9, 2, 1, 4, a, b, acc);
        embed(t, 3, 7, 16, 0, a, b, acc);
        embed(t, 3, 7, 1032, -1, a, b, acc);
      }
    }
  cast(t, 30000, 2, FD_F32, FD_BF16, false);
  fill(t);
  cost(t);
  misuse(t);
}

int main(void) { return ot_main_same_bits(body); }
