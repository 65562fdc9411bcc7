// SPDX-License-Identifier: Apache-2.0
// Sinusoids of the timestep. The angle is one f32 product, as the original's; near 1000 that is where the error is.
#include "cpu/cpu.h"
#include "cpu/vmath.h"

CPU_CLONES static void run(const float *t, const float *freqs, int64_t n, void *y, bool bf16, int64_t lo, int64_t hi) {
  for (int64_t b = lo; b < hi; b++)
    for (int64_t k = 0; k < n; k++) {
      float s, c;
      cpu_sincosf(t[b] * freqs[k], &s, &c);
      cpu_store(y, bf16, 2 * n * b + k, c);
      cpu_store(y, bf16, 2 * n * b + n + k, s);
    }
}

fd_status cpu_timestep_embed_prepare(fd_ctx *ctx, const struct fd_timestep_embed_args *a, size_t *scratch_bytes) {
  (void)ctx, (void)scratch_bytes;
  int64_t B = fd_tensor_numel(a->t), n = fd_tensor_numel(a->freqs);
  CPU_CHECK(timestep_embed, y, fd_tensor_rows(a->y) == B && fd_tensor_cols(a->y) == 2 * n, "[%lld, %lld]", (long long)B, 2 * (long long)n);
  return FD_OK;
}

fd_status cpu_timestep_embed(fd_ctx *ctx, const struct fd_timestep_embed_args *a) {
  const int64_t B = fd_tensor_numel(a->t), n = fd_tensor_numel(a->freqs);
  #pragma omp parallel num_threads(cpu_threads(ctx, B * n * 4))
  {
    int64_t lo, hi;
    cpu_share(B, 1, &lo, &hi);
    run(a->t->data, a->freqs->data, n, a->y->data, a->y->dtype == FD_BF16, lo, hi);
  }
  return FD_OK;
}
