// SPDX-License-Identifier: Apache-2.0
// Vectorised normal numbers equal the scalar stream, also where a radius nearly vanishes; their moments are right.
#include "optest.h"

static void equal(struct ot *t, int64_t B, int64_t n, uint32_t purpose) {
  ot_reset(t);
  ot_what(t, "randn B %d n %d purpose %u", (int)B, (int)n, purpose);
  fd_tensor *keys = OT_NEW(t, FD_U32, B, 4), *y = OT_NEW(t, FD_F32, B, n);
  for (int64_t b = 0; b < B; b++) {
    uint64_t seed = 0x123456789abcdefull * (uint64_t)(b + 1), sample = 0xfedcba9876543210ull + (uint64_t)b;
    ot_set(keys, 4 * b, (double)(uint32_t)seed), ot_set(keys, 4 * b + 1, (double)(uint32_t)(seed >> 32));
    ot_set(keys, 4 * b + 2, (double)(uint32_t)sample), ot_set(keys, 4 * b + 3, (double)(uint32_t)(sample >> 32));
  }
  OT_RUN(t, randn, .keys = keys, .y = y, .purpose = purpose);
  double worst = 0, sum = 0, sum2 = 0;
  for (int64_t b = 0; b < B; b++) {
    const uint32_t *k = (const uint32_t *)keys->data + 4 * b;
    for (int64_t i = 0; i < n; i += 4) {
      float z[4];
      fd_rng_normal4(k[0] | (uint64_t)k[1] << 32, purpose, k[2] | (uint64_t)k[3] << 32, (uint32_t)(i / 4), z);
      for (int64_t j = i; j < n && j < i + 4; j++) {
        double v = ot_get(y, b * n + j), off = fabs(v - (double)z[j - i]);
        if (!(off <= worst)) worst = isnan(off) ? INFINITY : off;
        sum += v, sum2 += v * v;
      }
    }
  }
  OT_CHECK(t, worst <= 1e-6);
  double count = (double)(B * n);
  if (count > 1e5) {
    printf("largest difference %.2g of %g numbers, mean %.4f, variance %.4f\n", worst, count, sum / count, sum2 / count);
    OT_CHECK(t, fabs(sum / count) < 5 / sqrt(count) && fabs(sum2 / count - 1) < 8 / sqrt(count));
  }
}

static void body(struct ot *t) {
  equal(t, 2, 1, FD_RNG_NOISE);
  equal(t, 3, 37, FD_RNG_POSTERIOR);
  equal(t, 2, 128, FD_RNG_NOISE);
  equal(t, 0, 5, FD_RNG_NOISE);
  equal(t, 2, 0, FD_RNG_NOISE);
  equal(t, 4, 500001, FD_RNG_SAMPLE);
  ot_reset(t);
  ot_what(t, "misuse");
  fd_tensor *keys = OT_NEW(t, FD_U32, 2, 4), *k3 = OT_NEW(t, FD_U32, 2, 3), *y = OT_NEW(t, FD_F32, 2, 5), *yb = OT_NEW(t, FD_BF16, 2, 5);
  OT_MISUSE(t, "keys is u32 [2, 3]", randn, .keys = k3, .y = y);
  OT_MISUSE(t, "keys is f32", randn, .keys = y, .y = y);
  OT_MISUSE(t, "y is bf16", randn, .keys = keys, .y = yb);
  OT_MISUSE(t, "y is missing", randn, .keys = keys);
}

int main(void) { return ot_main_same_bits(body); }
