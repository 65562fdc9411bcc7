// SPDX-License-Identifier: Apache-2.0
// The optimiser: sum of squares, clipping with every way to skip, AdamW over steps against double.
#include "optest.h"

static void sumsq(struct ot *t, int64_t n, bool acc) {
  ot_reset(t);
  ot_what(t, "sumsq %d acc %d", (int)n, acc);
  fd_tensor *x = OT_RAND(t, FD_F32, n), *y = OT_NEW(t, FD_F64, 1);
  double ref = acc ? 2.5 : 0;
  if (acc) ot_set(y, 0, 2.5);
  for (int64_t i = 0; i < n; i++) ref += ot_get(x, i) * ot_get(x, i);
  OT_RUN(t, sumsq, .x = x, .y = y, .acc = acc ? 2 : 0);
  OT_CHECK(t, fabs(ot_get(y, 0) - ref) <= 1e-13 * ref);
}

static void clip(struct ot *t, double sumsq, double scale, double loss, float max_norm, double norm, double clip, double skip) {
  ot_reset(t);
  ot_what(t, "clip sumsq %g scale %g loss %g max %g", sumsq, scale, loss, (double)max_norm);
  fd_tensor *s = ot_fill(OT_NEW(t, FD_F64, 1), sumsq), *c = ot_fill(OT_NEW(t, FD_F32, FD_CONTROL_COUNT), 7);
  ot_set(c, FD_CONTROL_GRAD_SCALE, scale);
  ot_set(c, FD_CONTROL_LOSS, loss);
  OT_RUN(t, clip, .sumsq = s, .control = c, .max_norm = max_norm);
  OT_CHECK(t, ot_get(c, FD_CONTROL_SKIP) == skip);
  if (isfinite(norm)) OT_CHECK(t, fabs(ot_get(c, FD_CONTROL_NORM) - norm) <= 1e-7 * norm);
  else OT_CHECK(t, !isfinite(ot_get(c, FD_CONTROL_NORM)));
  OT_CHECK(t, fabs(ot_get(c, FD_CONTROL_CLIP) - clip) <= 1e-7 * clip);
  for (int i = 0; i < FD_CONTROL_COUNT; i++) /* the rest is untouched */
    if (i != FD_CONTROL_SKIP && i != FD_CONTROL_NORM && i != FD_CONTROL_CLIP && i != FD_CONTROL_GRAD_SCALE && i != FD_CONTROL_LOSS)
      OT_CHECK(t, ot_get(c, i) == 7);
}

/* kind: 0 no compute copy, 1 f32, 2 bf16 */
static void adamw(struct ot *t, int64_t n, bool with_ema, int kind, double decay, bool keep_g) {
  ot_reset(t);
  ot_what(t, "adamw n %d ema %d compute %d decay %g keep_g %d", (int)n, with_ema, kind, decay, keep_g);
  fd_tensor *p = OT_RAND(t, FD_F32, n), *g = OT_NEW(t, FD_F32, n), *m = ot_fill(OT_NEW(t, FD_F32, n), 0), *v = ot_fill(OT_NEW(t, FD_F32, n), 0),
            *ema = with_ema ? OT_RAND(t, FD_F32, n) : NULL, *c = kind ? OT_NEW(t, kind == 1 ? FD_F32 : FD_BF16, n) : NULL,
            *control = ot_fill(OT_NEW(t, FD_F32, FD_CONTROL_COUNT), 0);
  double *rp = ot_doubles(p), *rm = ot_doubles(m), *rv = ot_doubles(v), *re = ot_doubles(ema);
  for (int k = 1; k <= 5; k++) {
    double lr = (double)(1e-2f / (float)k), b1 = 0.9, b2 = 0.999, clip = 0.25;
    ot_normal(t, g, 0, 1);
    ot_set(control, FD_CONTROL_LR, lr);
    ot_set(control, FD_CONTROL_BIAS1, 1 - pow(b1, k));
    ot_set(control, FD_CONTROL_BIAS2, 1 - pow(b2, k));
    ot_set(control, FD_CONTROL_EMA_DECAY, decay);
    ot_set(control, FD_CONTROL_CLIP, clip);
    double *g0 = ot_doubles(g);
    for (int64_t i = 0; i < n; i++) {
      double gi = g0[i] * clip;
      rm[i] = b1 * rm[i] + (1 - b1) * gi;
      rv[i] = b2 * rv[i] + (1 - b2) * gi * gi;
      rp[i] -= lr * (rm[i] / (1 - pow(b1, k)) / (sqrt(rv[i] / (1 - pow(b2, k))) + 1e-4) + 0.5 * rp[i]);
      if (re) re[i] = decay * re[i] + (1 - decay) * rp[i];
    }
    OT_RUN(t, adamw, .p = p, .g = g, .m = m, .v = v, .ema = ema, .compute = c, .control = control, .beta1 = b1, .beta2 = b2, .eps = 1e-4f,
           .weight_decay = 0.5f, .keep_g = keep_g);
    for (int64_t i = 0; i < n; i++) OT_CHECK(t, ot_get(g, i) == (keep_g ? g0[i] : 0));
    free(g0);
  }
  OT_COMPARE_SIZE(t, p, rp, 5, 1);
  OT_COMPARE(t, m, rm, 5);
  OT_COMPARE(t, v, rv, 5);
  if (ema) OT_COMPARE_SIZE(t, ema, re, 5, 1);
  for (int64_t i = 0; c && i < n; i++)
    OT_CHECK(t, ot_get(c, i) == (kind == 1 ? ot_get(p, i) : fd_bf16_to_f32(fd_f32_to_bf16((float)ot_get(p, i)))));

  /* skip: only g is cleared, whatever it holds; or nothing at all */
  double *p0 = ot_doubles(p), *m0 = ot_doubles(m), *v0 = ot_doubles(v), *e0 = ot_doubles(ema);
  ot_fill(g, NAN);
  ot_set(control, FD_CONTROL_SKIP, 1);
  OT_RUN(t, adamw, .p = p, .g = g, .m = m, .v = v, .ema = ema, .compute = c, .control = control, .beta1 = 0.9, .beta2 = 0.999, .eps = 1e-4f,
         .weight_decay = 0.5f, .keep_g = keep_g);
  for (int64_t i = 0; i < n; i++)
    OT_CHECK(t, (keep_g ? isnan(ot_get(g, i)) : ot_get(g, i) == 0) && ot_get(p, i) == p0[i] && ot_get(m, i) == m0[i] && ot_get(v, i) == v0[i] && (!ema || ot_get(ema, i) == e0[i]));
  free(rp), free(rm), free(rv), free(re), free(p0), free(m0), free(v0), free(e0);
}

static void misuse(struct ot *t) {
  ot_reset(t);
  ot_what(t, "misuse");
  fd_tensor *p = OT_RAND(t, FD_F32, 8), *q = OT_RAND(t, FD_F32, 7), *b = OT_NEW(t, FD_BF16, 8), *control = OT_NEW(t, FD_F32, FD_CONTROL_COUNT),
            *d = OT_NEW(t, FD_F64, 1), *d2 = OT_NEW(t, FD_F64, 2);
  OT_MISUSE(t, "x is bf16", sumsq, .x = b, .y = d);
  OT_MISUSE(t, "y is f64 [2]", sumsq, .x = p, .y = d2);
  OT_MISUSE(t, "y is f32", sumsq, .x = p, .y = q);
  OT_MISUSE(t, "control is f32 [8]", clip, .sumsq = d, .control = p);
  OT_MISUSE(t, "sumsq is f64 [2]", clip, .sumsq = d2, .control = control);
#define ADAMW .p = p, .g = p, .beta1 = 0.9, .beta2 = 0.99
  OT_MISUSE(t, "m is f32 [7]", adamw, ADAMW, .m = q, .v = p, .control = control);
  OT_MISUSE(t, "v is bf16", adamw, ADAMW, .m = p, .v = b, .control = control);
  OT_MISUSE(t, "ema is f32 [7]", adamw, ADAMW, .m = p, .v = p, .ema = q, .control = control);
  OT_MISUSE(t, "control is f32 [8]", adamw, ADAMW, .m = p, .v = p, .control = p);
  OT_MISUSE(t, "control is missing", adamw, ADAMW, .m = p, .v = p);
  OT_MISUSE(t, "betas 1, 0.99", adamw, .p = p, .g = p, .m = p, .v = p, .control = control, .beta1 = 1, .beta2 = 0.99);
  OT_MISUSE(t, "acc bit 0 (p)", adamw, ADAMW, .m = p, .v = p, .control = control, .acc = 1);
}

static void body(struct ot *t) {
  for (int acc = 0; acc < 2; acc++) {
    sumsq(t, 0, acc);
    sumsq(t, 1, acc);
    sumsq(t, 37, acc);
    sumsq(t, 100003, acc);
  }
  clip(t, 4, 1, 1, 0, 2, 1, 0);              /* no clipping */
  clip(t, 4, 1, 1, 5, 2, 1, 0);              /* below */
  clip(t, 4, 1, 1, 1, 2, 1 / (2 + 1e-6), 0); /* above */
  clip(t, 64, 0.25, 1, 1, 2, 0.25 / (2 + 1e-6), 0);
  clip(t, 0, 1, 1, 1, 0, 1, 0);
  clip(t, NAN, 1, 1, 1, NAN, 0, 1);
  clip(t, INFINITY, 1, 1, 1, NAN, 0, 1);
  clip(t, 4, 1, NAN, 1, 2, 0, 1);
  clip(t, 4, 1, INFINITY, 1, 2, 0, 1);
  const int64_t n[] = {0, 1, 16, 67, 40001};
  for (int k = 0; k < 5; k++)
    for (int kind = 0; kind < 3; kind++) {
      adamw(t, n[k], false, kind, 0.99, kind == 1);
      adamw(t, n[k], true, kind, 0.99, kind == 2);
    }
  adamw(t, 20, true, 2, 1, false); /* the average does not move */
  misuse(t);
}

int main(void) { return ot_main_same_bits(body); }
