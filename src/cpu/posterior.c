// SPDX-License-Identifier: Apache-2.0
// The VAE's diagonal Gaussian: mean, clamped log variance, a sample; and their gradient.
#include "cpu/cpu.h"
#include "cpu/vmath.h"

#define LOGVAR_LEAST -30.0f
#define LOGVAR_MOST 20.0f

/* NaN stays NaN, as torch.clamp. */
CPU_INLINE float clamped(float x) {
  x = x < LOGVAR_LEAST ? LOGVAR_LEAST : x;
  return x > LOGVAR_MOST ? LOGVAR_MOST : x;
}

/* bf16 and `kind` are constants where this is inlined. */
enum kind { NO_LATENT, MODE, SAMPLE };

CPU_INLINE void fwd_rows(const void *moments, bool bf16, enum kind kind, const float *noise, float *mean, float *logvar, float *latent, int64_t Z,
                         int64_t lo, int64_t hi) {
  for (int64_t r = lo; r < hi; r++)
    CPU_IVDEP for (int64_t z = 0; z < Z; z++) {
      const float m = cpu_load(moments, bf16, 2 * Z * r + z), v = clamped(cpu_load(moments, bf16, 2 * Z * r + Z + z));
      mean[r * Z + z] = m;
      logvar[r * Z + z] = v;
      if (kind == SAMPLE) latent[r * Z + z] = cpu_fma(cpu_expf_bounded(0.5f * v), noise[r * Z + z], m);
      if (kind == MODE) latent[r * Z + z] = m;
    }
}

CPU_CLONES static void fwd(const void *moments, bool bf16, const float *noise, float *mean, float *logvar, float *latent, int64_t Z, int64_t lo,
                           int64_t hi) {
#define ROWS(kind)                                                                          \
  do {                                                                                      \
    if (bf16) fwd_rows(moments, true, kind, noise, mean, logvar, latent, Z, lo, hi);        \
    else fwd_rows(moments, false, kind, noise, mean, logvar, latent, Z, lo, hi);            \
  } while (0)
  if (!latent) ROWS(NO_LATENT);
  else if (!noise) ROWS(MODE);
  else ROWS(SAMPLE);
#undef ROWS
}

fd_status cpu_posterior_fwd_prepare(fd_ctx *ctx, const struct fd_posterior_fwd_args *a, size_t *scratch_bytes) {
  (void)ctx, (void)scratch_bytes;
  const int64_t R = fd_tensor_rows(a->moments), Z = fd_tensor_cols(a->moments) / 2, n = R * Z;
  CPU_CHECK(posterior_fwd, moments, fd_tensor_cols(a->moments) % 2 == 0, "[.., 2Z]");
  CPU_CHECK(posterior_fwd, noise, !a->noise || fd_tensor_numel(a->noise) == n, "%lld x %lld elements", (long long)R, (long long)Z);
  CPU_CHECK(posterior_fwd, mean, fd_tensor_numel(a->mean) == n, "%lld x %lld elements", (long long)R, (long long)Z);
  CPU_CHECK(posterior_fwd, logvar, fd_tensor_numel(a->logvar) == n, "%lld x %lld elements", (long long)R, (long long)Z);
  CPU_CHECK(posterior_fwd, latent, !a->latent || fd_tensor_numel(a->latent) == n, "%lld x %lld elements", (long long)R, (long long)Z);
  return FD_OK;
}

fd_status cpu_posterior_fwd(fd_ctx *ctx, const struct fd_posterior_fwd_args *a) {
  const int64_t R = fd_tensor_rows(a->moments), Z = fd_tensor_cols(a->moments) / 2;
  #pragma omp parallel num_threads(cpu_threads(ctx, 2 * R * Z))
  {
    int64_t lo, hi;
    cpu_share(R, 1, &lo, &hi);
    fwd(a->moments->data, a->moments->dtype == FD_BF16, a->noise ? a->noise->data : NULL, a->mean->data, a->logvar->data,
        a->latent ? a->latent->data : NULL, Z, lo, hi);
  }
  return FD_OK;
}

CPU_CLONES static void bwd(const float *dmean, const float *dlogvar, const float *dlatent, const void *moments, bool bf16, const float *noise,
                           void *dmoments, bool acc, int64_t Z, int64_t lo, int64_t hi) {
  for (int64_t r = lo; r < hi; r++)
    for (int64_t z = 0; z < Z; z++) {
      const int64_t i = r * Z + z, at = 2 * Z * r + z;
      const float raw = cpu_load(moments, bf16, at + Z);
      float m = dmean ? dmean[i] : 0.0f, v = dlogvar ? dlogvar[i] : 0.0f;
      if (dlatent) {
        m += dlatent[i];
        if (noise) v += dlatent[i] * noise[i] * 0.5f * cpu_expf_bounded(0.5f * clamped(raw));
      }
      v = ((raw < LOGVAR_LEAST) | (raw > LOGVAR_MOST)) ? 0.0f : v;
      cpu_store(dmoments, bf16, at, acc ? cpu_load(dmoments, bf16, at) + m : m);
      cpu_store(dmoments, bf16, at + Z, acc ? cpu_load(dmoments, bf16, at + Z) + v : v);
    }
}

fd_status cpu_posterior_bwd_prepare(fd_ctx *ctx, const struct fd_posterior_bwd_args *a, size_t *scratch_bytes) {
  (void)ctx, (void)scratch_bytes;
  const int64_t R = fd_tensor_rows(a->moments), Z = fd_tensor_cols(a->moments) / 2, n = R * Z;
  CPU_CHECK(posterior_bwd, moments, fd_tensor_cols(a->moments) % 2 == 0, "[.., 2Z]");
  CPU_CHECK(posterior_bwd, dmean, !a->dmean || fd_tensor_numel(a->dmean) == n, "%lld x %lld elements", (long long)R, (long long)Z);
  CPU_CHECK(posterior_bwd, dlogvar, !a->dlogvar || fd_tensor_numel(a->dlogvar) == n, "%lld x %lld elements", (long long)R, (long long)Z);
  CPU_CHECK(posterior_bwd, dlatent, !a->dlatent || fd_tensor_numel(a->dlatent) == n, "%lld x %lld elements", (long long)R, (long long)Z);
  CPU_CHECK(posterior_bwd, noise, !a->noise || fd_tensor_numel(a->noise) == n, "%lld x %lld elements", (long long)R, (long long)Z);
  CPU_CHECK(posterior_bwd, dmoments, cpu_same_shape(a->dmoments, a->moments), "the shape of moments");
  return FD_OK;
}

fd_status cpu_posterior_bwd(fd_ctx *ctx, const struct fd_posterior_bwd_args *a) {
  const int64_t R = fd_tensor_rows(a->moments), Z = fd_tensor_cols(a->moments) / 2;
  #pragma omp parallel num_threads(cpu_threads(ctx, 2 * R * Z))
  {
    int64_t lo, hi;
    cpu_share(R, 1, &lo, &hi);
    bwd(a->dmean ? a->dmean->data : NULL, a->dlogvar ? a->dlogvar->data : NULL, a->dlatent ? a->dlatent->data : NULL, a->moments->data,
        a->moments->dtype == FD_BF16, a->noise ? a->noise->data : NULL, a->dmoments->data, a->acc >> 5 & 1, Z, lo, hi);
  }
  return FD_OK;
}
