// SPDX-License-Identifier: Apache-2.0
// Bytes to -1 .. 1. A division, a subtraction and a division, each rounded: the bits of torchvision.
#include "cpu/cpu.h"
#include "cpu/vmath.h"

CPU_CLONES static void run(const uint8_t *restrict bytes, void *restrict y, bool bf16, int64_t lo, int64_t hi) {
#define PIXEL(i) (((float)bytes[i] / 255.0f - 0.5f) / 0.5f)
  if (bf16) for (int64_t i = lo; i < hi; i++) cpu_store(y, true, i, PIXEL(i));
  else for (int64_t i = lo; i < hi; i++) cpu_store(y, false, i, PIXEL(i));
#undef PIXEL
}

fd_status cpu_pixels_fwd_prepare(fd_ctx *ctx, const struct fd_pixels_fwd_args *a, size_t *scratch_bytes) {
  (void)ctx, (void)scratch_bytes;
  CPU_CHECK(pixels_fwd, y, fd_tensor_numel(a->y) == fd_tensor_numel(a->bytes), "%lld elements", (long long)fd_tensor_numel(a->bytes));
  return FD_OK;
}

fd_status cpu_pixels_fwd(fd_ctx *ctx, const struct fd_pixels_fwd_args *a) {
  const int64_t n = fd_tensor_numel(a->y);
  #pragma omp parallel num_threads(cpu_threads(ctx, n))
  {
    int64_t lo, hi;
    cpu_share(n, 64, &lo, &hi);
    run(a->bytes->data, a->y->data, a->y->dtype == FD_BF16, lo, hi);
  }
  return FD_OK;
}
