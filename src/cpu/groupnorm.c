// SPDX-License-Identifier: Apache-2.0
// GroupNorm on NHWC, then an activation. With h = (x - mean) rstd, z = h w + b, dz = dy act'(z), A = sum dz, Q = sum dz h per channel:
//   dw = sum over samples of Q, db = of A;   dx = rstd (dz w - mean over the group of w A - h mean over the group of w Q).
//
// Pixels are cut into pieces of about PIECE elements (they stay in the cache), each with a slot of per-channel sums. Loops run over
// `period` elements at a time, a whole number of pixels of at least 64 elements, so that few channels fill vectors too; tables
// of that length repeat the channels' constants.
#include <math.h>

#include "cpu/act.h"
#include "cpu/cpu.h"

enum { PIECE = 8192, PERIOD = 64, TABLES = 6 };

struct cut {
  int64_t B, HW, C, groups;
  int64_t period;           /* elements, a multiple of C */
  int64_t pixels, n_pieces; /* per piece; pieces per sample */
  size_t table;             /* bytes of one table */
};

static struct cut cut_of(const fd_tensor *x, int groups) {
  struct cut c = {.B = x->shape[0], .C = fd_tensor_cols(x), .groups = groups};
  c.HW = fd_tensor_rows(x) / (c.B ? c.B : 1);
  int64_t repeat = c.C < PERIOD ? (PERIOD + c.C - 1) / c.C : 1;
  c.period = repeat * c.C;
  c.pixels = PIECE / c.period * repeat;
  if (c.pixels < repeat) c.pixels = repeat;
  c.n_pieces = (c.HW + c.pixels - 1) / c.pixels;
  c.table = cpu_align(sizeof(float) * (size_t)c.period);
  return c;
}

static fd_status check(enum fd_op op, const char *slot, const fd_tensor *x, int groups, enum fd_act act) {
  if (x->ndim < 2 || fd_tensor_cols(x) < 1) return fd_op_wrong_slot(op, slot, x, "[B, H, W, C] or [B, HW, C]");
  if (groups < 1 || fd_tensor_cols(x) % groups)
    return fd_op_wrong_arg(op, "groups = %d, expected a divisor of C = %lld", groups, (long long)fd_tensor_cols(x));
  if (act != FD_ACT_NONE && act != FD_ACT_SILU) return fd_op_wrong_arg(op, "act = %d, expected none or silu", (int)act);
  return FD_OK;
}

/* out[c] = sum of the period's table at c, c + C, ... */
static void fold(const float *table, int64_t period, int64_t C, float *out) {
  for (int64_t c = 0; c < C; c++) {
    float s = 0;
    for (int64_t i = c; i < period; i += C) s += table[i];
    out[c] = s;
  }
}

static void repeat(float *table, int64_t period, int64_t C) {
  for (int64_t i = C; i < period; i++) table[i] = table[i - C];
}

/* ---- forward ----------------------------------------------------------------------------------------------------- */

/* sum[i] += EXPR(v, mean[i]) over the periods of n elements: four periods at a time, so that `sum` is loaded and stored once for four. */
#define ADD_PERIODS(bf16, EXPR)                                                                                 \
  do {                                                                                                          \
    int64_t at = 0;                                                                                             \
    for (; at + 4 * period <= n; at += 4 * period)                                                              \
      for (int64_t i = 0; i < period; i++) {                                                                    \
        const int64_t j = at + i;                                                                               \
        sum[i] += (EXPR(cpu_load(x, bf16, j), mean[i]) + EXPR(cpu_load(x, bf16, j + period), mean[i])) +        \
                  (EXPR(cpu_load(x, bf16, j + 2 * period), mean[i]) + EXPR(cpu_load(x, bf16, j + 3 * period), mean[i])); \
      }                                                                                                         \
    for (; at < n; at += period) {                                                                              \
      const int64_t len = n - at < period ? n - at : period;                                                    \
      for (int64_t i = 0; i < len; i++) sum[i] += EXPR(cpu_load(x, bf16, at + i), mean[i]);                     \
    }                                                                                                           \
  } while (0)
#define VALUE(v, mean) (v)
#define SQUARE(v, mean) (((v) - (mean)) * ((v) - (mean)))

/* Mean and sum of squared deviations per channel of one piece of n elements: two passes over what is in the cache. */
CPU_CLONES static void piece_stats(const void *x, bool bf16, int64_t n, int64_t period, int64_t C, float *restrict sum, float *restrict mean,
                                   float *slot) {
  memset(sum, 0, sizeof *sum * (size_t)period);
  if (bf16) ADD_PERIODS(true, VALUE);
  else ADD_PERIODS(false, VALUE);
  fold(sum, period, C, mean);
  for (int64_t c = 0; c < C; c++) slot[c] = mean[c] = mean[c] * ((float)C / (float)n);
  repeat(mean, period, C);
  memset(sum, 0, sizeof *sum * (size_t)period);
  if (bf16) ADD_PERIODS(true, SQUARE);
  else ADD_PERIODS(false, SQUARE);
  fold(sum, period, C, slot + C);
}

/* Pieces and channels of one group joined (Chan et al. 1983), in double. */
static void join_stats(const struct cut *c, const float *slots, int64_t b, int64_t g, float eps, float *stats) {
  const int64_t each = c->C / c->groups;
  double mean = 0, m2 = 0;
  for (int64_t k = 0; k < c->n_pieces; k++) {
    const float *slot = slots + (b * c->n_pieces + k) * 2 * c->C + g * each;
    const int64_t pixels = c->HW - k * c->pixels < c->pixels ? c->HW - k * c->pixels : c->pixels;
    for (int64_t i = 0; i < each; i++) mean += (double)slot[i] * (double)pixels;
  }
  mean /= (double)(each * c->HW);
  for (int64_t k = 0; k < c->n_pieces; k++) {
    const float *slot = slots + (b * c->n_pieces + k) * 2 * c->C + g * each;
    const int64_t pixels = c->HW - k * c->pixels < c->pixels ? c->HW - k * c->pixels : c->pixels;
    for (int64_t i = 0; i < each; i++) {
      const double d = (double)slot[i] - mean;
      m2 += (double)slot[c->C + i] + d * d * (double)pixels;
    }
  }
  stats[0] = (float)mean;
  stats[1] = (float)(1 / sqrt(m2 / (double)(each * c->HW) + (double)eps));
}

CPU_CLONES static void apply(const void *x, void *y, bool bf16, enum fd_act act, int64_t n, int64_t period, const float *mean,
                             const float *scale, const float *shift) {
#define LOOP(bf16, act)                                                                                       \
  for (int64_t at = 0; at < n; at += period) {                                                                \
    const int64_t len = n - at < period ? n - at : period;                                                    \
    CPU_IVDEP for (int64_t i = 0; i < len; i++)                                                    \
      cpu_store(y, bf16, at + i, cpu_act(act, cpu_fma(cpu_load(x, bf16, at + i) - mean[i], scale[i], shift[i]))); \
  }
  if (bf16 && act == FD_ACT_SILU) LOOP(true, FD_ACT_SILU)
  else if (bf16) LOOP(true, FD_ACT_NONE)
  else if (act == FD_ACT_SILU) LOOP(false, FD_ACT_SILU)
  else LOOP(false, FD_ACT_NONE)
#undef LOOP
}

fd_status cpu_groupnorm_fwd_prepare(fd_ctx *ctx, const struct fd_groupnorm_fwd_args *a, size_t *scratch_bytes) {
  fd_status st = check(FD_OP_groupnorm_fwd, "x", a->x, a->groups, a->act);
  if (st != FD_OK) return st;
  const struct cut c = cut_of(a->x, a->groups);
  CPU_CHECK(groupnorm_fwd, w, fd_tensor_numel(a->w) == c.C, "[%lld]", (long long)c.C);
  CPU_CHECK(groupnorm_fwd, b, fd_tensor_numel(a->b) == c.C, "[%lld]", (long long)c.C);
  CPU_CHECK(groupnorm_fwd, y, cpu_same_shape(a->y, a->x), "the shape of x");
  CPU_CHECK(groupnorm_fwd, stats, fd_tensor_numel(a->stats) == 2 * c.B * c.groups, "[%lld, %lld, 2]", (long long)c.B, (long long)c.groups);
  *scratch_bytes = (size_t)ctx->n_threads * TABLES * c.table + sizeof(float) * (size_t)(c.B * c.n_pieces * 2 * c.C);
  return FD_OK;
}

fd_status cpu_groupnorm_fwd(fd_ctx *ctx, const struct fd_groupnorm_fwd_args *a) {
  const struct cut c = cut_of(a->x, a->groups);
  const bool bf16 = a->x->dtype == FD_BF16;
  const size_t each = fd_dtype_bytes(a->x->dtype);
  float *const slots = (float *)((char *)ctx->scratch + (size_t)ctx->n_threads * TABLES * c.table), *stats = a->stats->data;
  #pragma omp parallel num_threads(cpu_threads(ctx, c.B * c.HW * c.C))
  {
    char *tables = (char *)ctx->scratch + (size_t)omp_get_thread_num() * TABLES * c.table;
    float *mean = (float *)tables, *scale = (float *)(tables + c.table), *shift = (float *)(tables + 2 * c.table);
    int64_t lo, hi, tables_of = -1;
    cpu_share(c.B * c.n_pieces, 1, &lo, &hi);
    for (int64_t p = lo; p < hi; p++) {
      int64_t b = p / c.n_pieces, from = p % c.n_pieces * c.pixels, pixels = c.HW - from < c.pixels ? c.HW - from : c.pixels;
      piece_stats((const char *)a->x->data + (size_t)((b * c.HW + from) * c.C) * each, bf16, pixels * c.C, c.period, c.C, scale, mean,
                  slots + p * 2 * c.C);
    }
    #pragma omp barrier
    int64_t g_lo, g_hi;
    cpu_share(c.HW ? c.B * c.groups : 0, 1, &g_lo, &g_hi);
    for (int64_t g = g_lo; g < g_hi; g++) join_stats(&c, slots, g / c.groups, g % c.groups, a->eps, stats + 2 * g);
    #pragma omp barrier
    for (int64_t p = lo; p < hi; p++) {
      int64_t b = p / c.n_pieces, from = p % c.n_pieces * c.pixels, pixels = c.HW - from < c.pixels ? c.HW - from : c.pixels;
      if (b != tables_of) {
        for (int64_t i = 0; i < c.C; i++) {
          const float *s = stats + 2 * (b * c.groups + i / (c.C / c.groups));
          mean[i] = s[0];
          scale[i] = s[1] * cpu_load(a->w->data, a->w->dtype == FD_BF16, i);
          shift[i] = cpu_load(a->b->data, a->b->dtype == FD_BF16, i);
        }
        repeat(mean, c.period, c.C);
        repeat(scale, c.period, c.C);
        repeat(shift, c.period, c.C);
        tables_of = b;
      }
      const size_t at = (size_t)((b * c.HW + from) * c.C) * each;
      apply((const char *)a->x->data + at, (char *)a->y->data + at, bf16, a->act, pixels * c.C, c.period, mean, scale, shift);
    }
  }
  return FD_OK;
}

/* ---- backward ---------------------------------------------------------------------------------------------------- */

/* h and dz of one element. */
CPU_INLINE float dz_of(float x, float dy, float mean, float rstd, float w, float b, enum fd_act act, float *h) {
  float value;
  *h = (x - mean) * rstd;
  return dy * cpu_act_grad(act, cpu_fma(*h, w, b), &value);
}

CPU_CLONES static void piece_sums(const void *dy, const void *x, bool bf16, enum fd_act act, int64_t n, int64_t period, const float *mean,
                                  const float *rstd, const float *w, const float *b, float *restrict A, float *restrict Q) {
  memset(A, 0, sizeof *A * (size_t)period);
  memset(Q, 0, sizeof *Q * (size_t)period);
#define LOOP(bf16, act)                                                                                                           \
  for (int64_t at = 0; at < n; at += period) {                                                                                    \
    const int64_t len = n - at < period ? n - at : period;                                                                        \
    for (int64_t i = 0; i < len; i++) {                                                                                           \
      float h, dz = dz_of(cpu_load(x, bf16, at + i), cpu_load(dy, bf16, at + i), mean[i], rstd[i], w[i], b[i], act, &h);          \
      A[i] += dz;                                                                                                                 \
      Q[i] = cpu_fma(dz, h, Q[i]);                                                                                                \
    }                                                                                                                             \
  }
  if (bf16 && act == FD_ACT_SILU) LOOP(true, FD_ACT_SILU)
  else if (bf16) LOOP(true, FD_ACT_NONE)
  else if (act == FD_ACT_SILU) LOOP(false, FD_ACT_SILU)
  else LOOP(false, FD_ACT_NONE)
#undef LOOP
}

/* mA, mQ: the group's means of w A and w Q. bf16, acc and act are constants where this is inlined: with a load that depends on
 * `acc` at run time the loop would stay scalar. */
CPU_INLINE void dx_loop(const void *dy, const void *x, void *dx, bool bf16, bool acc, enum fd_act act, int64_t n, int64_t period,
                        const float *mean, const float *rstd, const float *w, const float *b, const float *mA, const float *mQ) {
  for (int64_t at = 0; at < n; at += period) {
    const int64_t len = n - at < period ? n - at : period;
    CPU_IVDEP
    for (int64_t i = 0; i < len; i++) {
      float h, dz = dz_of(cpu_load(x, bf16, at + i), cpu_load(dy, bf16, at + i), mean[i], rstd[i], w[i], b[i], act, &h);
      float d = rstd[i] * (cpu_fma(dz, w[i], -mA[i]) - h * mQ[i]);
      if (acc) d += cpu_load(dx, bf16, at + i);
      cpu_store(dx, bf16, at + i, d);
    }
  }
}

CPU_CLONES static void piece_dx(const void *dy, const void *x, void *dx, bool bf16, bool acc, enum fd_act act, int64_t n, int64_t period,
                                const float *mean, const float *rstd, const float *w, const float *b, const float *mA, const float *mQ) {
#define LOOP(bf16, acc, act) dx_loop(dy, x, dx, bf16, acc, act, n, period, mean, rstd, w, b, mA, mQ)
  if (act == FD_ACT_SILU) {
    if (bf16 && acc) LOOP(true, true, FD_ACT_SILU);
    else if (bf16) LOOP(true, false, FD_ACT_SILU);
    else if (acc) LOOP(false, true, FD_ACT_SILU);
    else LOOP(false, false, FD_ACT_SILU);
  } else {
    if (bf16 && acc) LOOP(true, true, FD_ACT_NONE);
    else if (bf16) LOOP(true, false, FD_ACT_NONE);
    else if (acc) LOOP(false, true, FD_ACT_NONE);
    else LOOP(false, false, FD_ACT_NONE);
  }
#undef LOOP
}

fd_status cpu_groupnorm_bwd_prepare(fd_ctx *ctx, const struct fd_groupnorm_bwd_args *a, size_t *scratch_bytes) {
  fd_status st = check(FD_OP_groupnorm_bwd, "x", a->x, a->groups, a->act);
  if (st != FD_OK) return st;
  const struct cut c = cut_of(a->x, a->groups);
  CPU_CHECK(groupnorm_bwd, dy, cpu_same_shape(a->dy, a->x), "the shape of x");
  CPU_CHECK(groupnorm_bwd, dx, cpu_same_shape(a->dx, a->x), "the shape of x");
  CPU_CHECK(groupnorm_bwd, w, fd_tensor_numel(a->w) == c.C, "[%lld]", (long long)c.C);
  CPU_CHECK(groupnorm_bwd, b, fd_tensor_numel(a->b) == c.C, "[%lld]", (long long)c.C);
  CPU_CHECK(groupnorm_bwd, stats, fd_tensor_numel(a->stats) == 2 * c.B * c.groups, "[%lld, %lld, 2]", (long long)c.B, (long long)c.groups);
  CPU_CHECK(groupnorm_bwd, dw, !a->dw || fd_tensor_numel(a->dw) == c.C, "[%lld]", (long long)c.C);
  CPU_CHECK(groupnorm_bwd, db, !a->db || fd_tensor_numel(a->db) == c.C, "[%lld]", (long long)c.C);
  /* per piece A and Q; per sample A, Q, mA, mQ */
  *scratch_bytes = (size_t)ctx->n_threads * TABLES * c.table + sizeof(float) * (size_t)(c.B * (c.n_pieces * 2 + 4) * c.C);
  return FD_OK;
}

fd_status cpu_groupnorm_bwd(fd_ctx *ctx, const struct fd_groupnorm_bwd_args *a) {
  const struct cut c = cut_of(a->x, a->groups);
  const bool bf16 = a->x->dtype == FD_BF16;
  const size_t each = fd_dtype_bytes(a->x->dtype);
  const int64_t per_group = c.C / c.groups;
  float *const slots = (float *)((char *)ctx->scratch + (size_t)ctx->n_threads * TABLES * c.table);
  float *const sums = slots + c.B * c.n_pieces * 2 * c.C; /* [B, 4, C] */
  const float *stats = a->stats->data;
  #pragma omp parallel num_threads(cpu_threads(ctx, 2 * c.B * c.HW * c.C))
  {
    float *table[TABLES]; /* mean, rstd, w, b, then two of each pass */
    for (int k = 0; k < TABLES; k++) table[k] = (float *)((char *)ctx->scratch + ((size_t)omp_get_thread_num() * TABLES + (size_t)k) * c.table);
    int64_t lo, hi;
    cpu_share(c.B * c.n_pieces, 1, &lo, &hi);
    for (int pass = 0; pass < 2; pass++) {
      int64_t tables_of = -1;
      for (int64_t p = lo; p < hi; p++) {
        int64_t b = p / c.n_pieces, from = p % c.n_pieces * c.pixels, pixels = c.HW - from < c.pixels ? c.HW - from : c.pixels;
        if (b != tables_of) {
          for (int64_t i = 0; i < c.C; i++) {
            const float *s = stats + 2 * (b * c.groups + i / per_group);
            table[0][i] = s[0];
            table[1][i] = s[1];
            table[2][i] = cpu_load(a->w->data, a->w->dtype == FD_BF16, i);
            table[3][i] = cpu_load(a->b->data, a->b->dtype == FD_BF16, i);
          }
          if (pass) {
            memcpy(table[4], sums + (b * 4 + 2) * c.C, sizeof(float) * (size_t)c.C);
            memcpy(table[5], sums + (b * 4 + 3) * c.C, sizeof(float) * (size_t)c.C);
          }
          for (int k = 0; k < TABLES; k++)
            if (k < 4 || pass) repeat(table[k], c.period, c.C);
          tables_of = b;
        }
        const size_t at = (size_t)((b * c.HW + from) * c.C) * each;
        const void *dy = (const char *)a->dy->data + at, *x = (const char *)a->x->data + at;
        if (pass == 0) {
          piece_sums(dy, x, bf16, a->act, pixels * c.C, c.period, table[0], table[1], table[2], table[3], table[4], table[5]);
          fold(table[4], c.period, c.C, slots + p * 2 * c.C);
          fold(table[5], c.period, c.C, slots + p * 2 * c.C + c.C);
        } else {
          piece_dx(dy, x, (char *)a->dx->data + at, bf16, a->acc >> 5 & 1, a->act, pixels * c.C, c.period, table[0], table[1], table[2], table[3],
                   table[4], table[5]);
        }
      }
      #pragma omp barrier
      if (pass) break;
      int64_t g_lo, g_hi;
      cpu_share(c.B * c.groups, 1, &g_lo, &g_hi);
      for (int64_t g = g_lo; g < g_hi; g++) {
        const int64_t b = g / c.groups, first = g % c.groups * per_group;
        double mA = 0, mQ = 0;
        for (int64_t i = first; i < first + per_group; i++) {
          double A = 0, Q = 0, w = (double)cpu_load(a->w->data, a->w->dtype == FD_BF16, i);
          for (int64_t k = 0; k < c.n_pieces; k++) {
            A += (double)slots[(b * c.n_pieces + k) * 2 * c.C + i];
            Q += (double)slots[(b * c.n_pieces + k) * 2 * c.C + c.C + i];
          }
          sums[b * 4 * c.C + i] = (float)A;
          sums[(b * 4 + 1) * c.C + i] = (float)Q;
          mA += w * A, mQ += w * Q;
        }
        for (int64_t i = first; i < first + per_group; i++) {
          sums[(b * 4 + 2) * c.C + i] = c.HW ? (float)(mA / (double)(per_group * c.HW)) : 0.0f;
          sums[(b * 4 + 3) * c.C + i] = c.HW ? (float)(mQ / (double)(per_group * c.HW)) : 0.0f;
        }
      }
      #pragma omp barrier
    }
  }
  for (int which = 0; which < 2; which++) {
    const fd_tensor *out = which ? a->dw : a->db;
    for (int64_t i = 0; out && i < c.C; i++) {
      float sum = 0, *d = (float *)out->data + i;
      for (int64_t b = 0; b < c.B; b++) sum += sums[(b * 4 + which) * c.C + i];
      *d = a->acc >> (which ? 6 : 7) & 1 ? *d + sum : sum;
    }
  }
  return FD_OK;
}
