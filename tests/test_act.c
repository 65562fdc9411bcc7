// SPDX-License-Identifier: Apache-2.0
// Activations and geglu: forward and backward against the definitions in double, over types, counts, acc and far values.
#include "optest.h"

static double act_of(enum fd_act act, double x) {
  switch (act) {
    case FD_ACT_SILU: return x / (1 + exp(-x));
    case FD_ACT_GELU_TANH: return x / (1 + exp(-2 * sqrt(2 / M_PI) * (x + 0.044715 * x * x * x))); /* x/2 (1 + tanh u) */
    case FD_ACT_GELU_ERF: return 0.5 * x * erfc(-x / sqrt(2));
    default: return x;
  }
}

static double grad_of(enum fd_act act, double x) {
  double h = 1e-4, d1 = act_of(act, x + h) - act_of(act, x - h), d2 = act_of(act, x + 2 * h) - act_of(act, x - 2 * h);
  return (8 * d1 - d2) / (12 * h);
}

static void act(struct ot *t, int64_t R, int64_t D, int64_t count, enum fd_act act, fd_dtype dt, bool acc, double spread) {
  ot_reset(t);
  ot_what(t, "act %d R %d D %d count %d %s acc %d spread %g", (int)act, (int)R, (int)D, (int)count, fd_dtype_name(dt), acc, spread);
  int64_t used = count < 0 ? R : count;
  fd_tensor *x = ot_normal(t, OT_NEW(t, dt, R, D), 0, spread), *y = OT_NEW(t, dt, R, D), *n = count < 0 ? NULL : ot_count(t, count),
            *dy = OT_RAND(t, dt, R, D), *dx = acc ? OT_RAND(t, dt, R, D) : OT_NEW(t, dt, R, D);
  double *ref = calloc((size_t)(R * D + 1), sizeof *ref), *dx0 = ot_doubles(dx);
  OT_RUN(t, act_fwd, .x = x, .count = n, .y = y, .act = act);
  for (int64_t i = 0; i < used * D; i++) ref[i] = act_of(act, ot_get(x, i));
  y->shape[0] = used;
  OT_COMPARE(t, y, ref, 1);
  y->shape[0] = R;
  for (int64_t i = used * D; i < R * D; i++) OT_CHECK(t, isnan(ot_get(y, i)));
  OT_RUN(t, act_bwd, .dy = dy, .x = x, .count = n, .dx = dx, .act = act, .acc = acc ? 8 : 0);
  for (int64_t i = 0; i < used * D; i++) ref[i] = ot_get(dy, i) * grad_of(act, ot_get(x, i)) + (acc ? dx0[i] : 0);
  dx->shape[0] = used;
  OT_COMPARE_SIZE(t, dx, ref, 1, 1);
  dx->shape[0] = R;
  if (!acc && used == R) { /* in place */
    double *want = ot_doubles(dx), *ywant = ot_doubles(y);
    OT_RUN(t, act_bwd, .dy = dy, .x = x, .dx = dy, .act = act);
    OT_RUN(t, act_fwd, .x = x, .y = x, .act = act);
    for (int64_t i = 0; i < R * D; i++) OT_CHECK(t, ot_get(dy, i) == want[i] && ot_get(x, i) == ywant[i]);
    free(want), free(ywant);
  }
  free(ref), free(dx0);
}

static void geglu(struct ot *t, int64_t R, int64_t F, int64_t count, enum fd_act act, fd_dtype dt, bool acc) {
  ot_reset(t);
  ot_what(t, "geglu %d R %d F %d count %d %s acc %d", (int)act, (int)R, (int)F, (int)count, fd_dtype_name(dt), acc);
  int64_t used = count < 0 ? R : count;
  fd_tensor *x = OT_RAND(t, dt, R, 2 * F), *y = OT_NEW(t, dt, R, F), *n = count < 0 ? NULL : ot_count(t, count), *dy = OT_RAND(t, dt, R, F),
            *dx = acc ? OT_RAND(t, dt, R, 2 * F) : OT_NEW(t, dt, R, 2 * F);
  double *ref = calloc((size_t)(2 * R * F + 1), sizeof *ref), *dx0 = ot_doubles(dx);
  OT_RUN(t, geglu_fwd, .gate_up = x, .count = n, .y = y, .act = act);
  for (int64_t r = 0; r < used; r++)
    for (int64_t i = 0; i < F; i++) ref[r * F + i] = act_of(act, ot_get(x, 2 * F * r + i)) * ot_get(x, 2 * F * r + F + i);
  y->shape[0] = used;
  OT_COMPARE(t, y, ref, 1);
  y->shape[0] = R;
  for (int64_t i = used * F; i < R * F; i++) OT_CHECK(t, isnan(ot_get(y, i)));
  OT_RUN(t, geglu_bwd, .dy = dy, .gate_up = x, .count = n, .dgate_up = dx, .act = act, .acc = acc ? 8 : 0);
  for (int64_t r = 0; r < used; r++)
    for (int64_t i = 0; i < F; i++) {
      int64_t at = 2 * F * r + i;
      double g = ot_get(dy, r * F + i);
      ref[at] = g * ot_get(x, at + F) * grad_of(act, ot_get(x, at)) + (acc ? dx0[at] : 0);
      ref[at + F] = g * act_of(act, ot_get(x, at)) + (acc ? dx0[at + F] : 0);
    }
  dx->shape[0] = used;
  OT_COMPARE_SIZE(t, dx, ref, 1, 1);
  dx->shape[0] = R;
  for (int64_t i = used * 2 * F; i < 2 * R * F; i++) OT_CHECK(t, acc ? ot_get(dx, i) == dx0[i] : isnan(ot_get(dx, i)));
  free(ref), free(dx0);
}

static void finite_differences(struct ot *t) {
  for (int act = 0; act <= FD_ACT_GELU_ERF; act++) {
    ot_reset(t);
    ot_what(t, "finite differences, act %d", act);
    fd_tensor *x = OT_RAND(t, FD_F32, 5, 22), *y = OT_NEW(t, FD_F32, 5, 11), *dy = OT_RAND(t, FD_F32, 5, 11), *dx = OT_NEW(t, FD_F32, 5, 22);
    struct fd_geglu_fwd_args fwd = {.gate_up = x, .y = y, .act = act};
    OT_RUN(t, geglu_bwd, .dy = dy, .gate_up = x, .dgate_up = dx, .act = act);
    ot_finite_difference(t, FD_OP_geglu_fwd, &fwd, 1, OT_LIST(y), OT_LIST(dy), 1, OT_LIST(x), OT_LIST(dx), __LINE__);
    fd_tensor *y2 = OT_NEW(t, FD_F32, 5, 22), *dy2 = OT_RAND(t, FD_F32, 5, 22);
    struct fd_act_fwd_args fwd2 = {.x = x, .y = y2, .act = act};
    OT_RUN(t, act_bwd, .dy = dy2, .x = x, .dx = dx, .act = act);
    ot_finite_difference(t, FD_OP_act_fwd, &fwd2, 1, OT_LIST(y2), OT_LIST(dy2), 1, OT_LIST(x), OT_LIST(dx), __LINE__);
  }
}

static void misuse(struct ot *t) {
  ot_reset(t);
  ot_what(t, "misuse");
  fd_tensor *x = OT_RAND(t, FD_F32, 4, 6), *y = OT_NEW(t, FD_F32, 4, 3), *odd = OT_RAND(t, FD_F32, 4, 5), *b = OT_NEW(t, FD_BF16, 4, 3),
            *i = OT_NEW(t, FD_I32, 4, 6);
  OT_MISUSE(t, "y is f32 [4, 3]", act_fwd, .x = x, .y = y);
  OT_MISUSE(t, "x is missing", act_fwd, .y = y);
  OT_MISUSE(t, "x is i32", act_fwd, .x = i, .y = x);
  OT_MISUSE(t, "act = 9", act_fwd, .x = x, .y = x, .act = 9);
  OT_MISUSE(t, "acc bit 2", act_fwd, .x = x, .y = x, .acc = 4);
  OT_MISUSE(t, "x is f32 [4, 3]", act_bwd, .dy = x, .x = y, .dx = x);
  OT_MISUSE(t, "dx is f32 [4, 3]", act_bwd, .dy = x, .x = x, .dx = y);
  OT_MISUSE(t, "gate_up is f32 [4, 5]", geglu_fwd, .gate_up = odd, .y = y);
  OT_MISUSE(t, "y is f32 [4, 6]", geglu_fwd, .gate_up = x, .y = x);
  OT_MISUSE(t, "y is bf16", geglu_fwd, .gate_up = x, .y = b);
  OT_MISUSE(t, "act = -1", geglu_fwd, .gate_up = x, .y = y, .act = (enum fd_act)-1);
  OT_MISUSE(t, "dy is f32 [4, 6]", geglu_bwd, .dy = x, .gate_up = x, .dgate_up = x);
  OT_MISUSE(t, "dgate_up is f32 [4, 3]", geglu_bwd, .dy = y, .gate_up = x, .dgate_up = y);
}

static void body(struct ot *t) {
  const int64_t D[] = {1, 7, 64, 131};
  for (int a = 0; a <= FD_ACT_GELU_ERF; a++)
    for (int dt = FD_F32; dt <= FD_BF16; dt++)
      for (int d = 0; d < 4; d++) {
        act(t, 5, D[d], d & 1 ? 3 : -1, a, dt, d >> 1 & 1, 1);
        act(t, 3, D[d], -1, a, dt, false, 30);
        geglu(t, 5, D[d], d & 1 ? 3 : -1, a, dt, d >> 1 & 1);
        geglu(t, 4, D[d], d & 1 ? -1 : 0, a, dt, !(d >> 1 & 1));
      }
  act(t, 0, 5, -1, FD_ACT_SILU, FD_F32, false, 1);
  geglu(t, 0, 5, -1, FD_ACT_SILU, FD_F32, false);
  finite_differences(t);
  misuse(t);
}

int main(void) { return ot_main_same_bits(body); }
