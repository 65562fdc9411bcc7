// SPDX-License-Identifier: Apache-2.0
// Normal numbers: Philox4x32-10 and Box-Muller on BLOCKS counters at a time, in loops that become vector code.
// The scalar form is fd_rng_normal4 (base/rng.h), in double; this one is within 1e-6 of it.
#include "cpu/cpu.h"
#include "cpu/vmath.h"

enum { BLOCKS = 32 };

CPU_INLINE void philox(uint32_t *restrict c0, uint32_t *restrict c1, uint32_t *restrict c2, uint32_t *restrict c3, uint32_t k0, uint32_t k1) {
  for (int j = 0; j < BLOCKS; j++) {
    uint32_t a = c0[j], b = c1[j], c = c2[j], d = c3[j], key0 = k0, key1 = k1;
    #pragma GCC unroll 10
    for (int round = 0; round < 10; round++) {
      uint64_t p = (uint64_t)0xD2511F53u * a, q = (uint64_t)0xCD9E8D57u * c;
      a = (uint32_t)(q >> 32) ^ b ^ key0;
      b = (uint32_t)q;
      c = (uint32_t)(p >> 32) ^ d ^ key1;
      d = (uint32_t)p;
      key0 += 0x9E3779B9u, key1 += 0xBB67AE85u;
    }
    c0[j] = a, c1[j] = b, c2[j] = c, c3[j] = d;
  }
}

/* (cos, sin) of the angle 2 pi v 2^-32, times sqrt(-2 ln((u + 1) 2^-32)). Both are reduced as integers, so that neither a
 * radius near 0 nor an angle near a whole turn loses digits. */
CPU_INLINE void box_muller(uint32_t u, uint32_t v, float *x, float *y) {
  uint32_t t = u + 1u;
  float f = cpu_fma((float)(int32_t)(t >> 16), 65536.0f, (float)(int32_t)(t & 0xffffu)) * 0x1p-32f; /* rounded once */
  uint32_t k = cpu_bits(f) - CPU_SQRT_HALF_BITS;
  float e = (float)((int32_t)k >> 23), m = cpu_from_bits((k & 0x7fffffu) + CPU_SQRT_HALF_BITS) - 1.0f;
  bool near_one = u >= 0xB504F333u; /* above sqrt(1/2): ln(1 - w), w exact to 24 digits */
  m = near_one ? (float)(int32_t)(~u & 0x7fffffffu) * -0x1p-32f : m;
  e = near_one ? 0.0f : e;
  float radius = __builtin_sqrtf(-2.0f * cpu_log_core(m, e)), s, c;
  uint32_t q = (v + 0x20000000u) >> 30;
  cpu_sincos_core((float)(int32_t)(v - (q << 30)) * 1.46291807926715968e-9f /* 2 pi / 2^32 */, q, &s, &c);
  *x = radius * c;
  *y = radius * s;
}

/* Elements 4 block .. 4 (block + BLOCKS) - 1 of a sample. */
CPU_CLONES static void draw(const uint32_t *key, uint32_t purpose, uint32_t block, float *restrict out) {
  uint32_t c0[BLOCKS], c1[BLOCKS], c2[BLOCKS], c3[BLOCKS];
  for (int j = 0; j < BLOCKS; j++) c0[j] = block + (uint32_t)j, c1[j] = purpose, c2[j] = key[2], c3[j] = key[3];
  philox(c0, c1, c2, c3, key[0], key[1]);
  float x[4][BLOCKS];
  for (int j = 0; j < BLOCKS; j++) box_muller(c0[j], c1[j], &x[0][j], &x[1][j]);
  for (int j = 0; j < BLOCKS; j++) box_muller(c2[j], c3[j], &x[2][j], &x[3][j]);
  for (int j = 0; j < BLOCKS; j++)
    for (int i = 0; i < 4; i++) out[4 * j + i] = x[i][j];
}

fd_status cpu_randn_prepare(fd_ctx *ctx, const struct fd_randn_args *a, size_t *scratch_bytes) {
  (void)ctx, (void)scratch_bytes;
  CPU_CHECK(randn, y, a->y->ndim >= 1, "[B, ..]");
  const int64_t B = a->y->shape[0], n = B ? fd_tensor_numel(a->y) / B : 0;
  CPU_CHECK(randn, keys, a->keys->ndim == 2 && a->keys->shape[0] == B && a->keys->shape[1] == 4, "[%lld, 4]", (long long)B);
  CPU_CHECK(randn, y, n <= (int64_t)1 << 34, "at most 2^34 elements per sample (32 bits count blocks of four)");
  return FD_OK;
}

fd_status cpu_randn(fd_ctx *ctx, const struct fd_randn_args *a) {
  const int64_t B = a->y->shape[0], n = B ? fd_tensor_numel(a->y) / B : 0, batches = (n + 4 * BLOCKS - 1) / (4 * BLOCKS);
  #pragma omp parallel num_threads(cpu_threads(ctx, 4 * B * n))
  {
    int64_t lo, hi;
    cpu_share(B * batches, 1, &lo, &hi);
    for (int64_t p = lo; p < hi; p++) {
      int64_t b = p / batches, at = p % batches * 4 * BLOCKS;
      float *y = (float *)a->y->data + b * n + at, rest[4 * BLOCKS];
      bool whole = n - at >= 4 * BLOCKS;
      draw((const uint32_t *)a->keys->data + 4 * b, a->purpose, (uint32_t)(at / 4), whole ? y : rest);
      if (!whole) memcpy(y, rest, sizeof(float) * (size_t)(n - at));
    }
  }
  return FD_OK;
}
