// SPDX-License-Identifier: Apache-2.0
// Conversion between f32 and bf16, with repetition along a new leading dimension; and fill.
#include "cpu/cpu.h"
#include "cpu/vmath.h"

CPU_CLONES static void convert(const void *x, bool x_bf16, void *y, bool y_bf16, bool acc, int64_t n, int64_t at_x, int64_t at_y) {
#define LOOP(x_bf16, y_bf16) \
  CPU_IVDEP for (int64_t i = 0; i < n; i++) { \
    float v = cpu_load(x, x_bf16, at_x + i); \
    cpu_store(y, y_bf16, at_y + i, acc ? cpu_load(y, y_bf16, at_y + i) + v : v); \
  }
  if (x_bf16 == y_bf16 && !acc) {
    const size_t each = x_bf16 ? sizeof(fd_bf16) : sizeof(float);
    memmove((char *)y + (size_t)at_y * each, (const char *)x + (size_t)at_x * each, (size_t)n * each);
  } else if (x_bf16 && y_bf16) LOOP(true, true)
  else if (x_bf16) LOOP(true, false)
  else if (y_bf16) LOOP(false, true)
  else LOOP(false, false)
#undef LOOP
}

fd_status cpu_cast_prepare(fd_ctx *ctx, const struct fd_cast_args *a, size_t *scratch_bytes) {
  (void)ctx, (void)scratch_bytes;
  int64_t nx = fd_tensor_numel(a->x), ny = fd_tensor_numel(a->y);
  CPU_CHECK(cast, y, nx > 0 ? ny % nx == 0 : ny == 0, "a multiple of x's %lld elements", (long long)nx);
  return FD_OK;
}

fd_status cpu_cast(fd_ctx *ctx, const struct fd_cast_args *a) {
  const int64_t nx = fd_tensor_numel(a->x), ny = fd_tensor_numel(a->y);
  #pragma omp parallel num_threads(cpu_threads(ctx, ny))
  {
    int64_t lo, hi;
    cpu_share(ny, 64, &lo, &hi);
    while (lo < hi) {
      int64_t at = lo % nx, n = nx - at < hi - lo ? nx - at : hi - lo;
      convert(a->x->data, a->x->dtype == FD_BF16, a->y->data, a->y->dtype == FD_BF16, a->acc >> 1 & 1, n, at, lo);
      lo += n;
    }
  }
  return FD_OK;
}

fd_status cpu_fill_prepare(fd_ctx *ctx, const struct fd_fill_args *a, size_t *scratch_bytes) {
  (void)ctx, (void)a, (void)scratch_bytes;
  return FD_OK;
}

fd_status cpu_fill(fd_ctx *ctx, const struct fd_fill_args *a) {
  const int64_t n = fd_tensor_numel(a->y);
  #pragma omp parallel num_threads(cpu_threads(ctx, n))
  {
    int64_t lo, hi;
    cpu_share(n, 64, &lo, &hi);
    if (a->y->dtype == FD_F64)
      for (int64_t i = lo; i < hi; i++) ((double *)a->y->data)[i] = (double)a->value;
    else if (a->y->dtype == FD_BF16)
      for (int64_t i = lo; i < hi; i++) ((fd_bf16 *)a->y->data)[i] = cpu_to_bf16(a->value);
    else
      for (int64_t i = lo; i < hi; i++) ((float *)a->y->data)[i] = a->value;
  }
  return FD_OK;
}
