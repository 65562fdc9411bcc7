// SPDX-License-Identifier: Apache-2.0
// RMSNorm with modulation. With f = (1 + w)(1 + scale) per column and h = x rstd:
//   y = h f + shift;   dx = rstd (dy f - h mean(dy f h));   sum over rows P = sum dy h, S = sum dy gives
//   dscale = P (1 + w), dshift = S (per row of mod), dw = sum over rows of mod of P (1 + scale).
// Rows of one row of mod are cut into pieces with one slot of P and S each, so sums do not depend on threads.
#include <math.h>

#include "cpu/cpu.h"
#include "cpu/vmath.h"

/* ---- forward ----------------------------------------------------------------------------------------------------- */

struct norm {
  int64_t D, rows_per_mod, mod_cols, shift_col, scale_col;
  const void *w, *mod;
  bool w_bf16, mod_bf16;
  float eps;
};

/* f and shift of row `m` of mod. */
CPU_CLONES static void norm_factors(const struct norm *n, int64_t m, float *f, float *shift) {
  for (int64_t i = 0; i < n->D; i++) f[i] = 1.0f + cpu_load(n->w, n->w_bf16, i);
  if (n->mod && n->scale_col >= 0) {
    int64_t at = m * n->mod_cols + n->scale_col;
    for (int64_t i = 0; i < n->D; i++) f[i] *= 1.0f + cpu_load(n->mod, n->mod_bf16, at + i);
  }
  if (!shift) return;
  if (n->mod && n->shift_col >= 0) {
    int64_t at = m * n->mod_cols + n->shift_col;
    for (int64_t i = 0; i < n->D; i++) shift[i] = cpu_load(n->mod, n->mod_bf16, at + i);
  } else {
    memset(shift, 0, sizeof *shift * (size_t)n->D);
  }
}

CPU_INLINE void fwd_row(const void *x, bool x_bf16, void *y, bool y_bf16, int64_t D, float eps, const float *f, const float *shift, float *rstd) {
  float lane[CPU_LANES] = {0};
  CPU_LANES_ADD(lane, D, cpu_load(x, x_bf16, i) * cpu_load(x, x_bf16, i));
  float s = 1.0f / sqrtf(cpu_lanes_sum(lane) / (float)D + eps);
  if (rstd) *rstd = s;
  CPU_IVDEP /* y may be x itself */
  for (int64_t i = 0; i < D; i++) cpu_store(y, y_bf16, i, cpu_fma(cpu_load(x, x_bf16, i) * s, f[i], shift[i]));
}

CPU_CLONES static void fwd_rows(const void *x, bool x_bf16, void *y, bool y_bf16, int64_t rows, int64_t D, float eps, const float *f,
                                const float *shift, float *rstd) {
  for (int64_t r = 0; r < rows; r++) {
    float *s = rstd ? rstd + r : NULL;
    if (x_bf16) fwd_row((const fd_bf16 *)x + r * D, true, (fd_bf16 *)y + r * D, true, D, eps, f, shift, s);
    else if (y_bf16) fwd_row((const float *)x + r * D, false, (fd_bf16 *)y + r * D, true, D, eps, f, shift, s);
    else fwd_row((const float *)x + r * D, false, (float *)y + r * D, false, D, eps, f, shift, s);
  }
}

/* Checks that both directions share; `x` has been checked to have columns. */
static fd_status check_mod(enum fd_op op, const fd_tensor *mod, int64_t R, int64_t D, int64_t rows_per_mod, int64_t shift_col,
                           int64_t scale_col) {
  if (!mod) return FD_OK;
  if (rows_per_mod < 1) return fd_op_wrong_arg(op, "rows_per_mod = %lld, expected 1 or more", (long long)rows_per_mod);
  if (mod->ndim < 1 || fd_tensor_rows(mod) * rows_per_mod != R)
    return fd_op_wrong_slot(op, "mod", mod, "%lld rows (%lld rows of x / rows_per_mod %lld)", (long long)(R / rows_per_mod),
                          (long long)R, (long long)rows_per_mod);
  int64_t S = fd_tensor_cols(mod);
  if (shift_col < -1 || shift_col + D > S) return fd_op_wrong_arg(op, "shift_col = %lld outside mod's %lld columns", (long long)shift_col, (long long)S);
  if (scale_col < -1 || scale_col + D > S) return fd_op_wrong_arg(op, "scale_col = %lld outside mod's %lld columns", (long long)scale_col, (long long)S);
  return FD_OK;
}

fd_status cpu_rmsnorm_fwd_prepare(fd_ctx *ctx, const struct fd_rmsnorm_fwd_args *a, size_t *scratch_bytes) {
  int64_t R = fd_tensor_rows(a->x), D = fd_tensor_cols(a->x);
  CPU_CHECK(rmsnorm_fwd, x, a->x->ndim >= 1 && D >= 1, "[R, D] with D >= 1");
  CPU_CHECK(rmsnorm_fwd, w, fd_tensor_numel(a->w) == D, "[%lld]", (long long)D);
  CPU_CHECK(rmsnorm_fwd, y, cpu_same_shape(a->y, a->x) && (a->y->dtype == a->x->dtype || a->y->dtype == FD_BF16), "the shape of x, and its type or bf16");
  CPU_CHECK(rmsnorm_fwd, rstd, !a->rstd || fd_tensor_numel(a->rstd) == R, "[%lld]", (long long)R);
  *scratch_bytes = (size_t)ctx->n_threads * 2 * cpu_align(sizeof(float) * (size_t)D);
  return check_mod(FD_OP_rmsnorm_fwd, a->mod, R, D, a->rows_per_mod, a->shift_col, a->scale_col);
}

fd_status cpu_rmsnorm_fwd(fd_ctx *ctx, const struct fd_rmsnorm_fwd_args *a) {
  const int64_t R = fd_tensor_rows(a->x), D = fd_tensor_cols(a->x);
  int64_t used;
  fd_status st = cpu_rows_used(FD_OP_rmsnorm_fwd, a->count, R, &used);
  if (st != FD_OK || used == 0) return st;
  const struct norm n = {.D = D, .rows_per_mod = a->mod ? a->rows_per_mod : R, .mod_cols = a->mod ? fd_tensor_cols(a->mod) : 0,
                         .shift_col = a->shift_col, .scale_col = a->scale_col, .w = a->w->data,
                         .mod = a->mod ? a->mod->data : NULL, .w_bf16 = a->w->dtype == FD_BF16,
                         .mod_bf16 = a->mod && a->mod->dtype == FD_BF16, .eps = a->eps};
  const size_t x_row = (size_t)D * fd_dtype_bytes(a->x->dtype), y_row = (size_t)D * fd_dtype_bytes(a->y->dtype), buffer = cpu_align(sizeof(float) * (size_t)D);
  #pragma omp parallel num_threads(cpu_threads(ctx, used * D))
  {
    float *f = (float *)((char *)ctx->scratch + (size_t)omp_get_thread_num() * 2 * buffer);
    float *shift = (float *)((char *)f + buffer);
    int64_t lo, hi;
    cpu_share(used, 1, &lo, &hi);
    while (lo < hi) {
      int64_t m = lo / n.rows_per_mod, end = (m + 1) * n.rows_per_mod < hi ? (m + 1) * n.rows_per_mod : hi;
      norm_factors(&n, m, f, shift);
      fwd_rows((const char *)a->x->data + (size_t)lo * x_row, a->x->dtype == FD_BF16, (char *)a->y->data + (size_t)lo * y_row, a->y->dtype == FD_BF16,
               end - lo, D, n.eps, f, shift, a->rstd ? (float *)a->rstd->data + lo : NULL);
      lo = end;
    }
  }
  return FD_OK;
}

/* ---- backward ---------------------------------------------------------------------------------------------------- */

CPU_INLINE void bwd_row(const void *dy, const void *x, void *dx, bool bf16, bool acc, int64_t D, float rstd, const float *f,
                        float *restrict P, float *restrict S) {
  float lane[CPU_LANES] = {0};
  CPU_LANES_ADD(lane, D, cpu_load(dy, bf16, i) * f[i] * cpu_load(x, bf16, i));
  float c = cpu_lanes_sum(lane) * rstd * rstd / (float)D; /* mean(dy f h) rstd */
  CPU_IVDEP /* dx may be dy itself */
  for (int64_t i = 0; i < D; i++) {
    float g = cpu_load(dy, bf16, i), h = cpu_load(x, bf16, i);
    float d = cpu_fma(g * f[i], rstd, -(h * rstd * c));
    if (P) {
      P[i] = cpu_fma(g, h * rstd, P[i]);
      S[i] += g;
    }
    if (acc) d += cpu_load(dx, bf16, i);
    cpu_store(dx, bf16, i, d);
  }
}

CPU_CLONES static void bwd_rows(const void *dy, const void *x, void *dx, bool bf16, bool acc, int64_t rows, int64_t D,
                                const float *rstd, const float *f, float *P, float *S) {
#define ROWS(T, bf16, acc, P, S) \
  for (int64_t r = 0; r < rows; r++) bwd_row((const T *)dy + r * D, (const T *)x + r * D, (T *)dx + r * D, bf16, acc, D, rstd[r], f, P, S)
  if (bf16 && P) {
    if (acc) ROWS(fd_bf16, true, true, P, S);
    else ROWS(fd_bf16, true, false, P, S);
  } else if (P) {
    if (acc) ROWS(float, false, true, P, S);
    else ROWS(float, false, false, P, S);
  } else if (bf16) {
    ROWS(fd_bf16, true, acc, NULL, NULL);
  } else {
    ROWS(float, false, acc, NULL, NULL);
  }
#undef ROWS
}

/* Columns [lo, hi): add the pieces' slots of each row of mod and give the sums to dmod and dw. */
CPU_CLONES static void bwd_finish(const struct norm *n, const struct fd_rmsnorm_bwd_args *a, int64_t M, int64_t n_pieces,
                                  const float *slots, int64_t stride, int64_t lo, int64_t hi) {
  enum { BLOCK = 64 };
  const bool dmod_bf16 = a->dmod && a->dmod->dtype == FD_BF16, acc_dw = a->acc >> 7 & 1, acc_dmod = a->acc >> 8 & 1;
  for (int64_t c = lo; c < hi; c += BLOCK) {
    const int64_t len = hi - c < BLOCK ? hi - c : BLOCK;
    float dw[BLOCK] = {0};
    for (int64_t m = 0; m < M; m++) {
      float P[BLOCK] = {0}, S[BLOCK] = {0};
      for (int64_t k = 0; k < n_pieces; k++) {
        const float *slot = slots + (m * n_pieces + k) * 2 * stride + c;
        for (int64_t i = 0; i < len; i++) P[i] += slot[i], S[i] += slot[stride + i];
      }
      if (n->mod && n->scale_col >= 0)
        for (int64_t i = 0; i < len; i++) dw[i] += P[i] * (1.0f + cpu_load(n->mod, n->mod_bf16, m * n->mod_cols + n->scale_col + c + i));
      else
        for (int64_t i = 0; i < len; i++) dw[i] += P[i];
      if (a->dmod && n->scale_col >= 0)
        for (int64_t i = 0; i < len; i++) {
          int64_t at = m * n->mod_cols + n->scale_col + c + i;
          float d = P[i] * (1.0f + cpu_load(n->w, n->w_bf16, c + i));
          cpu_store(a->dmod->data, dmod_bf16, at, acc_dmod ? cpu_load(a->dmod->data, dmod_bf16, at) + d : d);
        }
      if (a->dmod && n->shift_col >= 0)
        for (int64_t i = 0; i < len; i++) {
          int64_t at = m * n->mod_cols + n->shift_col + c + i;
          cpu_store(a->dmod->data, dmod_bf16, at, acc_dmod ? cpu_load(a->dmod->data, dmod_bf16, at) + S[i] : S[i]);
        }
    }
    if (a->dw) {
      float *out = (float *)a->dw->data + c;
      for (int64_t i = 0; i < len; i++) out[i] = acc_dw ? out[i] + dw[i] : dw[i];
    }
  }
}

fd_status cpu_rmsnorm_bwd_prepare(fd_ctx *ctx, const struct fd_rmsnorm_bwd_args *a, size_t *scratch_bytes) {
  int64_t R = fd_tensor_rows(a->x), D = fd_tensor_cols(a->x);
  CPU_CHECK(rmsnorm_bwd, x, a->x->ndim >= 1 && D >= 1, "[R, D] with D >= 1");
  CPU_CHECK(rmsnorm_bwd, dy, cpu_same_shape(a->dy, a->x), "the shape of x");
  CPU_CHECK(rmsnorm_bwd, dx, cpu_same_shape(a->dx, a->x), "the shape of x");
  CPU_CHECK(rmsnorm_bwd, w, fd_tensor_numel(a->w) == D, "[%lld]", (long long)D);
  CPU_CHECK(rmsnorm_bwd, rstd, fd_tensor_numel(a->rstd) == R, "[%lld]", (long long)R);
  CPU_CHECK(rmsnorm_bwd, dw, !a->dw || fd_tensor_numel(a->dw) == D, "[%lld]", (long long)D);
  fd_status st = check_mod(FD_OP_rmsnorm_bwd, a->mod, R, D, a->rows_per_mod, a->shift_col, a->scale_col);
  if (st != FD_OK) return st;
  CPU_CHECK(rmsnorm_bwd, dmod, !a->dmod || (a->mod && cpu_same_shape(a->dmod, a->mod)), "the shape of mod");
  size_t column = cpu_align(sizeof(float) * (size_t)D);
  *scratch_bytes = (size_t)ctx->n_threads * column;
  if (a->dw || a->dmod) {
    int64_t rpm = a->mod ? a->rows_per_mod : R, M = a->mod ? R / rpm : 1;
    *scratch_bytes += (size_t)(M * cpu_pieces(M, rpm)) * 2 * column;
  }
  return FD_OK;
}

fd_status cpu_rmsnorm_bwd(fd_ctx *ctx, const struct fd_rmsnorm_bwd_args *a) {
  const int64_t R = fd_tensor_rows(a->x), D = fd_tensor_cols(a->x);
  int64_t used;
  fd_status st = cpu_rows_used(FD_OP_rmsnorm_bwd, a->count, R, &used);
  if (st != FD_OK) return st;
  const struct norm n = {.D = D, .rows_per_mod = a->mod ? a->rows_per_mod : R, .mod_cols = a->mod ? fd_tensor_cols(a->mod) : 0,
                         .shift_col = a->shift_col, .scale_col = a->scale_col, .w = a->w->data,
                         .mod = a->mod ? a->mod->data : NULL, .w_bf16 = a->w->dtype == FD_BF16,
                         .mod_bf16 = a->mod && a->mod->dtype == FD_BF16, .eps = a->eps};
  const bool bf16 = a->x->dtype == FD_BF16, sums = a->dw || a->dmod, acc = a->acc >> 6 & 1;
  const size_t each = fd_dtype_bytes(a->x->dtype), column = cpu_align(sizeof(float) * (size_t)D);
  const int64_t M = a->mod ? R / n.rows_per_mod : 1, n_pieces = cpu_pieces(M, n.rows_per_mod), stride = (int64_t)(column / sizeof(float));
  float *const slots = (float *)((char *)ctx->scratch + (size_t)ctx->n_threads * column);
  const int threads = cpu_threads(ctx, used * D);
  #pragma omp parallel num_threads(threads)
  {
    float *f = (float *)((char *)ctx->scratch + (size_t)omp_get_thread_num() * column);
    int64_t lo, hi, factors_of = -1;
    cpu_share(M * n_pieces, 1, &lo, &hi);
    for (int64_t p = lo; p < hi; p++) {
      int64_t m = p / n_pieces, k = p % n_pieces;
      int64_t from = m * n.rows_per_mod + cpu_cut(n.rows_per_mod, n_pieces, k);
      int64_t to = m * n.rows_per_mod + cpu_cut(n.rows_per_mod, n_pieces, k + 1);
      float *P = sums ? slots + p * 2 * stride : NULL, *S = sums ? P + stride : NULL;
      if (sums) memset(P, 0, 2 * column);
      if (to > used) to = used;
      if (from >= to) continue;
      if (m != factors_of) norm_factors(&n, m, f, NULL);
      factors_of = m;
      bwd_rows((const char *)a->dy->data + (size_t)(from * D) * each, (const char *)a->x->data + (size_t)(from * D) * each,
               (char *)a->dx->data + (size_t)(from * D) * each, bf16, acc, to - from, D, (const float *)a->rstd->data + from, f, P, S);
    }
    if (sums) {
      #pragma omp barrier
      cpu_share(D, 64, &lo, &hi);
      bwd_finish(&n, a, M, n_pieces, slots, stride, lo, hi);
    }
  }
  return FD_OK;
}
