// SPDX-License-Identifier: Apache-2.0
// Densities of u and weights of the loss. u in float, each operation as in the original: floor(1000 u) hangs on its last bit. exp and cos are
// rounded from double, the original's vectorised ones may be one ulp off: of 10^6 indices 1 to 30 differ (all in double: 10 to 100).
#include "train/density.h"

#include <math.h>
#include <string.h>

#include "base/rng.h"

fd_status fd_weighting_parse(const char *name, enum fd_weighting *out) {
  static const char *const names[] = {"none", "sigma_sqrt", "logit_normal", "mode", "cosmap"};
  for (int i = 0; i < 5; i++) {
    if (strcmp(name, names[i])) continue;
    *out = (enum fd_weighting)i;
    return FD_OK;
  }
  return FD_FAIL(FD_ERR_CONFIG, "trainer.weighting_scheme is \"%s\", wanted none, sigma_sqrt, logit_normal, mode or cosmap", name);
}

bool fd_density_is_normal(const struct fd_density *d) { return d->scheme == FD_WEIGHTING_LOGIT_NORMAL; }

float fd_density_draw(const struct fd_density *d, uint64_t seed, uint64_t global_sample) {
  if (!fd_density_is_normal(d)) return fd_rng_uniform(seed, FD_RNG_TIMESTEP, global_sample, 0);
  float z[4];
  fd_rng_normal4(seed, FD_RNG_TIMESTEP, global_sample, 0, z);
  return z[0];
}

float fd_density_u(const struct fd_density *d, float draw) {
  switch (d->scheme) {
    case FD_WEIGHTING_LOGIT_NORMAL: {
      const float x = (float)d->logit_std * draw + (float)d->logit_mean;
      return 1.0f / (1.0f + (float)exp(-(double)x));
    }
    case FD_WEIGHTING_MODE: {
      const float c = (float)cos((float)M_PI * draw / 2.0f);
      return 1.0f - draw - (float)d->mode_scale * (c * c - 1.0f + draw);
    }
    default: return draw;
  }
}

int64_t fd_density_index(float u, int64_t num_train_timesteps) {
  const float x = u * (float)num_train_timesteps;
  if (!(x > 0)) return 0;
  if (x >= (float)num_train_timesteps) return num_train_timesteps - 1;
  return (int64_t)x;
}

float fd_density_weight(enum fd_weighting scheme, float sigma) {
  const double s = sigma;
  switch (scheme) {
    case FD_WEIGHTING_SIGMA_SQRT: return (float)(1.0 / (s * s));
    case FD_WEIGHTING_COSMAP: return (float)(2.0 / (M_PI * (1.0 - 2.0 * s + 2.0 * s * s)));
    default: return 1.0f;
  }
}

void fd_density_at(const struct fd_density *d, const fd_scheduler *s, float u, float *sigma, float *timestep, float *weight) {
  const int64_t i = fd_density_index(u, s->num_train_timesteps);
  *sigma = s->sigmas[i];
  *timestep = s->timesteps[i];
  *weight = fd_density_weight(d->scheme, *sigma);
}
