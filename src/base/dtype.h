// SPDX-License-Identifier: Apache-2.0
// Element types and their scalar conversions. bf16 rounds to nearest even and keeps NaN a NaN.
#ifndef FD_BASE_DTYPE_H
#define FD_BASE_DTYPE_H

#include <stddef.h>
#include <stdint.h>
#include <string.h>

typedef enum fd_dtype { FD_F32 = 0, FD_BF16, FD_F16, FD_F64, FD_I32, FD_I64, FD_U8, FD_U32, FD_DTYPE_COUNT } fd_dtype;

typedef uint16_t fd_bf16; /* the upper half of an fp32 */
typedef uint16_t fd_f16;  /* IEEE binary16 */

static inline size_t fd_dtype_bytes(fd_dtype t) {
  static const unsigned char bytes[FD_DTYPE_COUNT] = {4, 2, 2, 8, 4, 8, 1, 4};
  return bytes[t];
}

/** "f32", "bf16", ... */
const char *fd_dtype_name(fd_dtype t);

static inline float fd_bf16_to_f32(fd_bf16 h) {
  uint32_t u = (uint32_t)h << 16;
  float f;
  memcpy(&f, &u, sizeof f);
  return f;
}

static inline fd_bf16 fd_f32_to_bf16(float f) {
  uint32_t u;
  memcpy(&u, &f, sizeof u);
  uint32_t rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  uint32_t nan = (u >> 16) | 0x40u;
  return (fd_bf16)((u & 0x7fffffffu) > 0x7f800000u ? nan : rounded);
}

/** Subnormals, infinities and NaN included. */
float fd_f16_to_f32(fd_f16 h);

/** Convert n elements between any two of F32, BF16, F16, F64 (FD_F16 only as a source). Local.
 *  FD_ERR_ARG as a nonzero return if the pair is not supported. */
int fd_convert(void *dst, fd_dtype dst_type, const void *src, fd_dtype src_type, int64_t n);

#endif
