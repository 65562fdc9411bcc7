// SPDX-License-Identifier: Apache-2.0
// The optimiser on flat buffers: sum of squares, clipping, AdamW with EMA and the compute copy in one pass over memory.
#include <math.h>

#include "cpu/cpu.h"
#include "cpu/vmath.h"

/* ---- sumsq ------------------------------------------------------------------------------------------------------- */

enum { PIECE = 1 << 15, LANES_D = 16 };

/* Squares are exact in double. */
CPU_CLONES static double sum_of_squares(const float *x, int64_t n) {
  double lane[LANES_D] = {0};
  int64_t at = 0;
  for (; at + LANES_D <= n; at += LANES_D)
    for (int l = 0; l < LANES_D; l++) lane[l] += (double)x[at + l] * (double)x[at + l];
  for (int l = 0; at + l < n; l++) lane[l] += (double)x[at + l] * (double)x[at + l];
  for (int w = LANES_D / 2; w > 0; w /= 2)
    for (int l = 0; l < w; l++) lane[l] += lane[l + w];
  return lane[0];
}

fd_status cpu_sumsq_prepare(fd_ctx *ctx, const struct fd_sumsq_args *a, size_t *scratch_bytes) {
  (void)ctx;
  CPU_CHECK(sumsq, y, fd_tensor_numel(a->y) == 1, "[1]");
  *scratch_bytes = sizeof(double) * (size_t)((fd_tensor_numel(a->x) + PIECE - 1) / PIECE);
  return FD_OK;
}

fd_status cpu_sumsq(fd_ctx *ctx, const struct fd_sumsq_args *a) {
  const int64_t n = fd_tensor_numel(a->x), pieces = (n + PIECE - 1) / PIECE;
  double *slot = ctx->scratch, *y = a->y->data, sum = 0;
  #pragma omp parallel num_threads(cpu_threads(ctx, n))
  {
    int64_t lo, hi;
    cpu_share(pieces, 1, &lo, &hi);
    for (int64_t p = lo; p < hi; p++)
      slot[p] = sum_of_squares((const float *)a->x->data + p * PIECE, n - p * PIECE < PIECE ? n - p * PIECE : PIECE);
  }
  for (int64_t p = 0; p < pieces; p++) sum += slot[p];
  *y = a->acc >> 1 & 1 ? *y + sum : sum;
  return FD_OK;
}

/* ---- clip -------------------------------------------------------------------------------------------------------- */

fd_status cpu_clip_prepare(fd_ctx *ctx, const struct fd_clip_args *a, size_t *scratch_bytes) {
  (void)ctx, (void)scratch_bytes;
  CPU_CHECK(clip, sumsq, fd_tensor_numel(a->sumsq) == 1, "[1]");
  CPU_CHECK(clip, control, fd_tensor_numel(a->control) == FD_CONTROL_COUNT, "[%d]", (int)FD_CONTROL_COUNT);
  return FD_OK;
}

fd_status cpu_clip(fd_ctx *ctx, const struct fd_clip_args *a) {
  (void)ctx;
  float *control = a->control->data;
  const double scale = (double)control[FD_CONTROL_GRAD_SCALE], norm = scale * sqrt(*(const double *)a->sumsq->data);
  const double most = (double)a->max_norm, coefficient = most > 0 && most < norm + 1e-6 ? most / (norm + 1e-6) : 1;
  const bool skip = !isfinite((float)norm) || !isfinite(control[FD_CONTROL_LOSS]);
  control[FD_CONTROL_NORM] = (float)norm;
  control[FD_CONTROL_CLIP] = skip ? 0.0f : (float)(scale * coefficient);
  control[FD_CONTROL_SKIP] = skip ? 1.0f : 0.0f;
  return FD_OK;
}

/* ---- adamw ------------------------------------------------------------------------------------------------------- */

struct adamw {
  float clip, beta1, one_minus_beta1, beta2, one_minus_beta2, inv_bias1, inv_bias2, eps, lr, weight_decay, decay;
  bool keep_g;
};

enum compute { NONE, F32, BF16 };

CPU_INLINE void update_loop(const struct adamw *s, float *restrict p, float *restrict g, float *restrict m, float *restrict v,
                            float *restrict ema, void *restrict compute, enum compute kind, int64_t lo, int64_t hi) {
  const struct adamw c = *s;
  for (int64_t i = lo; i < hi; i++) {
    const float grad = g[i] * c.clip;
    const float mi = cpu_fma(c.beta1, m[i], c.one_minus_beta1 * grad), vi = cpu_fma(c.beta2, v[i], c.one_minus_beta2 * grad * grad);
    const float update = mi * c.inv_bias1 / (__builtin_sqrtf(vi * c.inv_bias2) + c.eps);
    const float pi = cpu_fma(-c.lr, cpu_fma(c.weight_decay, p[i], update), p[i]);
    m[i] = mi, v[i] = vi, p[i] = pi;
    if (!c.keep_g) g[i] = 0.0f;
    if (ema) ema[i] = c.decay == 1.0f ? ema[i] : cpu_fma(c.decay, ema[i], (1.0f - c.decay) * pi);
    if (kind != NONE) cpu_store(compute, kind == BF16, i, pi);
  }
}

CPU_CLONES static void update(const struct adamw *s, float *p, float *g, float *m, float *v, float *ema, void *compute, enum compute kind,
                              int64_t lo, int64_t hi) {
#define KINDS(ema)                                                                \
  do {                                                                            \
    if (kind == NONE) update_loop(s, p, g, m, v, ema, NULL, NONE, lo, hi);        \
    else if (kind == F32) update_loop(s, p, g, m, v, ema, compute, F32, lo, hi);  \
    else update_loop(s, p, g, m, v, ema, compute, BF16, lo, hi);                  \
  } while (0)
  if (ema) KINDS(ema);
  else KINDS(NULL);
#undef KINDS
}

fd_status cpu_adamw_prepare(fd_ctx *ctx, const struct fd_adamw_args *a, size_t *scratch_bytes) {
  (void)ctx, (void)scratch_bytes;
  const int64_t n = fd_tensor_numel(a->p);
#define FLAT(slot) CPU_CHECK(adamw, slot, !a->slot || fd_tensor_numel(a->slot) == n, "%lld elements as p", (long long)n)
  FLAT(g);
  FLAT(m);
  FLAT(v);
  FLAT(ema);
  FLAT(compute);
#undef FLAT
  CPU_CHECK(adamw, control, fd_tensor_numel(a->control) == FD_CONTROL_COUNT, "[%d]", (int)FD_CONTROL_COUNT);
  CPU_CHECK_ARG(adamw, a->beta1 >= 0 && a->beta1 < 1 && a->beta2 >= 0 && a->beta2 < 1, "betas %g, %g, expected 0 <= beta < 1",
                a->beta1, a->beta2);
  CPU_CHECK_ARG(adamw, a->eps >= 0, "eps = %g, expected 0 or more", (double)a->eps);
  return FD_OK;
}

fd_status cpu_adamw(fd_ctx *ctx, const struct fd_adamw_args *a) {
  const float *control = a->control->data;
  const int64_t n = fd_tensor_numel(a->p);
  const bool skip = control[FD_CONTROL_SKIP] != 0.0f;
  const struct adamw s = {.clip = control[FD_CONTROL_CLIP],
                          .beta1 = (float)a->beta1,
                          .one_minus_beta1 = (float)(1.0 - a->beta1),
                          .beta2 = (float)a->beta2,
                          .one_minus_beta2 = (float)(1.0 - a->beta2),
                          .inv_bias1 = (float)(1.0 / (double)control[FD_CONTROL_BIAS1]),
                          .inv_bias2 = (float)(1.0 / (double)control[FD_CONTROL_BIAS2]),
                          .eps = a->eps,
                          .lr = control[FD_CONTROL_LR],
                          .weight_decay = a->weight_decay,
                          .decay = control[FD_CONTROL_EMA_DECAY],
                          .keep_g = a->keep_g != 0};
  const enum compute kind = !a->compute ? NONE : a->compute->dtype == FD_BF16 ? BF16 : F32;
  #pragma omp parallel num_threads(cpu_threads(ctx, n))
  {
    int64_t lo, hi;
    cpu_share(n, 64, &lo, &hi);
    if (skip && !s.keep_g) memset((float *)a->g->data + lo, 0, sizeof(float) * (size_t)(hi - lo));
    if (!skip)
      update(&s, a->p->data, a->g->data, a->m->data, a->v->data, a->ema ? a->ema->data : NULL, a->compute ? a->compute->data : NULL, kind, lo,
             hi);
  }
  return FD_OK;
}
