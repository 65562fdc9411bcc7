// SPDX-License-Identifier: Apache-2.0
// Counter-based random numbers (Philox4x32-10, Random123). Keyed by (seed, purpose, step or sample, element): no state,
// so nothing depends on the number of ranks, threads or on what was drawn before.
#ifndef FD_BASE_RNG_H
#define FD_BASE_RNG_H

#include <stdint.h>

enum fd_rng_purpose {
  FD_RNG_INIT = 1,      /* initial weights; sample = row of the parameter table */
  FD_RNG_NOISE,         /* diffusion noise */
  FD_RNG_TIMESTEP,      /* u of a sample */
  FD_RNG_POSTERIOR,     /* VAE posterior */
  FD_RNG_DROP_CAPTION,
  FD_RNG_CHOOSE_CAPTION,
  FD_RNG_CROP,
  FD_RNG_SHUFFLE,       /* sample = epoch */
  FD_RNG_REPLACE,       /* replacement of a bad sample */
  FD_RNG_SAMPLE,        /* first latents of a sampled picture */
  FD_RNG_SYNTHETIC,     /* bench data, demo pictures */
};

/** Four words of counter (block, purpose, sample low, sample high) under key = seed. */
void fd_rng_block(uint64_t seed, uint32_t purpose, uint64_t sample, uint32_t block, uint32_t out[4]);

/** Uniform in [0, 1), 24 bits: element `i` of the stream. */
float fd_rng_uniform(uint64_t seed, uint32_t purpose, uint64_t sample, uint32_t i);

/** Elements 4 block .. 4 block + 3 of the normal stream (Box-Muller as in op/ops.h, randn). */
void fd_rng_normal4(uint64_t seed, uint32_t purpose, uint64_t sample, uint32_t block, float out[4]);

/** Position `i` of a keyed permutation of 0..n-1 (a Feistel network over Philox rounds with cycle walking). n >= 1. */
int64_t fd_rng_permute(uint64_t seed, uint32_t purpose, uint64_t sample, int64_t n, int64_t i);

#endif
