// SPDX-License-Identifier: Apache-2.0
// verify kind scheduler: training tables, sampling tables, and the sample after each Euler step.
#include <stdio.h>
#include <stdlib.h>

#include "cmd/verify.h"
#include "train/scheduler.h"

/* Sampling with n steps. */
static fd_status one(struct fd_verify *v, const fd_scheduler *s, int64_t n) {
  fd_status st = FD_OK;
  char name[64];
  struct fd_h5_array sample = {0}, output = {0};
  float *sigmas = NULL, *timesteps = NULL, *trajectory = NULL;
  FD_TRY(fd_verify_read(v, "input/sample", FD_F32, &sample));
  FD_TRY(fd_verify_read(v, "input/model_output", FD_F32, &output));
  if (sample.numel != output.numel)
    FD_TRY(FD_FAIL(FD_ERR_FORMAT, "%s: sample and model_output differ in size", v->dir));
  const int64_t size = sample.numel;
  sigmas = malloc((size_t)(n + 1) * sizeof(float));
  timesteps = malloc((size_t)n * sizeof(float));
  trajectory = malloc((size_t)(n * size) * sizeof(float));
  if (!sigmas || !timesteps || !trajectory) FD_TRY(FD_FAIL(FD_ERR_NOMEM, "no memory for %lld steps", (long long)n));
  FD_TRY(fd_scheduler_sampling(s, n, sigmas, timesteps));
  float *x = sample.data;
  const float *v_t = output.data;
  for (int64_t i = 0; i < n; i++) {
    const float dsigma = sigmas[i + 1] - sigmas[i];
    for (int64_t e = 0; e < size; e++) trajectory[i * size + e] = x[e] += dsigma * v_t[e];
  }
  snprintf(name, sizeof name, "output/sigmas_%lld", (long long)n);
  FD_TRY(fd_verify_compare(v, name, sigmas, n + 1, -1, NULL, 0));
  snprintf(name, sizeof name, "output/timesteps_%lld", (long long)n);
  FD_TRY(fd_verify_compare(v, name, timesteps, n, -1, NULL, 0));
  snprintf(name, sizeof name, "output/trajectory_%lld", (long long)n);
  FD_TRY(fd_verify_compare(v, name, trajectory, n * size, -1, NULL, 0));
done:
  fd_h5_array_free(&sample);
  fd_h5_array_free(&output);
  free(sigmas);
  free(timesteps);
  free(trajectory);
  return st;
}

fd_status fd_verify_scheduler(struct fd_verify *v) {
  fd_status st = FD_OK;
  fd_scheduler *s = NULL;
  FD_TRY(fd_scheduler_read(fd_verify_path(v, "config.json"), &s));
  FD_TRY(fd_verify_compare(v, "output/train_sigmas", s->sigmas, s->num_train_timesteps, -1, NULL, 0));
  FD_TRY(fd_verify_compare(v, "output/train_timesteps", s->timesteps, s->num_train_timesteps, -1, NULL, 0));
  const json_t *counts = json_object_get(v->info, "num_inference_steps");
  if (!json_array_size(counts)) FD_TRY(FD_FAIL(FD_ERR_FORMAT, "%s: case.json has no list num_inference_steps", v->dir));
  for (size_t i = 0; i < json_array_size(counts); i++) {
    const json_int_t n = json_integer_value(json_array_get(counts, i));
    if (n < 1 || n > 100000) FD_TRY(FD_FAIL(FD_ERR_FORMAT, "%s: num_inference_steps holds %lld", v->dir, (long long)n));
    FD_TRY(one(v, s, n));
  }
done:
  fd_scheduler_destroy(&s);
  return st;
}
