// SPDX-License-Identifier: Apache-2.0
// GroupNorm with SiLU: forward and backward against the definition in double; few channels, one per group, far means.
#include "optest.h"

struct ref {
  int64_t B, HW, C, G;
  double eps, *x, *w, *b, *dy, *y, *stats;
  enum fd_act act;
};

static double forward(void *user) {
  struct ref *f = user;
  const int64_t each = f->C / f->G;
  double loss = 0;
  for (int64_t b = 0; b < f->B; b++)
    for (int64_t g = 0; g < f->G; g++) {
      double mean = 0, var = 0, n = (double)(each * f->HW);
      for (int64_t p = 0; p < f->HW; p++)
        for (int64_t i = 0; i < each; i++) mean += f->x[(b * f->HW + p) * f->C + g * each + i] / n;
      for (int64_t p = 0; p < f->HW; p++)
        for (int64_t i = 0; i < each; i++) var += pow(f->x[(b * f->HW + p) * f->C + g * each + i] - mean, 2) / n;
      double rstd = 1 / sqrt(var + f->eps);
      f->stats[2 * (b * f->G + g)] = mean;
      f->stats[2 * (b * f->G + g) + 1] = rstd;
      for (int64_t p = 0; p < f->HW; p++)
        for (int64_t i = 0; i < each; i++) {
          int64_t c = g * each + i, at = (b * f->HW + p) * f->C + c;
          double z = (f->x[at] - mean) * rstd * f->w[c] + f->b[c];
          f->y[at] = f->act == FD_ACT_SILU ? z / (1 + exp(-z)) : z;
          if (f->dy) loss += f->dy[at] * f->y[at];
        }
    }
  return loss;
}

static void one(struct ot *t, int64_t B, int64_t HW, int64_t C, int G, enum fd_act act, fd_dtype dt, fd_dtype wt, bool acc, double mean, bool bwd) {
  ot_reset(t);
  ot_what(t, "B %d HW %d C %d G %d act %d %s %s acc %d mean %g", (int)B, (int)HW, (int)C, G, (int)act, fd_dtype_name(dt), fd_dtype_name(wt), acc, mean);
  const int64_t n = B * HW * C;
  fd_tensor *x = ot_normal(t, OT_NEW(t, dt, B, HW, C), mean, 1), *w = ot_normal(t, OT_NEW(t, wt, C), 1, 0.3), *b = OT_RAND(t, wt, C),
            *y = OT_NEW(t, dt, B, HW, C), *stats = OT_NEW(t, FD_F32, B, G, 2);
  const float eps = HW * C / G == 1 ? 1.0f : 1e-2f; /* one element per group: no cancellation to test */
  OT_RUN(t, groupnorm_fwd, .x = x, .w = w, .b = b, .y = y, .stats = stats, .groups = G, .eps = eps, .act = act);
  struct ref f = {B, HW, C, G, (double)eps, ot_doubles(x), ot_doubles(w), ot_doubles(b), NULL, ot_doubles(y), ot_doubles(stats), act};
  forward(&f);
  if (HW) {
    OT_COMPARE_SIZE(t, y, f.y, 16 * (1 + fabs(mean) * fabs(mean)), 1); /* x - mean loses what the mean has */
    OT_COMPARE_SIZE(t, stats, f.stats, 16, 1);
  }
  if (bwd) {
    fd_tensor *dy = OT_RAND(t, dt, B, HW, C), *dx = acc ? OT_RAND(t, dt, B, HW, C) : OT_NEW(t, dt, B, HW, C),
              *dw = acc ? OT_RAND(t, FD_F32, C) : OT_NEW(t, FD_F32, C), *db = acc ? OT_RAND(t, FD_F32, C) : OT_NEW(t, FD_F32, C);
    double *was[3] = {ot_doubles(dx), ot_doubles(dw), ot_doubles(db)}, *in[3] = {f.x, f.w, f.b};
    fd_tensor *out[3] = {dx, dw, db};
    f.dy = ot_doubles(dy);
    OT_RUN(t, groupnorm_bwd, .dy = dy, .x = x, .w = w, .b = b, .stats = stats, .dx = dx, .dw = dw, .db = db, .acc = acc ? 7u << 5 : 0,
           .groups = G, .eps = eps, .act = act);
    for (int k = 0; k < 3; k++) {
      int64_t m = fd_tensor_numel(out[k]);
      double *g = calloc((size_t)m + 1, sizeof *g);
      ot_numeric_gradient(forward, &f, in[k], m, g);
      for (int64_t i = 0; acc && i < m; i++) g[i] += was[k][i];
      OT_COMPARE_SIZE(t, out[k], g, k ? B * HW : C / G * HW, 1);
      free(g), free(was[k]);
    }
    double *want = ot_doubles(dx);
    if (!acc) { /* frozen weights */
      OT_RUN(t, groupnorm_bwd, .dy = dy, .x = x, .w = w, .b = b, .stats = stats, .dx = dx, .groups = G, .eps = eps, .act = act);
      for (int64_t i = 0; i < n; i++) OT_CHECK(t, ot_get(dx, i) == want[i]);
    }
    free(want);
  }
  free(f.x), free(f.w), free(f.b), free(f.y), free(f.stats), free(f.dy);
}

static void finite_differences(struct ot *t) {
  ot_reset(t);
  ot_what(t, "finite differences");
  fd_tensor *x = OT_RAND(t, FD_F32, 2, 3, 5, 6), *w = OT_RAND(t, FD_F32, 6), *b = OT_RAND(t, FD_F32, 6), *y = OT_NEW(t, FD_F32, 2, 3, 5, 6),
            *stats = OT_NEW(t, FD_F32, 2, 3, 2), *dy = OT_RAND(t, FD_F32, 2, 3, 5, 6), *dx = OT_NEW(t, FD_F32, 2, 3, 5, 6), *dw = OT_NEW(t, FD_F32, 6),
            *db = OT_NEW(t, FD_F32, 6);
  struct fd_groupnorm_fwd_args fwd = {.x = x, .w = w, .b = b, .y = y, .stats = stats, .groups = 3, .eps = 1e-6f, .act = FD_ACT_SILU};
  ot_run(t, FD_OP_groupnorm_fwd, &fwd);
  OT_RUN(t, groupnorm_bwd, .dy = dy, .x = x, .w = w, .b = b, .stats = stats, .dx = dx, .dw = dw, .db = db, .groups = 3, .eps = 1e-6f, .act = FD_ACT_SILU);
  ot_finite_difference(t, FD_OP_groupnorm_fwd, &fwd, 1, OT_LIST(y), OT_LIST(dy), 3, OT_LIST(x, w, b), OT_LIST(dx, dw, db), __LINE__);
}

static void misuse(struct ot *t) {
  ot_reset(t);
  ot_what(t, "misuse");
  fd_tensor *x = OT_RAND(t, FD_F32, 2, 5, 6), *w = OT_RAND(t, FD_F32, 6), *w5 = OT_RAND(t, FD_F32, 5), *y = OT_NEW(t, FD_F32, 2, 5, 6),
            *stats = OT_NEW(t, FD_F32, 2, 3, 2), *s4 = OT_NEW(t, FD_F32, 4);
#define USUAL .x = x, .b = w, .y = y
  OT_MISUSE(t, "groups = 4", groupnorm_fwd, USUAL, .w = w, .stats = stats, .groups = 4);
  OT_MISUSE(t, "groups = 0", groupnorm_fwd, USUAL, .w = w, .stats = stats);
  OT_MISUSE(t, "act = 2", groupnorm_fwd, USUAL, .w = w, .stats = stats, .groups = 3, .act = FD_ACT_GELU_TANH);
  OT_MISUSE(t, "w is f32 [5]", groupnorm_fwd, USUAL, .w = w5, .stats = stats, .groups = 3);
  OT_MISUSE(t, "stats is f32 [4]", groupnorm_fwd, USUAL, .w = w, .stats = s4, .groups = 3);
  OT_MISUSE(t, "stats is missing", groupnorm_fwd, USUAL, .w = w, .groups = 3);
  OT_MISUSE(t, "x is f32 [6]", groupnorm_fwd, .x = w, .b = w, .y = w, .w = w, .stats = stats, .groups = 3);
  OT_MISUSE(t, "dy is f32 [6]", groupnorm_bwd, .dy = w, .x = x, .w = w, .b = w, .stats = stats, .dx = y, .groups = 3);
  OT_MISUSE(t, "db is f32 [5]", groupnorm_bwd, .dy = y, .x = x, .w = w, .b = w, .stats = stats, .dx = y, .db = w5, .groups = 3);
}

static void body(struct ot *t) {
  for (int dt = FD_F32; dt <= FD_BF16; dt++)
    for (int act = FD_ACT_NONE; act <= FD_ACT_SILU; act++)
      for (int acc = 0; acc < 2; acc++) {
        one(t, 2, 7, 6, 3, act, dt, FD_F32, acc, 0.5, true);
        one(t, 1, 9, 16, 8, act, dt, FD_BF16, acc, 0, true);
        one(t, 2, 3, 5, 5, act, dt, FD_F32, acc, 0, true); /* one channel per group */
        one(t, 1, 1, 3, 1, act, dt, FD_F32, acc, 0, true);
        one(t, 1, 3, 130, 2, act, dt, FD_F32, acc, 0, true);
        one(t, 1, 1, 2, 2, act, dt, FD_F32, acc, 0, true);
        one(t, 0, 4, 6, 3, act, dt, FD_F32, acc, 0, true);
        one(t, 2, 0, 6, 3, act, dt, FD_F32, acc, 0, true);
      }
  one(t, 2, 2000, 16, 8, FD_ACT_SILU, FD_F32, FD_F32, false, 0, false); /* several pieces, the last one short */
  one(t, 1, 260, 16, 4, FD_ACT_SILU, FD_BF16, FD_F32, true, 0.5, true); /* groups of half a vector, two tiles */
  one(t, 1, 4, 528, 4, FD_ACT_SILU, FD_BF16, FD_BF16, true, 0.5, true); /* groups over the edge of a block's channels */
  one(t, 1, 801, 33, 3, FD_ACT_NONE, FD_F32, FD_F32, false, 0, false);
  one(t, 1, 500, 16, 8, FD_ACT_NONE, FD_F32, FD_F32, false, 30, false); /* E[x^2] - mean^2 would have no digits left at 3000 */
  one(t, 1, 500, 16, 8, FD_ACT_NONE, FD_F32, FD_F32, false, 3000, false);
  finite_differences(t);
  misuse(t);
}

int main(void) { return ot_main_same_bits(body); }
