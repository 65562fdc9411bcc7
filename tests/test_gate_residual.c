// SPDX-License-Identifier: Apache-2.0
// Residual with a gate: forward and backward against the formula in double.
#include "optest.h"

static void one(struct ot *t, int64_t R, int64_t D, int64_t rpm, bool gated, int64_t count, fd_dtype dt, fd_dtype mt, bool acc) {
  ot_reset(t);
  ot_what(t, "R %d D %d rows_per_mod %d gated %d count %d %s %s acc %d", (int)R, (int)D, (int)rpm, gated, (int)count,
          fd_dtype_name(dt), fd_dtype_name(mt), acc);
  const int64_t S = D % 8 ? D + 5 : D + 24, col = D % 8 ? 2 : 8, used = count < 0 ? R : count;
  fd_tensor *x = OT_RAND(t, dt, R, D), *a = OT_RAND(t, dt, R, D), *mod = gated ? OT_RAND(t, mt, R / rpm, S) : NULL, *y = OT_NEW(t, dt, R, D),
            *n = count < 0 ? NULL : ot_count(t, count), *dy = OT_RAND(t, dt, R, D), *da = acc ? OT_RAND(t, dt, R, D) : OT_NEW(t, dt, R, D),
            *dmod = gated ? OT_RAND(t, mt, R / rpm, S) : NULL;
  double *ref = calloc((size_t)(R * D + R * S + 1), sizeof *ref), *da0 = ot_doubles(da), *dmod0 = ot_doubles(dmod);
  OT_RUN(t, gate_residual_fwd, .x = x, .a = a, .mod = mod, .count = n, .y = y, .rows_per_mod = rpm, .gate_col = col);
  for (int64_t r = 0; r < used; r++)
    for (int64_t i = 0; i < D; i++) ref[r * D + i] = ot_get(x, r * D + i) + (gated ? ot_get(mod, r / rpm * S + col + i) : 1) * ot_get(a, r * D + i);
  y->shape[0] = used;
  OT_COMPARE_SIZE(t, y, ref, 1, 1);
  y->shape[0] = R;
  for (int64_t i = used * D; i < R * D; i++) OT_CHECK(t, isnan(ot_get(y, i)));
  OT_RUN(t, gate_residual_bwd, .dy = dy, .a = a, .mod = mod, .count = n, .da = da, .dmod = dmod, .acc = (acc ? 16 : 0) | (gated ? 32 : 0),
         .rows_per_mod = rpm, .gate_col = col);
  for (int64_t r = 0; r < used; r++)
    for (int64_t i = 0; i < D; i++)
      ref[r * D + i] = (gated ? ot_get(mod, r / rpm * S + col + i) : 1) * ot_get(dy, r * D + i) + (acc ? da0[r * D + i] : 0);
  da->shape[0] = used;
  OT_COMPARE_SIZE(t, da, ref, 1, 1);
  da->shape[0] = R;
  if (gated) {
    for (int64_t i = 0; i < R / rpm * S; i++) ref[i] = dmod0[i];
    for (int64_t r = 0; r < used; r++)
      for (int64_t i = 0; i < D; i++) ref[r / rpm * S + col + i] += ot_get(dy, r * D + i) * ot_get(a, r * D + i);
    OT_COMPARE_SIZE(t, dmod, ref, rpm, 1);
  }
  if (used == R) { /* y in place of x */
    double *want = ot_doubles(y);
    OT_RUN(t, gate_residual_fwd, .x = x, .a = a, .mod = mod, .y = x, .rows_per_mod = rpm, .gate_col = col);
    for (int64_t i = 0; i < R * D; i++) OT_CHECK(t, ot_get(x, i) == want[i]);
    free(want);
  }
  free(ref), free(da0), free(dmod0);
}

/* a in bf16 beside an f32 x: as if a had been converted before. */
static void rounded(struct ot *t, int64_t R, int64_t D, int64_t rpm, int64_t count) {
  ot_reset(t);
  ot_what(t, "R %d D %d rows_per_mod %d count %d, a rounded", (int)R, (int)D, (int)rpm, (int)count);
  fd_tensor *x = OT_RAND(t, FD_F32, R, D), *a = OT_RAND(t, FD_BF16, R, D), *b = OT_NEW(t, FD_F32, R, D), *mod = rpm ? OT_RAND(t, FD_F32, R / rpm, D) : NULL,
            *n = ot_count(t, count), *y = OT_NEW(t, FD_F32, R, D), *z = OT_NEW(t, FD_F32, R, D);
  for (int64_t i = 0; i < R * D; i++) ot_set(b, i, ot_get(a, i));
  OT_RUN(t, gate_residual_fwd, .x = x, .a = b, .mod = mod, .count = n, .y = y, .rows_per_mod = rpm);
  OT_RUN(t, gate_residual_fwd, .x = x, .a = a, .mod = mod, .count = n, .y = z, .rows_per_mod = rpm);
  for (int64_t i = 0; i < R * D; i++) OT_CHECK(t, i < count * D ? ot_get(z, i) == ot_get(y, i) : isnan(ot_get(z, i)));
}

static void finite_differences(struct ot *t) {
  ot_reset(t);
  ot_what(t, "finite differences");
  fd_tensor *x = OT_RAND(t, FD_F32, 6, 19), *a = OT_RAND(t, FD_F32, 6, 19), *mod = OT_RAND(t, FD_F32, 2, 38), *y = OT_NEW(t, FD_F32, 6, 19),
            *dy = OT_RAND(t, FD_F32, 6, 19), *da = OT_NEW(t, FD_F32, 6, 19), *dmod = ot_fill(OT_NEW(t, FD_F32, 2, 38), 0);
  struct fd_gate_residual_fwd_args fwd = {.x = x, .a = a, .mod = mod, .y = y, .rows_per_mod = 3, .gate_col = 19};
  OT_RUN(t, gate_residual_bwd, .dy = dy, .a = a, .mod = mod, .da = da, .dmod = dmod, .acc = 32, .rows_per_mod = 3, .gate_col = 19);
  ot_finite_difference(t, FD_OP_gate_residual_fwd, &fwd, 1, OT_LIST(y), OT_LIST(dy), 3, OT_LIST(x, a, mod), OT_LIST(dy, da, dmod), __LINE__);
}

static void misuse(struct ot *t) {
  ot_reset(t);
  ot_what(t, "misuse");
  fd_tensor *x = OT_RAND(t, FD_F32, 6, 4), *mod = OT_RAND(t, FD_F32, 3, 8), *s = OT_RAND(t, FD_F32, 6, 3), *b = OT_NEW(t, FD_BF16, 6, 4);
  OT_MISUSE(t, "a is missing", gate_residual_fwd, .x = x, .y = x);
  OT_MISUSE(t, "a is f32 [6, 3]", gate_residual_fwd, .x = x, .a = s, .y = x);
  OT_MISUSE(t, "y is bf16", gate_residual_fwd, .x = x, .a = x, .y = b);
  OT_MISUSE(t, "a is f32", gate_residual_fwd, .x = b, .a = x, .y = b);
  OT_MISUSE(t, "mod is f32 [3, 8]", gate_residual_fwd, .x = x, .a = x, .y = x, .mod = mod, .rows_per_mod = 3);
  OT_MISUSE(t, "rows_per_mod = 0", gate_residual_fwd, .x = x, .a = x, .y = x, .mod = mod);
  OT_MISUSE(t, "gate_col = 5", gate_residual_fwd, .x = x, .a = x, .y = x, .mod = mod, .rows_per_mod = 2, .gate_col = 5);
  OT_MISUSE(t, "da is f32 [6, 3]", gate_residual_bwd, .dy = x, .a = x, .da = s);
  OT_MISUSE(t, "dmod is f32 [3, 8]", gate_residual_bwd, .dy = x, .a = x, .da = x, .dmod = mod);
  OT_MISUSE(t, "gate_col = -1", gate_residual_bwd, .dy = x, .a = x, .da = x, .mod = mod, .rows_per_mod = 2, .gate_col = -1);
}

static void body(struct ot *t) {
  const int64_t D[] = {1, 7, 32, 67};
  for (int dt = FD_F32; dt <= FD_BF16; dt++)
    for (int mt = FD_F32; mt <= FD_BF16; mt++)
      for (int d = 0; d < 4; d++)
        for (int gated = 0; gated < 2; gated++) {
          one(t, 6, D[d], 3, gated, -1, dt, mt, d & 1);
          one(t, 6, D[d], 2, gated, 3, dt, mt, !(d & 1));
        }
  one(t, 0, 5, 1, true, -1, FD_F32, FD_F32, false);
  one(t, 4, 5, 2, true, 0, FD_F32, FD_F32, true);
  one(t, 140, 9, 70, true, 137, FD_F32, FD_F32, true);
  for (int dt = FD_F32; dt <= FD_BF16; dt++) { /* a sample's sum in several parts, several blocks of columns */
    one(t, 260, 16, 130, true, 257, dt, FD_F32, true);
    one(t, 140, 520, 70, true, -1, dt, FD_BF16, false);
  }
  for (int gated = 0; gated < 2; gated++) {
    rounded(t, 6, 7, gated ? 3 : 0, 5);
    rounded(t, 6, 40, gated ? 2 : 0, 6);
  }
  finite_differences(t);
  misuse(t);
}

int main(void) { return ot_main_same_bits(body); }
