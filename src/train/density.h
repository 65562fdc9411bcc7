// SPDX-License-Identifier: Apache-2.0
// Which noise level a training sample gets, and how much its loss counts (Esser et al. 2024, section 3.1).
//
// A draw (a normal or a uniform number) -> u in [0, 1] -> index = trunc(u T) -> sigma, timestep, weight. All on the host, for
// every backend: one ulp of u can move the index.
#ifndef FD_TRAIN_DENSITY_H
#define FD_TRAIN_DENSITY_H

#include <stdbool.h>

#include "train/scheduler.h"

enum fd_weighting {
  FD_WEIGHTING_NONE = 0,     /* u uniform, weight 1 */
  FD_WEIGHTING_SIGMA_SQRT,   /* u uniform, weight sigma^-2 */
  FD_WEIGHTING_LOGIT_NORMAL, /* u = sigmoid(logit_mean + logit_std z), z normal, weight 1 */
  FD_WEIGHTING_MODE,         /* u = 1 - r - mode_scale (cos(pi r / 2)^2 - 1 + r), r uniform, weight 1 */
  FD_WEIGHTING_COSMAP        /* u uniform, weight 2 / (pi (1 - 2 sigma + 2 sigma^2)) */
};

struct fd_density {
  enum fd_weighting scheme;
  double logit_mean, logit_std, mode_scale;
};

/** trainer.weighting_scheme by name. FD_ERR_CONFIG lists the names. */
fd_status fd_weighting_parse(const char *name, enum fd_weighting *out);

/** Whether a draw is a normal number (else it is uniform in [0, 1)). */
bool fd_density_is_normal(const struct fd_density *d);
/** The draw of one sample: depends on nothing but its arguments. */
float fd_density_draw(const struct fd_density *d, uint64_t seed, uint64_t global_sample);
/** u of a draw. */
float fd_density_u(const struct fd_density *d, float draw);
/** trunc(u T) in float, at most T - 1 (u can be 1; u outside [0, 1], from an extreme mode_scale, is cut too). */
int64_t fd_density_index(float u, int64_t num_train_timesteps);
float fd_density_weight(enum fd_weighting scheme, float sigma);

/** From u to what the step needs. */
void fd_density_at(const struct fd_density *d, const fd_scheduler *s, float u, float *sigma, float *timestep, float *weight);

#endif
