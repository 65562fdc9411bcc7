// SPDX-License-Identifier: Apache-2.0
// y = x + gate a. The gate is one row of columns per sample; its gradient is summed in the pieces that cpu.h describes.
#include "cpu/cpu.h"
#include "cpu/vmath.h"

/* Columns of row `m` of mod as f32, in `gate`. */
CPU_CLONES static void load_gate(const fd_tensor *mod, int64_t m, int64_t gate_col, int64_t D, float *gate) {
  const int64_t at = m * fd_tensor_cols(mod) + gate_col;
  const bool bf16 = mod->dtype == FD_BF16;
  for (int64_t i = 0; i < D; i++) gate[i] = cpu_load(mod->data, bf16, at + i);
}

static fd_status check_mod(enum fd_op op, const fd_tensor *mod, int64_t R, int64_t D, int64_t rows_per_mod, int64_t gate_col) {
  if (!mod) return FD_OK;
  if (rows_per_mod < 1) return fd_op_wrong_arg(op, "rows_per_mod = %lld, expected 1 or more", (long long)rows_per_mod);
  if (mod->ndim < 1 || fd_tensor_rows(mod) * rows_per_mod != R)
    return fd_op_wrong_slot(op, "mod", mod, "%lld rows (%lld rows of a / rows_per_mod %lld)", (long long)(R / rows_per_mod),
                          (long long)R, (long long)rows_per_mod);
  if (gate_col < 0 || gate_col + D > fd_tensor_cols(mod))
    return fd_op_wrong_arg(op, "gate_col = %lld outside mod's %lld columns", (long long)gate_col, (long long)fd_tensor_cols(mod));
  return FD_OK;
}

/* ---- forward ----------------------------------------------------------------------------------------------------- */

CPU_CLONES static void fwd(const void *x, bool bf16, const void *a, bool a_bf16, const float *gate, void *y, int64_t D, int64_t lo, int64_t hi) {
#define ROW(bf16, a_bf16) \
  CPU_IVDEP for (int64_t i = 0; i < D; i++) \
    cpu_store(y, bf16, at + i, cpu_fma(gate[i], cpu_load(a, a_bf16, at + i), cpu_load(x, bf16, at + i)))
  for (int64_t r = lo; r < hi; r++) {
    const int64_t at = r * D;
    if (bf16) ROW(true, true);
    else if (a_bf16) ROW(false, true);
    else ROW(false, false);
  }
#undef ROW
}

CPU_CLONES static void fwd_plain(const void *x, bool bf16, const void *a, bool a_bf16, void *y, int64_t lo, int64_t hi) {
#define ROW(bf16, a_bf16) \
  CPU_IVDEP for (int64_t i = lo; i < hi; i++) cpu_store(y, bf16, i, cpu_load(a, a_bf16, i) + cpu_load(x, bf16, i))
  if (bf16) ROW(true, true);
  else if (a_bf16) ROW(false, true);
  else ROW(false, false);
#undef ROW
}

fd_status cpu_gate_residual_fwd_prepare(fd_ctx *ctx, const struct fd_gate_residual_fwd_args *a, size_t *scratch_bytes) {
  const int64_t D = fd_tensor_cols(a->x);
  CPU_CHECK(gate_residual_fwd, a, cpu_same_shape(a->a, a->x) && (a->a->dtype == a->x->dtype || a->a->dtype == FD_BF16), "the shape of x, and its type or bf16");
  CPU_CHECK(gate_residual_fwd, y, cpu_same_shape(a->y, a->x), "the shape of x");
  *scratch_bytes = a->mod ? (size_t)ctx->n_threads * cpu_align(sizeof(float) * (size_t)D) : 0;
  return check_mod(FD_OP_gate_residual_fwd, a->mod, fd_tensor_rows(a->x), D, a->rows_per_mod, a->gate_col);
}

fd_status cpu_gate_residual_fwd(fd_ctx *ctx, const struct fd_gate_residual_fwd_args *a) {
  const int64_t R = fd_tensor_rows(a->x), D = fd_tensor_cols(a->x);
  const bool bf16 = a->x->dtype == FD_BF16, a_bf16 = a->a->dtype == FD_BF16;
  int64_t used;
  fd_status st = cpu_rows_used(FD_OP_gate_residual_fwd, a->count, R, &used);
  if (st != FD_OK) return st;
  #pragma omp parallel num_threads(cpu_threads(ctx, used * D))
  {
    float *gate = (float *)((char *)ctx->scratch + (size_t)omp_get_thread_num() * cpu_align(sizeof(float) * (size_t)D));
    int64_t lo, hi;
    cpu_share(used, 1, &lo, &hi);
    if (!a->mod) fwd_plain(a->x->data, bf16, a->a->data, a_bf16, a->y->data, lo * D, hi * D);
    while (a->mod && lo < hi) {
      int64_t m = lo / a->rows_per_mod, end = (m + 1) * a->rows_per_mod < hi ? (m + 1) * a->rows_per_mod : hi;
      load_gate(a->mod, m, a->gate_col, D, gate);
      fwd(a->x->data, bf16, a->a->data, a_bf16, gate, a->y->data, D, lo, end);
      lo = end;
    }
  }
  return FD_OK;
}

/* ---- backward ---------------------------------------------------------------------------------------------------- */

CPU_INLINE void bwd_row(const void *dy, const void *a, const float *gate, void *da, bool bf16, bool acc, int64_t D, int64_t at,
                        float *restrict sum) {
  CPU_IVDEP
  for (int64_t i = 0; i < D; i++) {
    float g = cpu_load(dy, bf16, at + i), d = gate ? gate[i] * g : g;
    if (sum) sum[i] = cpu_fma(g, cpu_load(a, bf16, at + i), sum[i]);
    if (acc) d += cpu_load(da, bf16, at + i);
    cpu_store(da, bf16, at + i, d);
  }
}

CPU_CLONES static void bwd(const void *dy, const void *a, const float *gate, void *da, bool bf16, bool acc, int64_t D, int64_t lo,
                           int64_t hi, float *sum) {
  for (int64_t r = lo; r < hi; r++) {
    if (gate && sum && bf16) bwd_row(dy, a, gate, da, true, acc, D, r * D, sum);
    else if (gate && sum) bwd_row(dy, a, gate, da, false, acc, D, r * D, sum);
    else if (gate && bf16) bwd_row(dy, a, gate, da, true, acc, D, r * D, NULL);
    else if (gate) bwd_row(dy, a, gate, da, false, acc, D, r * D, NULL);
    else if (bf16) bwd_row(dy, a, NULL, da, true, acc, D, r * D, NULL);
    else bwd_row(dy, a, NULL, da, false, acc, D, r * D, NULL);
  }
}

CPU_CLONES static void add_slots(const float *slots, int64_t n, int64_t stride, void *out, bool bf16, bool acc, int64_t at, int64_t lo,
                                 int64_t hi) {
  for (int64_t i = lo; i < hi; i++) {
    float s = 0;
    for (int64_t k = 0; k < n; k++) s += slots[k * stride + i];
    cpu_store(out, bf16, at + i, acc ? cpu_load(out, bf16, at + i) + s : s);
  }
}

fd_status cpu_gate_residual_bwd_prepare(fd_ctx *ctx, const struct fd_gate_residual_bwd_args *a, size_t *scratch_bytes) {
  const int64_t R = fd_tensor_rows(a->dy), D = fd_tensor_cols(a->dy);
  CPU_CHECK(gate_residual_bwd, a, cpu_same_shape(a->a, a->dy), "the shape of dy");
  CPU_CHECK(gate_residual_bwd, da, cpu_same_shape(a->da, a->dy), "the shape of dy");
  fd_status st = check_mod(FD_OP_gate_residual_bwd, a->mod, R, D, a->rows_per_mod, a->gate_col);
  if (st != FD_OK) return st;
  CPU_CHECK(gate_residual_bwd, dmod, !a->dmod || (a->mod && cpu_same_shape(a->dmod, a->mod)), "the shape of mod");
  size_t column = cpu_align(sizeof(float) * (size_t)D);
  *scratch_bytes = a->mod ? (size_t)ctx->n_threads * column : 0;
  if (a->dmod) *scratch_bytes += (size_t)(R / a->rows_per_mod * cpu_pieces(R / a->rows_per_mod, a->rows_per_mod)) * column;
  return FD_OK;
}

fd_status cpu_gate_residual_bwd(fd_ctx *ctx, const struct fd_gate_residual_bwd_args *a) {
  const int64_t R = fd_tensor_rows(a->dy), D = fd_tensor_cols(a->dy), rpm = a->mod ? a->rows_per_mod : R, M = a->mod ? R / rpm : 1;
  const int64_t n_pieces = cpu_pieces(M, rpm);
  const size_t column = cpu_align(sizeof(float) * (size_t)D);
  const bool bf16 = a->dy->dtype == FD_BF16;
  int64_t used;
  fd_status st = cpu_rows_used(FD_OP_gate_residual_bwd, a->count, R, &used);
  if (st != FD_OK) return st;
  float *const slots = (float *)((char *)ctx->scratch + (size_t)ctx->n_threads * column);
  const int64_t stride = (int64_t)(column / sizeof(float));
  #pragma omp parallel num_threads(cpu_threads(ctx, used * D))
  {
    float *gate = a->mod ? (float *)((char *)ctx->scratch + (size_t)omp_get_thread_num() * column) : NULL;
    int64_t lo, hi, gate_of = -1;
    cpu_share(M * n_pieces, 1, &lo, &hi);
    for (int64_t p = lo; p < hi; p++) {
      int64_t m = p / n_pieces, k = p % n_pieces;
      int64_t from = m * rpm + cpu_cut(rpm, n_pieces, k), to = m * rpm + cpu_cut(rpm, n_pieces, k + 1);
      float *sum = a->dmod ? slots + p * stride : NULL;
      if (sum) memset(sum, 0, column);
      if (to > used) to = used;
      if (from >= to) continue;
      if (a->mod && m != gate_of) load_gate(a->mod, m, a->gate_col, D, gate);
      gate_of = m;
      bwd(a->dy->data, a->a->data, gate, a->da->data, bf16, a->acc >> 4 & 1, D, from, to, sum);
    }
    if (a->dmod) {
      #pragma omp barrier
      cpu_share(D, 64, &lo, &hi);
      for (int64_t m = 0; m < M; m++)
        add_slots(slots + m * n_pieces * stride, n_pieces, stride, a->dmod->data, a->dmod->dtype == FD_BF16, a->acc >> 5 & 1,
                  m * fd_tensor_cols(a->mod) + a->gate_col, lo, hi);
    }
  }
  return FD_OK;
}
