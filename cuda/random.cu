// SPDX-License-Identifier: Apache-2.0
// Normal numbers by Philox (Random123, as on the CPU), and the sinusoids of the time step.
// randn writes 4 B a number. 4 numbers take about 500 issue slots, a third of them for two logarithms in double: bound by arithmetic, a quarter of the
// bandwidth expected. A step draws about a million numbers: some microseconds, so the exact logarithm stays. timestep_embed: bound by its launch.
#include "cuda/device.cuh"

namespace {

enum { BLOCK = 256 };

/* Philox4x32-10 (Salmon et al. 2011); the same words as fd_rng_block. */
__device__ __forceinline__ void philox(uint32_t c[4], uint32_t k0, uint32_t k1) {
  for (int round = 0; round < 10; round++) {
    const uint64_t a = (uint64_t)0xD2511F53u * c[0], b = (uint64_t)0xCD9E8D57u * c[2];
    const uint32_t n0 = (uint32_t)(b >> 32) ^ c[1] ^ k0, n2 = (uint32_t)(a >> 32) ^ c[3] ^ k1;
    c[1] = (uint32_t)b, c[3] = (uint32_t)a, c[0] = n0, c[2] = n2;
    k0 += 0x9E3779B9u, k1 += 0xBB67AE85u;
  }
}

__global__ void randn_kernel(const uint32_t *keys, float *y, uint32_t purpose, int64_t B, int64_t per_sample) {
  const int64_t blocks_per_sample = (per_sample + 3) / 4, n = B * blocks_per_sample;
  for (int64_t i = (int64_t)blockIdx.x * BLOCK + threadIdx.x; i < n; i += (int64_t)BLOCK * gridDim.x) {
    const int64_t b = i / blocks_per_sample, block = i % blocks_per_sample;
    uint32_t c[4] = {(uint32_t)block, purpose, keys[4 * b + 2], keys[4 * b + 3]};
    philox(c, keys[4 * b], keys[4 * b + 1]);
    for (int j = 0; j < 4; j += 2) {
      /* x + 1 is exact in double; the logarithm near u = 1 needs it (1 - u would round in fp32) */
      const float radius = sqrtf((float)(-2.0 * log(((double)c[j] + 1.0) * 0x1p-32)));
      const float turn = (float)((double)c[j + 1] * 0x1p-31); /* angle / pi, 0..2 */
      const int64_t e = 4 * block + j;
      if (e < per_sample) y[b * per_sample + e] = radius * cospif(turn);
      if (e + 1 < per_sample) y[b * per_sample + e + 1] = radius * sinpif(turn);
    }
  }
}

template <class T> __global__ void timestep_kernel(const float *t, const float *freqs, T *y, int64_t B, int64_t n) {
  const int64_t i = (int64_t)blockIdx.x * BLOCK + threadIdx.x;
  if (i >= B * n) return;
  const int64_t b = i / n, k = i % n;
  const float angle = t[b] * freqs[k];
  fd::store(y + b * 2 * n + k, cosf(angle));
  fd::store(y + b * 2 * n + n + k, sinf(angle));
}

}  // namespace

extern "C" fd_status cuda_randn(fd_ctx *ctx, const struct fd_randn_args *a) {
  const int64_t B = a->y->shape[0], n = fd_tensor_numel(a->y);
  if (n == 0) return FD_OK;
  return FD_CUDA(FD_LAUNCH(randn_kernel, fd::stride_blocks(ctx, (n + 3) / 4, BLOCK), BLOCK, 0, fd_cuda_stream(ctx), (const uint32_t *)a->keys->data,
                           (float *)a->y->data, a->purpose, B, n / B));
}

extern "C" fd_status cuda_timestep_embed(fd_ctx *ctx, const struct fd_timestep_embed_args *a) {
  const int64_t B = fd_tensor_numel(a->t), n = fd_tensor_numel(a->freqs);
  if (B * n == 0) return FD_OK;
  if (a->y->dtype == FD_BF16)
    return FD_CUDA(FD_LAUNCH(timestep_kernel<fd::bf16>, fd::blocks(B * n, BLOCK), BLOCK, 0, fd_cuda_stream(ctx), (const float *)a->t->data,
                             (const float *)a->freqs->data, (fd::bf16 *)a->y->data, B, n));
  return FD_CUDA(FD_LAUNCH(timestep_kernel<float>, fd::blocks(B * n, BLOCK), BLOCK, 0, fd_cuda_stream(ctx), (const float *)a->t->data,
                           (const float *)a->freqs->data, (float *)a->y->data, B, n));
}
