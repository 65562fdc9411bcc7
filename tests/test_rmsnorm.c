// SPDX-License-Identifier: Apache-2.0
// RMSNorm with modulation: forward and backward against the formula in double, over shapes, types, counts and acc.
#include "optest.h"

struct ref {
  int64_t R, D, rpm, S, shift_col, scale_col, used;
  float eps;
  double *x, *w, *mod, *dy, *y, *rstd;
};

static double forward(void *user) {
  struct ref *f = user;
  double loss = 0;
  for (int64_t r = 0; r < f->used; r++) {
    double s = 0;
    for (int64_t i = 0; i < f->D; i++) s += f->x[r * f->D + i] * f->x[r * f->D + i];
    s = 1 / sqrt(s / (double)f->D + (double)f->eps);
    f->rstd[r] = s;
    for (int64_t i = 0; i < f->D; i++) {
      double y = f->x[r * f->D + i] * s * (1 + f->w[i]);
      if (f->mod) {
        const double *m = f->mod + r / f->rpm * f->S;
        if (f->scale_col >= 0) y *= 1 + m[f->scale_col + i];
        if (f->shift_col >= 0) y += m[f->shift_col + i];
      }
      f->y[r * f->D + i] = y;
      if (f->dy) loss += f->dy[r * f->D + i] * y;
    }
  }
  return loss;
}

/* kind: 0 no mod, 1 shift and scale, 2 scale alone, 3 shift alone */
static void one(struct ot *t, int64_t R, int64_t D, int64_t rpm, int kind, int64_t count, fd_dtype xt, fd_dtype wt, fd_dtype mt, bool acc) {
  ot_reset(t);
  ot_what(t, "R %d D %d rows_per_mod %d mod %d count %d %s %s %s acc %d", (int)R, (int)D, (int)rpm, kind, (int)count,
          fd_dtype_name(xt), fd_dtype_name(wt), fd_dtype_name(mt), acc);
  const int64_t gap = D % 8 ? 1 : 8; /* columns of mod that nobody reads; where D allows wide access they leave it possible */
  int64_t S = 2 * D + 3 * gap, shift_col = kind == 1 || kind == 3 ? D + 3 * gap : -1, scale_col = kind == 1 || kind == 2 ? gap : -1;
  int64_t used = count < 0 ? R : count;
  fd_tensor *x = OT_RAND(t, xt, R, D), *w = ot_normal(t, OT_NEW(t, wt, D), 0, 0.3), *mod = kind ? OT_RAND(t, mt, R / rpm, S) : NULL;
  fd_tensor *n = count < 0 ? NULL : ot_count(t, count), *y = OT_NEW(t, xt, R, D), *rstd = OT_NEW(t, FD_F32, R);
  struct fd_rmsnorm_fwd_args fwd = {.x = x, .w = w, .mod = mod, .count = n, .y = y, .rstd = rstd, .eps = 1e-3f,
                                    .rows_per_mod = rpm, .shift_col = shift_col, .scale_col = scale_col};
  ot_run(t, FD_OP_rmsnorm_fwd, &fwd);
  struct ref f = {R, D, rpm, S, shift_col, scale_col, used, 1e-3f, ot_doubles(x), ot_doubles(w), ot_doubles(mod), NULL,
                  ot_doubles(y), ot_doubles(rstd)};
  forward(&f);
  fd_tensor y_used = *y, r_used = *rstd;
  y_used.shape[0] = r_used.shape[0] = used;
  OT_COMPARE(t, &y_used, f.y, D);
  OT_COMPARE(t, &r_used, f.rstd, D);
  for (int64_t i = used * D; i < R * D; i++) OT_CHECK(t, isnan(ot_get(y, i))); /* rows beyond count: not written */

  fd_tensor *dy = OT_RAND(t, xt, R, D), *dx = OT_NEW(t, xt, R, D), *dw = OT_NEW(t, FD_F32, D), *dmod = mod ? OT_NEW(t, mt, R / rpm, S) : NULL;
  if (used < R)
    for (int64_t i = used * D; i < R * D; i++) ot_set(dy, i, NAN); /* nor read */
  if (acc) ot_normal(t, dx, 0, 1), ot_normal(t, dw, 0, 1);
  if (dmod) ot_normal(t, dmod, 0, 1);
  double *dx0 = ot_doubles(dx), *dw0 = ot_doubles(dw), *dmod0 = ot_doubles(dmod);
  ot_run(t, FD_OP_rmsnorm_bwd,
         &(struct fd_rmsnorm_bwd_args){.dy = dy, .x = x, .w = w, .rstd = rstd, .mod = mod, .count = n, .dx = dx, .dw = dw,
                                       .dmod = dmod, .acc = (acc ? 3u << 6 : 0) | (dmod ? 1u << 8 : 0), .eps = 1e-3f,
                                       .rows_per_mod = rpm, .shift_col = shift_col, .scale_col = scale_col});
  f.dy = ot_doubles(dy);
  double *g = calloc((size_t)(R * S + R * D + D + 1), sizeof *g);
  ot_numeric_gradient(forward, &f, f.x, used * D, g);
  if (acc) for (int64_t i = 0; i < used * D; i++) g[i] += dx0[i];
  fd_tensor dx_used = *dx;
  dx_used.shape[0] = used;
  OT_COMPARE_SIZE(t, &dx_used, g, D, 1);
  for (int64_t i = used * D; i < R * D; i++) OT_CHECK(t, acc ? ot_get(dx, i) == dx0[i] : isnan(ot_get(dx, i)));
  if (!acc) { /* dx alone */
    OT_RUN(t, rmsnorm_bwd, .dy = dy, .x = x, .w = w, .rstd = rstd, .mod = mod, .count = n, .dx = dx, .eps = 1e-3f, .rows_per_mod = rpm,
           .shift_col = shift_col, .scale_col = scale_col);
    OT_COMPARE_SIZE(t, &dx_used, g, D, 1);
  }
  ot_numeric_gradient(forward, &f, f.w, D, g);
  if (acc) for (int64_t i = 0; i < D; i++) g[i] += dw0[i];
  OT_COMPARE_SIZE(t, dw, g, R, 1);
  if (dmod) {
    ot_numeric_gradient(forward, &f, f.mod, R / rpm * S, g);
    for (int64_t i = 0; i < R / rpm * S; i++) g[i] += dmod0[i];
    OT_COMPARE_SIZE(t, dmod, g, rpm, 1);
    for (int64_t i = 0; i < R / rpm * S; i++) /* other columns: the same bits */
      if (!((scale_col >= 0 && i % S >= scale_col && i % S < scale_col + D) || (shift_col >= 0 && i % S >= shift_col && i % S < shift_col + D)))
        OT_CHECK(t, ot_get(dmod, i) == dmod0[i]);
  }
  free(f.x), free(f.w), free(f.mod), free(f.y), free(f.rstd), free(f.dy), free(dx0), free(dw0), free(dmod0), free(g);
}

/* y in bf16 of an f32 x: the f32 result, rounded. */
static void rounded(struct ot *t, int64_t R, int64_t D, int64_t rpm, int64_t count) {
  ot_reset(t);
  ot_what(t, "R %d D %d rows_per_mod %d count %d, rounded", (int)R, (int)D, (int)rpm, (int)count);
  fd_tensor *x = OT_RAND(t, FD_F32, R, D), *w = OT_RAND(t, FD_F32, D), *mod = rpm ? OT_RAND(t, FD_F32, R / rpm, 2 * D) : NULL, *n = ot_count(t, count),
            *y = OT_NEW(t, FD_F32, R, D), *z = OT_NEW(t, FD_BF16, R, D), *rstd = OT_NEW(t, FD_F32, R);
  struct fd_rmsnorm_fwd_args fwd = {.x = x, .w = w, .mod = mod, .count = n, .y = y, .rstd = rstd, .eps = 1e-6f, .rows_per_mod = rpm, .shift_col = 0,
                                    .scale_col = D};
  ot_run(t, FD_OP_rmsnorm_fwd, &fwd);
  fwd.y = z;
  ot_run(t, FD_OP_rmsnorm_fwd, &fwd);
  for (int64_t i = 0; i < R * D; i++)
    OT_CHECK(t, i < count * D ? ot_get(z, i) == fd_bf16_to_f32(fd_f32_to_bf16((float)ot_get(y, i))) : isnan(ot_get(z, i)));
}

static void finite_differences(struct ot *t) {
  ot_reset(t);
  ot_what(t, "finite differences");
  fd_tensor *x = OT_RAND(t, FD_F32, 12, 37), *w = OT_RAND(t, FD_F32, 37), *mod = OT_RAND(t, FD_F32, 3, 74), *y = OT_NEW(t, FD_F32, 12, 37),
            *rstd = OT_NEW(t, FD_F32, 12), *dy = OT_RAND(t, FD_F32, 12, 37), *dx = OT_NEW(t, FD_F32, 12, 37), *dw = OT_NEW(t, FD_F32, 37),
            *dmod = ot_fill(OT_NEW(t, FD_F32, 3, 74), 0);
  struct fd_rmsnorm_fwd_args fwd = {.x = x, .w = w, .mod = mod, .y = y, .rstd = rstd, .eps = 1e-6f, .rows_per_mod = 4, .shift_col = 0, .scale_col = 37};
  ot_run(t, FD_OP_rmsnorm_fwd, &fwd);
  OT_RUN(t, rmsnorm_bwd, .dy = dy, .x = x, .w = w, .rstd = rstd, .mod = mod, .dx = dx, .dw = dw, .dmod = dmod, .acc = 1u << 8, .eps = 1e-6f,
         .rows_per_mod = 4, .shift_col = 0, .scale_col = 37);
  ot_finite_difference(t, FD_OP_rmsnorm_fwd, &fwd, 1, OT_LIST(y), OT_LIST(dy), 3, OT_LIST(x, w, mod), OT_LIST(dx, dw, dmod), __LINE__);
  /* in place: y is x, dx is dy; no dw, no dmod */
  double *want = ot_doubles(y), *dwant = ot_doubles(dx);
  OT_RUN(t, rmsnorm_bwd, .dy = dy, .x = x, .w = w, .rstd = rstd, .mod = mod, .dx = dy, .eps = 1e-6f, .rows_per_mod = 4, .shift_col = 0, .scale_col = 37);
  for (int i = 0; i < 12 * 37; i++) OT_CHECK(t, ot_get(dy, i) == dwant[i]);
  fwd.y = x;
  fwd.rstd = NULL;
  ot_run(t, FD_OP_rmsnorm_fwd, &fwd);
  for (int i = 0; i < 12 * 37; i++) OT_CHECK(t, ot_get(x, i) == want[i]);
  free(want), free(dwant);
}

static void misuse(struct ot *t) {
  ot_reset(t);
  ot_what(t, "misuse");
  fd_tensor *x = OT_RAND(t, FD_F32, 6, 5), *w = OT_RAND(t, FD_F32, 5), *y = OT_NEW(t, FD_F32, 6, 5), *mod = OT_RAND(t, FD_F32, 3, 10),
            *w4 = OT_RAND(t, FD_F32, 4), *yb = OT_NEW(t, FD_BF16, 6, 5), *rstd = OT_NEW(t, FD_F32, 6), *count2 = OT_NEW(t, FD_I32, 2),
            *count_f = OT_NEW(t, FD_F32, 1), *wi = OT_NEW(t, FD_I32, 5), *dw = OT_NEW(t, FD_F32, 5), *dwb = OT_NEW(t, FD_BF16, 5),
            *x0 = OT_NEW(t, FD_F32, 6, 0), *mod4 = OT_RAND(t, FD_F32, 4, 10);
  OT_MISUSE(t, "w is missing", rmsnorm_fwd, .x = x, .y = y);
  OT_MISUSE(t, "w is f32 [4]", rmsnorm_fwd, .x = x, .w = w4, .y = y);
  OT_MISUSE(t, "w is i32", rmsnorm_fwd, .x = x, .w = wi, .y = y);
  OT_MISUSE(t, "y is f32", rmsnorm_fwd, .x = yb, .w = w, .y = y);
  OT_MISUSE(t, "y is f32 [5]", rmsnorm_fwd, .x = x, .w = w, .y = w);
  OT_MISUSE(t, "x is f32 [6, 0]", rmsnorm_fwd, .x = x0, .w = w, .y = x0);
  OT_MISUSE(t, "count is i32 [2]", rmsnorm_fwd, .x = x, .w = w, .y = y, .count = count2);
  OT_MISUSE(t, "count is f32", rmsnorm_fwd, .x = x, .w = w, .y = y, .count = count_f);
  OT_MISUSE(t, "rstd is f32 [5]", rmsnorm_fwd, .x = x, .w = w, .y = y, .rstd = w);
  OT_MISUSE(t, "mod is f32 [4, 10]", rmsnorm_fwd, .x = x, .w = w, .y = y, .mod = mod4, .rows_per_mod = 2);
  OT_MISUSE(t, "rows_per_mod", rmsnorm_fwd, .x = x, .w = w, .y = y, .mod = mod);
  OT_MISUSE(t, "scale_col", rmsnorm_fwd, .x = x, .w = w, .y = y, .mod = mod, .rows_per_mod = 2, .scale_col = 6);
  OT_MISUSE(t, "shift_col", rmsnorm_fwd, .x = x, .w = w, .y = y, .mod = mod, .rows_per_mod = 2, .shift_col = -2);
  OT_MISUSE(t, "acc bit 4 (y)", rmsnorm_fwd, .x = x, .w = w, .y = y, .acc = 1u << 4);
  OT_MISUSE(t, "rstd is missing", rmsnorm_bwd, .dy = x, .x = x, .w = w, .dx = y, .dw = dw);
  OT_MISUSE(t, "dw is bf16", rmsnorm_bwd, .dy = x, .x = x, .w = w, .rstd = rstd, .dx = y, .dw = dwb);
  OT_MISUSE(t, "dmod is f32 [3, 10]", rmsnorm_bwd, .dy = x, .x = x, .w = w, .rstd = rstd, .dx = y, .dmod = mod);
  OT_MISUSE(t, "acc bit 1 (x)", rmsnorm_bwd, .dy = x, .x = x, .w = w, .rstd = rstd, .dx = y, .acc = 2);
  fd_tensor *count9 = ot_count(t, 9); /* a wrong count shows only when the op runs */
  struct fd_rmsnorm_fwd_args fwd = {.x = x, .w = w, .y = y, .count = count9, .shift_col = -1, .scale_col = -1};
  OT_CHECK(t, OT_ON_DEVICE || (fd_op_run(t->ctx, FD_OP_rmsnorm_fwd, &fwd) == FD_ERR_ARG && strstr(fd_status_message(), "count = 9")));
}

static void body(struct ot *t) {
  const fd_dtype types[][3] = {{FD_F32, FD_F32, FD_F32}, {FD_BF16, FD_BF16, FD_BF16}, {FD_BF16, FD_F32, FD_F32}, {FD_F32, FD_BF16, FD_BF16}};
  const int64_t D[] = {1, 7, 32, 67};
  for (int k = 0; k < 4; k++)
    for (int d = 0; d < 4; d++)
      for (int kind = 0; kind < 4; kind++) {
        one(t, 6, D[d], 3, kind, -1, types[k][0], types[k][1], types[k][2], (d + kind) & 1);
        one(t, 6, D[d], 2, kind, 3, types[k][0], types[k][1], types[k][2], (d + kind + 1) & 1);
      }
  one(t, 0, 5, 1, 0, -1, FD_F32, FD_F32, FD_F32, false);
  one(t, 0, 5, 1, 1, -1, FD_F32, FD_F32, FD_F32, false);
  one(t, 3, 5, 1, 1, 0, FD_F32, FD_F32, FD_F32, true);
  one(t, 70, 9, 35, 1, 69, FD_F32, FD_F32, FD_F32, true); /* several pieces per row of mod */
  one(t, 70, 9, 70, 0, -1, FD_F32, FD_F32, FD_F32, false);
  for (int k = 0; k < 4; k++) { /* rows that a warp holds in registers, and longer ones; sums of a sample in several parts */
    one(t, 1, 1040, 1, 1, -1, types[k][0], types[k][1], types[k][2], true);
    if (k < 2) one(t, 1, types[k][0] == FD_BF16 ? 4104 : 2056, 1, 2, -1, types[k][0], types[k][1], types[k][2], true);
    one(t, 4, 264, 2, 1, 3, types[k][0], types[k][1], types[k][2], true);
    one(t, 150, 16, 75, 1, 148, types[k][0], types[k][1], types[k][2], true);
    one(t, 130, 24, 130, 0, -1, types[k][0], types[k][1], types[k][2], true);
  }
  const int64_t widths[] = {1, 8, 67, 1032, 2056};
  for (int d = 0; d < 5; d++) {
    rounded(t, 6, widths[d], 3, 5);
    rounded(t, 6, widths[d], 0, 6);
  }
  finite_differences(t);
  misuse(t);
}

int main(void) { return ot_main_same_bits(body); }
