// SPDX-License-Identifier: Apache-2.0
// Elementary functions as inline code without branches, so that loops over them become vector code at each level of
// CPU_CLONES. Relative errors (measured by tests/test_vmath.c) stay below 2 ulp. NaN stays NaN, infinities are right.
//
// Multiply-adds are written as fma: the build forbids the compiler to form them on its own (images must round as PyTorch
// does). A CPU without FMA (older than 2013) calls libm's, which is right and slow.
#ifndef FD_CPU_VMATH_H
#define FD_CPU_VMATH_H

#include <stdbool.h>

#include "base/dtype.h"

/* Before a function whose loops should be compiled per CPU level. Loops of an OpenMP region are in a function of the
 * compiler's own that is not cloned: call a cloned function from there. To test a lower level on a newer CPU:
 * make CPPFLAGS=-DCPU_ONLY_V3 (AVX2), make CPPFLAGS=-DCPU_ONLY_BASE (SSE2). */
#if defined CPU_ONLY_V3
#define CPU_CLONES __attribute__((target("arch=x86-64-v3")))
#elif defined CPU_ONLY_BASE || !defined __x86_64__ || !defined __GNUC__ || defined __clang__
#define CPU_CLONES
#else
#define CPU_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#endif

/* Before a loop whose iterations do not depend on each other, though an output may be the same memory as an input. */
#ifdef __clang__
#define CPU_IVDEP _Pragma("clang loop vectorize(assume_safety)")
#else
#define CPU_IVDEP _Pragma("GCC ivdep")
#endif

#define CPU_INLINE static inline __attribute__((always_inline, unused))

CPU_INLINE float cpu_fma(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
CPU_INLINE uint32_t cpu_bits(float x) {
  uint32_t u;
  memcpy(&u, &x, sizeof u);
  return u;
}
CPU_INLINE float cpu_from_bits(uint32_t u) {
  float x;
  memcpy(&x, &u, sizeof x);
  return x;
}

/* ---- loads and stores of either type; `bf16` is a constant where these are inlined ------------------------------- */

CPU_INLINE float cpu_load(const void *p, bool bf16, int64_t i) {
  return bf16 ? cpu_from_bits((uint32_t)((const fd_bf16 *)p)[i] << 16) : ((const float *)p)[i];
}
/** Rounds to nearest even; NaN stays NaN. */
CPU_INLINE fd_bf16 cpu_to_bf16(float x) {
  uint32_t u = cpu_bits(x);
  uint32_t rounded = u + 0x7fffu + (u >> 16 & 1u), nan = u | 0x400000u;
  /* all ones for a NaN: integer arithmetic, since a select would be narrowed to 16 bits twice */
  uint32_t is_nan = (uint32_t)((int32_t)(0x7f800000u - (u & 0x7fffffffu)) >> 31);
  return (fd_bf16)(((rounded & ~is_nan) | (nan & is_nan)) >> 16);
}
CPU_INLINE void cpu_store(void *p, bool bf16, int64_t i, float x) {
  if (bf16) ((fd_bf16 *)p)[i] = cpu_to_bf16(x);
  else ((float *)p)[i] = x;
}

/* ---- functions --------------------------------------------------------------------------------------------------- */

/* The nearest integer to x for |x| < 2^22, as float and as integer, without a conversion instruction. */
#define CPU_ROUND_MAGIC 12582912.0f /* 1.5 * 2^23 */

/** 2^n for -252 <= n <= 254, in two factors so that results may be subnormal. */
CPU_INLINE float cpu_scale2(float x, int32_t n) {
  int32_t half = n >> 1;
  return x * cpu_from_bits((uint32_t)(half + 127) << 23) * cpu_from_bits((uint32_t)(n - half + 127) << 23);
}

/* exp(r) - 1 for |r| <= ln 2 / 2: r + r^2 q(r), Cephes, relative error 1e-8. */
CPU_INLINE float cpu_expm1_core(float r) {
  float q = 1.9875691500e-4f;
  q = cpu_fma(q, r, 1.3981999507e-3f);
  q = cpu_fma(q, r, 8.3334519073e-3f);
  q = cpu_fma(q, r, 4.1665795894e-2f);
  q = cpu_fma(q, r, 1.6666665459e-1f);
  q = cpu_fma(q, r, 5.0000001201e-1f);
  return cpu_fma(q, r * r, r);
}

/** e^x; overflows to infinity above 88.72, subnormal below -87.3, 0 below -103.97. */
CPU_INLINE float cpu_expf(float x) {
  x = x > 89.0f ? 89.0f : x; /* a NaN compares false and stays */
  x = x < -104.0f ? -104.0f : x;
  float t = cpu_fma(x, 1.44269504f, CPU_ROUND_MAGIC);
  float n = t - CPU_ROUND_MAGIC;
  float r = cpu_fma(n, -6.93145752e-1f, x); /* ln 2 in two parts */
  r = cpu_fma(n, -1.42860677e-6f, r);
  return cpu_scale2(cpu_expm1_core(r) + 1.0f, (int32_t)(cpu_bits(t) - 0x4b400000u));
}

/** e^x for -87 <= x <= 88 (the caller's promise; beyond them the result is that of the bound): one multiply less. */
CPU_INLINE float cpu_expf_bounded(float x) {
  x = x > 88.0f ? 88.0f : x;
  x = x < -87.0f ? -87.0f : x;
  float t = cpu_fma(x, 1.44269504f, CPU_ROUND_MAGIC);
  float n = t - CPU_ROUND_MAGIC;
  float r = cpu_fma(n, -6.93145752e-1f, x);
  r = cpu_fma(n, -1.42860677e-6f, r);
  return (cpu_expm1_core(r) + 1.0f) * cpu_from_bits((cpu_bits(t) - 0x4b400000u + 127u) << 23);
}

/** tanh x = e / (e + 2), e = exp(2 |x|) - 1: no cancellation near 0. */
CPU_INLINE float cpu_tanhf(float x) {
  float a = cpu_from_bits(cpu_bits(x) & 0x7fffffffu) * 2.0f;
  a = a > 20.0f ? 20.0f : a;
  float t = cpu_fma(a, 1.44269504f, CPU_ROUND_MAGIC);
  float n = t - CPU_ROUND_MAGIC;
  float r = cpu_fma(n, -6.93145752e-1f, a);
  r = cpu_fma(n, -1.42860677e-6f, r);
  float scale = cpu_from_bits((cpu_bits(t) - 0x4b400000u + 127u) << 23);
  float e = cpu_fma(cpu_expm1_core(r), scale, scale - 1.0f);
  float y = e / (e + 2.0f);
  return cpu_from_bits(cpu_bits(y) | (cpu_bits(x) & 0x80000000u));
}

/* ln((1 + m) 2^e) for 1 + m in sqrt(1/2) .. sqrt(2); Cephes, relative error 1e-8. */
CPU_INLINE float cpu_log_core(float m, float e) {
  float p = 7.0376836292e-2f;
  p = cpu_fma(p, m, -1.1514610310e-1f);
  p = cpu_fma(p, m, 1.1676998740e-1f);
  p = cpu_fma(p, m, -1.2420140846e-1f);
  p = cpu_fma(p, m, 1.4249322787e-1f);
  p = cpu_fma(p, m, -1.6668057665e-1f);
  p = cpu_fma(p, m, 2.0000714765e-1f);
  p = cpu_fma(p, m, -2.4999993993e-1f);
  p = cpu_fma(p, m, 3.3333331174e-1f);
  float z = m * m;
  float r = cpu_fma(m * z, p, e * -2.12194440e-4f); /* ln 2 in two parts */
  r = cpu_fma(z, -0.5f, r) + m;
  return cpu_fma(e, 0.693359375f, r);
}

#define CPU_SQRT_HALF_BITS 0x3f3504f3u

/** ln x; x < 0 gives NaN, 0 gives -infinity, infinity itself. Subnormals too. */
CPU_INLINE float cpu_logf(float x) {
  bool tiny = x < 1.17549435e-38f;
  uint32_t k = cpu_bits(x * (tiny ? 8388608.0f : 1.0f)) - CPU_SQRT_HALF_BITS;
  float e = (float)((int32_t)k >> 23) - (tiny ? 23.0f : 0.0f);
  float r = cpu_log_core(cpu_from_bits((k & 0x7fffffu) + CPU_SQRT_HALF_BITS) - 1.0f, e);
  r = x == 0.0f ? -__builtin_inff() : r;
  r = x < 0.0f ? __builtin_nanf("") : r;
  r = ((x > 3.40282347e38f) | (x != x)) ? x : r;
  return r;
}

/* Sine and cosine of r + q pi/2, |r| <= pi/4; Cephes. */
CPU_INLINE void cpu_sincos_core(float r, uint32_t q, float *sine, float *cosine) {
  float z = r * r;
  float s = cpu_fma(z, -1.9515295891e-4f, 8.3321608736e-3f);
  s = cpu_fma(s, z, -1.6666654611e-1f);
  s = cpu_fma(s * z, r, r);
  float c = cpu_fma(z, 2.443315711809948e-5f, -1.388731625493765e-3f);
  c = cpu_fma(c, z, 4.166664568298827e-2f);
  c = cpu_fma(c * z, z, cpu_fma(z, -0.5f, 1.0f));
  uint32_t swap = 0u - (q & 1u);
  uint32_t us = (cpu_bits(c) & swap) | (cpu_bits(s) & ~swap), uc = (cpu_bits(s) & swap) | (cpu_bits(c) & ~swap);
  *sine = cpu_from_bits(us ^ (q & 2u) << 30);
  *cosine = cpu_from_bits(uc ^ ((q + 1u) & 2u) << 30);
}

/** Sine and cosine for |x| <= 8192, absolute error below 1e-7 (the angle is taken as exact). Beyond: not meant. */
CPU_INLINE void cpu_sincosf(float x, float *sine, float *cosine) {
  float t = cpu_fma(x, 0.636619772f, CPU_ROUND_MAGIC);
  float n = t - CPU_ROUND_MAGIC;
  float r = cpu_fma(n, -1.5703125f, x); /* pi / 2 in three parts: the first two products are exact */
  r = cpu_fma(n, -4.837512969970703125e-4f, r);
  r = cpu_fma(n, -7.5497899548918821e-8f, r);
  cpu_sincos_core(r, cpu_bits(t), sine, cosine);
}

/** The error function: a polynomial below 0.93, 1 - exp(polynomial) above (both of about 1 ulp). */
CPU_INLINE float cpu_erff(float x) {
  float t = cpu_from_bits(cpu_bits(x) & 0x7fffffffu);
  t = t > 4.0f ? 4.0f : t; /* erf(4) is 1 in fp32 */
  float s = t * t;
  float r = cpu_fma(-1.72853470e-5f, t, 3.83197126e-4f);
  float u = cpu_fma(-3.88396438e-3f, t, 2.42546219e-2f);
  r = cpu_fma(r, s, u);
  r = cpu_fma(r, t, -1.06777877e-1f);
  r = cpu_fma(r, t, -6.34846687e-1f);
  r = cpu_fma(r, t, -1.28717512e-1f);
  r = cpu_fma(r, t, -t);
  float far = 1.0f - cpu_expf_bounded(r);
  float p = -5.96761703e-4f;
  p = cpu_fma(p, s, 4.99119423e-3f);
  p = cpu_fma(p, s, -2.67681349e-2f);
  p = cpu_fma(p, s, 1.12819925e-1f);
  p = cpu_fma(p, s, -3.76125336e-1f);
  p = cpu_fma(p, s, 1.28379166e-1f);
  float near = cpu_fma(p, t, t);
  float y = t > 0.927734375f ? far : near;
  return cpu_from_bits(cpu_bits(y) | (cpu_bits(x) & 0x80000000u));
}

/* ---- sums -------------------------------------------------------------------------------------------------------- */

/* A sum over a row is formed in this many lanes, element i in lane i mod CPU_LANES, whatever the CPU's vectors are:
 * the order of additions, and so the result, is the same at every level. */
enum { CPU_LANES = 32 };

typedef float cpu_v4 __attribute__((vector_size(16), aligned(4), may_alias));
typedef float cpu_v8 __attribute__((vector_size(32), aligned(4), may_alias));

/** Lane l + lane l + 16, then + 8, + 4, + 2, + 1: halves are added to halves. Written with GCC's vector types, since a loop goes
 *  through memory five times. */
CPU_INLINE float cpu_lanes_sum(const float *lane) {
  const cpu_v8 *v = (const cpu_v8 *)lane;
  cpu_v8 e = (v[0] + v[2]) + (v[1] + v[3]);
  cpu_v4 f = __builtin_shufflevector(e, e, 0, 1, 2, 3) + __builtin_shufflevector(e, e, 4, 5, 6, 7);
  f = f + __builtin_shufflevector(f, f, 2, 3, 2, 3);
  return f[0] + f[1];
}

/** lane[] += EXPR for i = 0 .. n-1, EXPR an expression in `i`. */
#define CPU_LANES_ADD(lane, n, EXPR)                                                \
  do {                                                                              \
    int64_t lanes_at = 0;                                                           \
    for (; lanes_at + CPU_LANES <= (n); lanes_at += CPU_LANES)                      \
      for (int lanes_l = 0; lanes_l < CPU_LANES; lanes_l++) {                       \
        const int64_t i = lanes_at + lanes_l;                                       \
        (lane)[lanes_l] += (EXPR);                                                  \
      }                                                                             \
    for (int lanes_l = 0; lanes_at + lanes_l < (n); lanes_l++) {                    \
      const int64_t i = lanes_at + lanes_l;                                         \
      (lane)[lanes_l] += (EXPR);                                                    \
    }                                                                               \
  } while (0)

/** 1 / (1 + e^-x). */
CPU_INLINE float cpu_sigmoidf(float x) { return 1.0f / (1.0f + cpu_expf_bounded(-x)); }

#endif
