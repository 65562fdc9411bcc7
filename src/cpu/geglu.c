// SPDX-License-Identifier: Apache-2.0
// y = act(gate) up, both halves of one row of the joint projection.
#include "cpu/act.h"
#include "cpu/cpu.h"

CPU_INLINE void fwd_row(const void *restrict gate, const void *restrict up, void *restrict y, bool bf16, enum fd_act act, int64_t F) {
  for (int64_t i = 0; i < F; i++) cpu_store(y, bf16, i, cpu_act(act, cpu_load(gate, bf16, i)) * cpu_load(up, bf16, i));
}

#define BF16(act) ROWS(fd_bf16, true, act)
#define F32(act) ROWS(float, false, act)

CPU_CLONES static void fwd(const void *gate_up, void *y, bool bf16, enum fd_act act, int64_t F, int64_t lo, int64_t hi) {
#define ROWS(T, bf16, act)                    \
  for (int64_t r = lo; r < hi; r++) {         \
    const T *gate = (const T *)gate_up + 2 * F * r; \
    fwd_row(gate, gate + F, (T *)y + F * r, bf16, act, F); \
  }
  if (bf16) CPU_ACT_SWITCH(act, BF16)
  else CPU_ACT_SWITCH(act, F32)
#undef ROWS
}

fd_status cpu_geglu_fwd_prepare(fd_ctx *ctx, const struct fd_geglu_fwd_args *a, size_t *scratch_bytes) {
  (void)ctx, (void)scratch_bytes;
  int64_t R = fd_tensor_rows(a->gate_up), F = fd_tensor_cols(a->gate_up) / 2;
  CPU_CHECK(geglu_fwd, gate_up, a->gate_up->ndim >= 1 && fd_tensor_cols(a->gate_up) % 2 == 0, "[R, 2F]");
  CPU_CHECK(geglu_fwd, y, fd_tensor_rows(a->y) == R && fd_tensor_cols(a->y) == F, "[%lld, %lld]", (long long)R, (long long)F);
  CPU_CHECK_ACT(geglu_fwd);
  return FD_OK;
}

fd_status cpu_geglu_fwd(fd_ctx *ctx, const struct fd_geglu_fwd_args *a) {
  const int64_t F = fd_tensor_cols(a->y);
  int64_t used;
  fd_status st = cpu_rows_used(FD_OP_geglu_fwd, a->count, fd_tensor_rows(a->y), &used);
  if (st != FD_OK) return st;
  #pragma omp parallel num_threads(cpu_threads(ctx, 2 * used * F))
  {
    int64_t lo, hi;
    cpu_share(used, 1, &lo, &hi);
    fwd(a->gate_up->data, a->y->data, a->y->dtype == FD_BF16, a->act, F, lo, hi);
  }
  return FD_OK;
}

CPU_INLINE void bwd_row(const void *restrict dy, const void *restrict gate, const void *restrict up, void *restrict dgate,
                        void *restrict dup, bool bf16, bool acc, enum fd_act act, int64_t F) {
  for (int64_t i = 0; i < F; i++) {
    float value, d = cpu_act_grad(act, cpu_load(gate, bf16, i), &value), g = cpu_load(dy, bf16, i);
    d = d * g * cpu_load(up, bf16, i);
    value *= g;
    if (acc) d += cpu_load(dgate, bf16, i), value += cpu_load(dup, bf16, i);
    cpu_store(dgate, bf16, i, d);
    cpu_store(dup, bf16, i, value);
  }
}

CPU_CLONES static void bwd(const void *dy, const void *gate_up, void *dgate_up, bool bf16, bool acc, enum fd_act act, int64_t F,
                           int64_t lo, int64_t hi) {
#define ROWS(T, bf16, act)                                                                              \
  for (int64_t r = lo; r < hi; r++) {                                                                   \
    const T *gate = (const T *)gate_up + 2 * F * r, *g = (const T *)dy + F * r;                         \
    T *dgate = (T *)dgate_up + 2 * F * r;                                                               \
    if (acc) bwd_row(g, gate, gate + F, dgate, dgate + F, bf16, true, act, F);                          \
    else bwd_row(g, gate, gate + F, dgate, dgate + F, bf16, false, act, F);                             \
  }
  if (bf16) CPU_ACT_SWITCH(act, BF16)
  else CPU_ACT_SWITCH(act, F32)
#undef ROWS
}

fd_status cpu_geglu_bwd_prepare(fd_ctx *ctx, const struct fd_geglu_bwd_args *a, size_t *scratch_bytes) {
  (void)ctx, (void)scratch_bytes;
  int64_t R = fd_tensor_rows(a->gate_up), F = fd_tensor_cols(a->gate_up) / 2;
  CPU_CHECK(geglu_bwd, gate_up, a->gate_up->ndim >= 1 && fd_tensor_cols(a->gate_up) % 2 == 0, "[R, 2F]");
  CPU_CHECK(geglu_bwd, dy, fd_tensor_rows(a->dy) == R && fd_tensor_cols(a->dy) == F, "[%lld, %lld]", (long long)R, (long long)F);
  CPU_CHECK(geglu_bwd, dgate_up, cpu_same_shape(a->dgate_up, a->gate_up), "the shape of gate_up");
  CPU_CHECK_ACT(geglu_bwd);
  return FD_OK;
}

fd_status cpu_geglu_bwd(fd_ctx *ctx, const struct fd_geglu_bwd_args *a) {
  const int64_t F = fd_tensor_cols(a->dy);
  int64_t used;
  fd_status st = cpu_rows_used(FD_OP_geglu_bwd, a->count, fd_tensor_rows(a->dy), &used);
  if (st != FD_OK) return st;
  #pragma omp parallel num_threads(cpu_threads(ctx, 4 * used * F))
  {
    int64_t lo, hi;
    cpu_share(used, 1, &lo, &hi);
    bwd(a->dy->data, a->gate_up->data, a->dgate_up->data, a->dy->dtype == FD_BF16, a->acc >> 3 & 1, a->act, F, lo, hi);
  }
  return FD_OK;
}
