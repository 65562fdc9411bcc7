// SPDX-License-Identifier: Apache-2.0
// y = (x - sub) mul per channel, and its inverse x / mul + sub. Each operation is rounded on its own, as the original's.
#include "cpu/cpu.h"
#include "cpu/vmath.h"

CPU_INLINE void loop(const void *x, bool x_bf16, const float *sub, const float *mul, void *y, bool y_bf16, bool inverse, int64_t C, int64_t lo,
                     int64_t hi) {
  for (int64_t r = lo; r < hi; r++)
    CPU_IVDEP for (int64_t c = 0; c < C; c++) {
      const float v = cpu_load(x, x_bf16, r * C + c);
      cpu_store(y, y_bf16, r * C + c, inverse ? v / mul[c] + sub[c] : (v - sub[c]) * mul[c]);
    }
}

CPU_CLONES static void run(const void *x, bool x_bf16, const float *sub, const float *mul, void *y, bool y_bf16, bool inverse, int64_t C,
                           int64_t lo, int64_t hi) {
  if (x_bf16 && y_bf16) loop(x, true, sub, mul, y, true, inverse, C, lo, hi);
  else if (x_bf16) loop(x, true, sub, mul, y, false, inverse, C, lo, hi);
  else if (y_bf16) loop(x, false, sub, mul, y, true, inverse, C, lo, hi);
  else loop(x, false, sub, mul, y, false, inverse, C, lo, hi);
}

fd_status cpu_channel_affine_prepare(fd_ctx *ctx, const struct fd_channel_affine_args *a, size_t *scratch_bytes) {
  (void)ctx, (void)scratch_bytes;
  const int64_t C = fd_tensor_cols(a->x);
  CPU_CHECK(channel_affine, sub, fd_tensor_numel(a->sub) == C, "[%lld]", (long long)C);
  CPU_CHECK(channel_affine, mul, fd_tensor_numel(a->mul) == C, "[%lld]", (long long)C);
  CPU_CHECK(channel_affine, y, fd_tensor_numel(a->y) == fd_tensor_numel(a->x), "%lld elements", (long long)fd_tensor_numel(a->x));
  return FD_OK;
}

fd_status cpu_channel_affine(fd_ctx *ctx, const struct fd_channel_affine_args *a) {
  const int64_t R = fd_tensor_rows(a->x), C = fd_tensor_cols(a->x);
  #pragma omp parallel num_threads(cpu_threads(ctx, R * C))
  {
    int64_t lo, hi;
    cpu_share(R, 1, &lo, &hi);
    run(a->x->data, a->x->dtype == FD_BF16, a->sub->data, a->mul->data, a->y->data, a->y->dtype == FD_BF16, a->inverse, C, lo, hi);
  }
  return FD_OK;
}
