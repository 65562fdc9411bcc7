// SPDX-License-Identifier: Apache-2.0
// Tables of the noise schedule. Which steps are rounded to float and which are double follows diffusers 0.35.
#include "train/scheduler.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "base/models.h"

fd_status fd_scheduler_create(int64_t num_train_timesteps, double shift, fd_scheduler **out) {
  fd_status st = FD_OK;
  fd_scheduler *s = NULL;
  const int64_t T = num_train_timesteps;
  if (T < 1 || T > 1000000)
    FD_TRY(FD_FAIL(FD_ERR_CONFIG, "noise_scheduler.num_train_timesteps is %lld, wanted 1 to 1000000", (long long)T));
  if (!(shift > 0) || !isfinite(shift))
    FD_TRY(FD_FAIL(FD_ERR_CONFIG, "noise_scheduler.shift is %g, wanted a positive number", shift));
  s = calloc(1, sizeof *s);
  if (s) {
    s->num_train_timesteps = T;
    s->shift = shift;
    s->sigmas = malloc((size_t)T * sizeof(float));
    s->timesteps = malloc((size_t)T * sizeof(float));
  }
  if (!s || !s->sigmas || !s->timesteps)
    FD_TRY(FD_FAIL(FD_ERR_NOMEM, "no memory for a noise schedule of %lld steps", (long long)T));
  const float a = (float)shift, a1 = (float)(shift - 1);
  for (int64_t i = 0; i < T; i++) {
    const float x = (float)(T - i) / (float)T;
    s->sigmas[i] = a * x / (1.0f + a1 * x);
    s->timesteps[i] = s->sigmas[i] * (float)T;
  }
  *out = s;
  s = NULL;
done:
  fd_scheduler_destroy(&s);
  return st;
}

void fd_scheduler_destroy(fd_scheduler **s) {
  if (!s || !*s) return;
  free((*s)->sigmas);
  free((*s)->timesteps);
  free(*s);
  *s = NULL;
}

fd_status fd_scheduler_read(const char *path, fd_scheduler **out) {
  fd_status st = FD_OK;
  int64_t T;
  double shift;
  FD_TRY(fd_noise_schedule_read(path, &T, &shift));
  st = fd_scheduler_create(T, shift, out);
  if (st != FD_OK) st = fd_fail_in(st, "%s", path);
done:
  return st;
}

fd_status fd_scheduler_sampling(const fd_scheduler *s, int64_t n, float *sigmas, float *timesteps) {
  if (n < 1) return FD_FAIL(FD_ERR_CONFIG, "gen.num_inference_steps is %lld, wanted at least 1", (long long)n);
  const double T = (double)s->num_train_timesteps, a = s->shift;
  const double first = (double)s->sigmas[0] * T, last = (double)s->sigmas[s->num_train_timesteps - 1] * T;
  /* numpy.linspace: first + i * step, and the end point exactly */
  const double step = n > 1 ? (last - first) / (double)(n - 1) : 0.0;
  for (int64_t i = 0; i < n; i++) {
    const double x = (i > 0 && i == n - 1 ? last : first + (double)i * step) / T;
    sigmas[i] = (float)(a * x / (1.0 + (a - 1.0) * x));
    timesteps[i] = sigmas[i] * (float)s->num_train_timesteps;
  }
  sigmas[n] = 0.0f;
  return FD_OK;
}
