// SPDX-License-Identifier: Apache-2.0
// Activation functions over rows. Bound by the exponential, not by memory.
#include "cpu/act.h"

#include "cpu/cpu.h"

CPU_CLONES static void fwd(const void *x, void *y, bool bf16, enum fd_act act, int64_t lo, int64_t hi) {
#define LOOP(bf16, act)     \
  CPU_IVDEP for (int64_t i = lo; i < hi; i++) cpu_store(y, bf16, i, cpu_act(act, cpu_load(x, bf16, i)))
#define F32(act) LOOP(false, act)
#define BF16(act) LOOP(true, act)
  if (bf16) CPU_ACT_SWITCH(act, BF16)
  else CPU_ACT_SWITCH(act, F32)
#undef LOOP
}

fd_status cpu_act_fwd_prepare(fd_ctx *ctx, const struct fd_act_fwd_args *a, size_t *scratch_bytes) {
  (void)ctx, (void)scratch_bytes;
  CPU_CHECK(act_fwd, y, cpu_same_shape(a->y, a->x), "the shape of x");
  CPU_CHECK_ACT(act_fwd);
  return FD_OK;
}

fd_status cpu_act_fwd(fd_ctx *ctx, const struct fd_act_fwd_args *a) {
  int64_t used;
  fd_status st = cpu_rows_used(FD_OP_act_fwd, a->count, fd_tensor_rows(a->x), &used);
  if (st != FD_OK) return st;
  used *= fd_tensor_cols(a->x);
  #pragma omp parallel num_threads(cpu_threads(ctx, used))
  {
    int64_t lo, hi;
    cpu_share(used, 64, &lo, &hi);
    fwd(a->x->data, a->y->data, a->x->dtype == FD_BF16, a->act, lo, hi);
  }
  return FD_OK;
}

/* bf16, acc and act are constants where this is inlined. */
CPU_INLINE void bwd_loop(const void *dy, const void *x, void *dx, bool bf16, bool acc, enum fd_act act, int64_t lo, int64_t hi) {
  CPU_IVDEP
  for (int64_t i = lo; i < hi; i++) {
    float value, d = cpu_act_grad(act, cpu_load(x, bf16, i), &value);
    d *= cpu_load(dy, bf16, i);
    if (acc) d += cpu_load(dx, bf16, i);
    cpu_store(dx, bf16, i, d);
  }
}

CPU_CLONES static void bwd(const void *dy, const void *x, void *dx, bool bf16, bool acc, enum fd_act act, int64_t lo, int64_t hi) {
#define LOOP(bf16, act)                                      \
  do {                                                       \
    if (acc) bwd_loop(dy, x, dx, bf16, true, act, lo, hi);   \
    else bwd_loop(dy, x, dx, bf16, false, act, lo, hi);      \
  } while (0)
  if (bf16) CPU_ACT_SWITCH(act, BF16)
  else CPU_ACT_SWITCH(act, F32)
#undef LOOP
}

fd_status cpu_act_bwd_prepare(fd_ctx *ctx, const struct fd_act_bwd_args *a, size_t *scratch_bytes) {
  (void)ctx, (void)scratch_bytes;
  CPU_CHECK(act_bwd, x, cpu_same_shape(a->x, a->dy), "the shape of dy");
  CPU_CHECK(act_bwd, dx, cpu_same_shape(a->dx, a->dy), "the shape of dy");
  CPU_CHECK_ACT(act_bwd);
  return FD_OK;
}

fd_status cpu_act_bwd(fd_ctx *ctx, const struct fd_act_bwd_args *a) {
  int64_t used;
  fd_status st = cpu_rows_used(FD_OP_act_bwd, a->count, fd_tensor_rows(a->x), &used);
  if (st != FD_OK) return st;
  used *= fd_tensor_cols(a->x);
  #pragma omp parallel num_threads(cpu_threads(ctx, used))
  {
    int64_t lo, hi;
    cpu_share(used, 64, &lo, &hi);
    bwd(a->dy->data, a->x->data, a->dx->data, a->x->dtype == FD_BF16, a->acc >> 3 & 1, a->act, lo, hi);
  }
  return FD_OK;
}
