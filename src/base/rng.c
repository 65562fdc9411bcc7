// SPDX-License-Identifier: Apache-2.0
// Scalar forms of the random streams; the vectorised one is the op randn and gives the same numbers.
#include "base/rng.h"

#include <math.h>

#include <Random123/philox.h>

void fd_rng_block(uint64_t seed, uint32_t purpose, uint64_t sample, uint32_t block, uint32_t out[4]) {
  philox4x32_key_t key = {{(uint32_t)seed, (uint32_t)(seed >> 32)}};
  philox4x32_ctr_t counter = {{block, purpose, (uint32_t)sample, (uint32_t)(sample >> 32)}};
  philox4x32_ctr_t r = philox4x32_R(10, counter, key);
  for (int i = 0; i < 4; i++) out[i] = r.v[i];
}

float fd_rng_uniform(uint64_t seed, uint32_t purpose, uint64_t sample, uint32_t i) {
  uint32_t r[4];
  fd_rng_block(seed, purpose, sample, i / 4, r);
  return (float)(r[i % 4] >> 8) * 0x1p-24f;
}

void fd_rng_normal4(uint64_t seed, uint32_t purpose, uint64_t sample, uint32_t block, float out[4]) {
  uint32_t r[4];
  fd_rng_block(seed, purpose, sample, block, r);
  for (int i = 0; i < 4; i += 2) {
    double radius = sqrt(-2.0 * log(((double)r[i] + 1.0) * 0x1p-32));
    double angle = 6.283185307179586476925 * 0x1p-32 * (double)r[i + 1];
    out[i] = (float)(radius * cos(angle));
    out[i + 1] = (float)(radius * sin(angle));
  }
}

int64_t fd_rng_permute(uint64_t seed, uint32_t purpose, uint64_t sample, int64_t n, int64_t i) {
  int half_bits = 1;
  while (half_bits < 31 && ((int64_t)1 << (2 * half_bits)) < n) half_bits++;
  const uint64_t mask = ((uint64_t)1 << half_bits) - 1;
  uint64_t x = (uint64_t)i;
  do { /* the domain is less than 4 n (except for tiny n), so few walks are needed */
    uint64_t left = x >> half_bits, right = x & mask;
    for (uint32_t round = 0; round < 6; round++) {
      philox4x32_key_t key = {{(uint32_t)seed, (uint32_t)(seed >> 32)}};
      philox4x32_ctr_t counter = {{(uint32_t)right, purpose | round << 16, (uint32_t)sample, (uint32_t)(sample >> 32)}};
      uint64_t f = philox4x32_R(10, counter, key).v[0] & mask;
      uint64_t next = left ^ f;
      left = right;
      right = next;
    }
    x = left << half_bits | right;
  } while (x >= (uint64_t)n);
  return (int64_t)x;
}
