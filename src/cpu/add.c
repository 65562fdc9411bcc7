// SPDX-License-Identifier: Apache-2.0
// z = x + y, y repeated along the leading dimensions of x.
#include "cpu/cpu.h"
#include "cpu/vmath.h"

CPU_CLONES static void run(const void *x, bool bf16, const void *y, bool y_bf16, void *z, int64_t n, int64_t at, int64_t at_y) {
#define LOOP(bf16, y_bf16) \
  CPU_IVDEP for (int64_t i = 0; i < n; i++) \
    cpu_store(z, bf16, at + i, cpu_load(x, bf16, at + i) + cpu_load(y, y_bf16, at_y + i))
  if (bf16 && y_bf16) LOOP(true, true);
  else if (bf16) LOOP(true, false);
  else if (y_bf16) LOOP(false, true);
  else LOOP(false, false);
#undef LOOP
}

fd_status cpu_add_fwd_prepare(fd_ctx *ctx, const struct fd_add_fwd_args *a, size_t *scratch_bytes) {
  (void)ctx, (void)scratch_bytes;
  int64_t nx = fd_tensor_numel(a->x), ny = fd_tensor_numel(a->y);
  CPU_CHECK(add_fwd, y, ny > 0 ? nx % ny == 0 : nx == 0, "a number of elements that divides x's %lld", (long long)nx);
  CPU_CHECK(add_fwd, z, cpu_same_shape(a->z, a->x), "the shape of x");
  return FD_OK;
}

fd_status cpu_add_fwd(fd_ctx *ctx, const struct fd_add_fwd_args *a) {
  const int64_t ny = fd_tensor_numel(a->y);
  int64_t used;
  fd_status st = cpu_rows_used(FD_OP_add_fwd, a->count, fd_tensor_rows(a->x), &used);
  if (st != FD_OK) return st;
  used *= fd_tensor_cols(a->x);
  #pragma omp parallel num_threads(cpu_threads(ctx, used))
  {
    int64_t lo, hi;
    cpu_share(used, 64, &lo, &hi);
    while (lo < hi) {
      int64_t at_y = lo % ny, n = ny - at_y < hi - lo ? ny - at_y : hi - lo;
      run(a->x->data, a->x->dtype == FD_BF16, a->y->data, a->y->dtype == FD_BF16, a->z->data, n, lo, at_y);
      lo += n;
    }
  }
  return FD_OK;
}
