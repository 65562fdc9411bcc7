// SPDX-License-Identifier: Apache-2.0
// Conversions that are no hot path: files, tests, host copies.
#include "base/dtype.h"

const char *fd_dtype_name(fd_dtype t) {
  static const char *const names[FD_DTYPE_COUNT] = {"f32", "bf16", "f16", "f64", "i32", "i64", "u8", "u32"};
  return (unsigned)t < FD_DTYPE_COUNT ? names[t] : "?";
}

float fd_f16_to_f32(fd_f16 h) {
  uint32_t sign = (uint32_t)(h & 0x8000u) << 16;
  uint32_t exponent = (h >> 10) & 31u, mantissa = h & 1023u, u;
  float f;
  if (exponent == 0) {
    f = (float)mantissa * 0x1p-24f; /* zero or subnormal: exact */
    memcpy(&u, &f, sizeof u);
    u |= sign;
  } else {
    u = sign | (exponent == 31 ? 0x7f800000u : (exponent + 112) << 23) | mantissa << 13;
  }
  memcpy(&f, &u, sizeof f);
  return f;
}

static double load(const void *p, fd_dtype t, int64_t i) {
  switch (t) {
    case FD_F32: return ((const float *)p)[i];
    case FD_BF16: return fd_bf16_to_f32(((const fd_bf16 *)p)[i]);
    case FD_F16: return fd_f16_to_f32(((const fd_f16 *)p)[i]);
    default: return ((const double *)p)[i];
  }
}

int fd_convert(void *dst, fd_dtype dst_type, const void *src, fd_dtype src_type, int64_t n) {
  if (src_type > FD_F64 || dst_type > FD_F64 || dst_type == FD_F16) return -1;
  if (dst_type == src_type) {
    memcpy(dst, src, (size_t)n * fd_dtype_bytes(src_type));
    return 0;
  }
  for (int64_t i = 0; i < n; i++) {
    double x = load(src, src_type, i);
    switch (dst_type) {
      case FD_F32: ((float *)dst)[i] = (float)x; break;
      case FD_BF16: ((fd_bf16 *)dst)[i] = fd_f32_to_bf16((float)x); break;
      default: ((double *)dst)[i] = x; break;
    }
  }
  return 0;
}
