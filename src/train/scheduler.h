// SPDX-License-Identifier: Apache-2.0
// The noise schedule: FlowMatchEulerDiscreteScheduler's tables for training and for sampling.
//
// f(x) = a x / (1 + (a - 1) x), a = shift. Training: sigma[i] = f((T - i) / T), timestep[i] = T sigma[i], i = 0..T-1, so
// that sigma[0] = 1 is pure noise and sigma never reaches 0. Sampling shifts a second time, as diffusers does.
#ifndef FD_TRAIN_SCHEDULER_H
#define FD_TRAIN_SCHEDULER_H

#include <stdint.h>

#include "base/status.h"

typedef struct fd_scheduler {
  int64_t num_train_timesteps; /* T */
  double shift;
  float *sigmas;    /* [T], owned */
  float *timesteps; /* [T], owned */
} fd_scheduler;

/** Tables from the two numbers. FD_ERR_CONFIG if num_train_timesteps is not in 1..1e6 or shift is not positive. */
fd_status fd_scheduler_create(int64_t num_train_timesteps, double shift, fd_scheduler **out);
/** From a published scheduler_config.json, as fd_noise_schedule_read reads it. */
fd_status fd_scheduler_read(const char *path, fd_scheduler **out);
void fd_scheduler_destroy(fd_scheduler **s);

/** Sampling with n >= 1 steps: sigmas out [n + 1], the last is 0; timesteps out [n].
 *  Step i: sample += (sigmas[i + 1] - sigmas[i]) * model_output(sample, timesteps[i]). */
fd_status fd_scheduler_sampling(const fd_scheduler *s, int64_t n, float *sigmas, float *timesteps);

#endif
