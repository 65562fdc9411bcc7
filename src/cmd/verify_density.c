// SPDX-License-Identifier: Apache-2.0
// verify kind density: from draws to u, index, timestep, sigma and weight of the loss.
#include <stdio.h>
#include <stdlib.h>

#include "cmd/verify.h"
#include "train/density.h"

static fd_status run_of(struct fd_verify *v, const fd_scheduler *s, const json_t *run) {
  fd_status st = FD_OK;
  struct fd_h5_array draw = {0};
  float *out[5] = {NULL};
  static const char *const names[] = {"u", "indices", "timesteps", "sigmas", "weighting"};
  char name[128];
  const char *run_name = json_string_value(json_object_get(run, "name"));
  const char *scheme = json_string_value(json_object_get(run, "weighting_scheme"));
  if (!run_name || !scheme) FD_TRY(FD_FAIL(FD_ERR_FORMAT, "%s: a run without name or weighting_scheme", v->dir));
  struct fd_density d = {.logit_mean = json_number_value(json_object_get(run, "logit_mean")),
                         .logit_std = json_number_value(json_object_get(run, "logit_std")),
                         .mode_scale = json_number_value(json_object_get(run, "mode_scale"))};
  FD_TRY(fd_weighting_parse(scheme, &d.scheme));
  snprintf(name, sizeof name, "input/%s/draw", run_name);
  FD_TRY(fd_verify_read(v, name, FD_F32, &draw));
  for (int i = 0; i < 5; i++) {
    out[i] = malloc((size_t)draw.numel * sizeof(float));
    if (!out[i]) FD_TRY(FD_FAIL(FD_ERR_NOMEM, "no memory for %lld draws", (long long)draw.numel));
  }
  for (int64_t i = 0; i < draw.numel; i++) {
    out[0][i] = fd_density_u(&d, ((const float *)draw.data)[i]);
    out[1][i] = (float)fd_density_index(out[0][i], s->num_train_timesteps);
    fd_density_at(&d, s, out[0][i], &out[3][i], &out[2][i], &out[4][i]);
  }
  for (int i = 0; i < 5; i++) {
    snprintf(name, sizeof name, "output/%s/%s", run_name, names[i]);
    FD_TRY(fd_verify_compare(v, name, out[i], draw.numel, i == 1 ? 0 : -1, NULL, 0)); /* an index is right or wrong */
  }
done:
  fd_h5_array_free(&draw);
  for (int i = 0; i < 5; i++) free(out[i]);
  return st;
}

/* weighting_of_sigma/SCHEME of the input sigmas. */
static fd_status weights(struct fd_verify *v) {
  fd_status st = FD_OK;
  struct fd_h5_array sigmas = {0};
  char **names = NULL, name[128];
  float *w = NULL;
  int n = 0;
  FD_TRY(fd_h5_list(v->io, "output/weighting_of_sigma", false, &n, &names));
  if (!n) goto done;
  FD_TRY(fd_verify_read(v, "input/sigmas", FD_F32, &sigmas));
  w = malloc((size_t)sigmas.numel * sizeof(float));
  if (!w) FD_TRY(FD_FAIL(FD_ERR_NOMEM, "no memory for weights"));
  for (int i = 0; i < n; i++) {
    enum fd_weighting scheme;
    FD_TRY(fd_weighting_parse(names[i], &scheme));
    for (int64_t e = 0; e < sigmas.numel; e++) w[e] = fd_density_weight(scheme, ((const float *)sigmas.data)[e]);
    snprintf(name, sizeof name, "output/weighting_of_sigma/%s", names[i]);
    FD_TRY(fd_verify_compare(v, name, w, sigmas.numel, -1, NULL, 0));
  }
done:
  fd_h5_array_free(&sigmas);
  free(names);
  free(w);
  return st;
}

fd_status fd_verify_density(struct fd_verify *v) {
  fd_status st = FD_OK;
  fd_scheduler *s = NULL;
  FD_TRY(fd_scheduler_read(fd_verify_path(v, "config.json"), &s));
  const json_t *runs = json_object_get(v->info, "runs");
  if (!json_array_size(runs)) FD_TRY(FD_FAIL(FD_ERR_FORMAT, "%s: case.json has no list of runs", v->dir));
  for (size_t i = 0; i < json_array_size(runs); i++) FD_TRY(run_of(v, s, json_array_get(runs, i)));
  FD_TRY(weights(v));
done:
  fd_scheduler_destroy(&s);
  return st;
}
