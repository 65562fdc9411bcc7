// SPDX-License-Identifier: Apache-2.0
// Nearest neighbour, twice as large, and its gradient: the sum of four.
#include "cpu/cpu.h"
#include "cpu/vmath.h"

static fd_status check(enum fd_op op, const char *small_slot, const fd_tensor *small, const char *large_slot, const fd_tensor *large) {
  if (small->ndim != 4) return fd_op_wrong_slot(op, small_slot, small, "[B, H, W, C]");
  if (large->ndim != 4 || large->shape[0] != small->shape[0] || large->shape[1] != 2 * small->shape[1] ||
      large->shape[2] != 2 * small->shape[2] || large->shape[3] != small->shape[3])
    return fd_op_wrong_slot(op, large_slot, large, "[B, 2H, 2W, C]");
  return FD_OK;
}

fd_status cpu_upsample2x_fwd_prepare(fd_ctx *ctx, const struct fd_upsample2x_fwd_args *a, size_t *scratch_bytes) {
  (void)ctx, (void)scratch_bytes;
  return check(FD_OP_upsample2x_fwd, "x", a->x, "y", a->y);
}

fd_status cpu_upsample2x_fwd(fd_ctx *ctx, const struct fd_upsample2x_fwd_args *a) {
  const int64_t rows = a->x->shape[0] * a->x->shape[1], W = a->x->shape[2];
  const size_t pixel = (size_t)a->x->shape[3] * fd_dtype_bytes(a->x->dtype), row = 2 * (size_t)W * pixel;
  #pragma omp parallel num_threads(cpu_threads(ctx, fd_tensor_numel(a->y)))
  {
    int64_t lo, hi;
    cpu_share(rows, 1, &lo, &hi);
    for (int64_t r = lo; r < hi; r++) {
      const char *x = (const char *)a->x->data + (size_t)(r * W) * pixel;
      char *y = (char *)a->y->data + 2 * (size_t)r * row;
      for (int64_t w = 0; w < W; w++) {
        memcpy(y + 2 * (size_t)w * pixel, x + (size_t)w * pixel, pixel);
        memcpy(y + (2 * (size_t)w + 1) * pixel, x + (size_t)w * pixel, pixel);
      }
      memcpy(y + row, y, row);
    }
  }
  return FD_OK;
}

CPU_INLINE void bwd_row(const void *restrict dy, void *restrict dx, bool bf16, bool acc, int64_t W, int64_t C) {
  for (int64_t w = 0; w < W; w++)
    for (int64_t c = 0; c < C; c++) {
      const int64_t i = 2 * w * C + c, below = i + 2 * W * C;
      float d = (cpu_load(dy, bf16, i) + cpu_load(dy, bf16, i + C)) + (cpu_load(dy, bf16, below) + cpu_load(dy, bf16, below + C));
      cpu_store(dx, bf16, w * C + c, acc ? cpu_load(dx, bf16, w * C + c) + d : d);
    }
}

CPU_CLONES static void bwd(const void *dy, void *dx, bool bf16, bool acc, int64_t W, int64_t C, int64_t lo, int64_t hi) {
  for (int64_t r = lo; r < hi; r++) {
    if (bf16) bwd_row((const fd_bf16 *)dy + 4 * r * W * C, (fd_bf16 *)dx + r * W * C, true, acc, W, C);
    else bwd_row((const float *)dy + 4 * r * W * C, (float *)dx + r * W * C, false, acc, W, C);
  }
}

fd_status cpu_upsample2x_bwd_prepare(fd_ctx *ctx, const struct fd_upsample2x_bwd_args *a, size_t *scratch_bytes) {
  (void)ctx, (void)scratch_bytes;
  return check(FD_OP_upsample2x_bwd, "dx", a->dx, "dy", a->dy);
}

fd_status cpu_upsample2x_bwd(fd_ctx *ctx, const struct fd_upsample2x_bwd_args *a) {
  const int64_t rows = a->dx->shape[0] * a->dx->shape[1];
  #pragma omp parallel num_threads(cpu_threads(ctx, fd_tensor_numel(a->dy)))
  {
    int64_t lo, hi;
    cpu_share(rows, 1, &lo, &hi);
    bwd(a->dy->data, a->dx->data, a->dx->dtype == FD_BF16, a->acc >> 1 & 1, a->dx->shape[2], a->dx->shape[3], lo, hi);
  }
  return FD_OK;
}
