// SPDX-License-Identifier: Apache-2.0
// verify kind train: optimisation steps of a record through the graphs that training builds, with the record's latents, noise, u and
// text states where training draws or computes its own.
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "cmd/verify.h"
#include "train/density.h"
#include "train/lr.h"
#include "train/step.h"

/* hparams of case.json; keys as in the original's configuration. */
struct hparams {
  int64_t max_steps, accumulation, warmup_steps, num_train_timesteps, update_steps;
  double max_norm, lr, beta1, beta2, eps, weight_decay, shift, decay;
  bool precondition;
  struct fd_density density;
  enum fd_lr_kind lr_kind;
};

static double number(const json_t *info, const char *group, const char *key, double otherwise) {
  const json_t *x = json_object_get(json_object_get(json_object_get(info, "hparams"), group), key);
  return json_is_number(x) ? json_number_value(x) : otherwise;
}

static const char *text(const json_t *info, const char *group, const char *key, const char *otherwise) {
  const json_t *x = json_object_get(json_object_get(json_object_get(info, "hparams"), group), key);
  return json_is_string(x) ? json_string_value(x) : otherwise;
}

static fd_status read_hparams(const struct fd_verify *v, struct hparams *h) {
  fd_status st = FD_OK;
  const json_t *info = v->info, *all = json_object_get(info, "hparams");
  const json_t *betas = json_object_get(json_object_get(all, "optimizer"), "betas");
  *h = (struct hparams){.max_steps = (int64_t)number(info, "trainer", "max_steps", 0),
                        .accumulation = (int64_t)number(info, "trainer", "gradient_accumulation_steps", 1),
                        .max_norm = number(info, "trainer", "gradient_clipping", 0),
                        .precondition = json_is_true(json_object_get(json_object_get(all, "trainer"), "precondition_outputs")),
                        .lr = number(info, "optimizer", "lr", 1e-4),
                        .beta1 = 0.9,
                        .beta2 = 0.999,
                        .eps = number(info, "optimizer", "eps", 1e-8),
                        .weight_decay = number(info, "optimizer", "weight_decay", 0),
                        .warmup_steps = (int64_t)number(info, "lr_scheduler", "num_warmup_steps", 0),
                        .num_train_timesteps = (int64_t)number(info, "noise_scheduler", "num_train_timesteps", 1000),
                        .shift = number(info, "noise_scheduler", "shift", 1),
                        .decay = number(info, "ema", "decay", 0),
                        .update_steps = (int64_t)number(info, "ema", "update_steps", 0),
                        .density = {.logit_mean = number(info, "trainer", "logit_mean", 0),
                                    .logit_std = number(info, "trainer", "logit_std", 1),
                                    .mode_scale = number(info, "trainer", "mode_scale", 1.29)}};
  if (json_array_size(betas) == 2) {
    h->beta1 = json_number_value(json_array_get(betas, 0));
    h->beta2 = json_number_value(json_array_get(betas, 1));
  }
  FD_TRY(fd_weighting_parse(text(info, "trainer", "weighting_scheme", "none"), &h->density.scheme));
  FD_TRY(fd_lr_parse(text(info, "lr_scheduler", "name", "constant"), &h->lr_kind));
  if (h->max_steps < 1 || h->accumulation < 1) FD_TRY(FD_FAIL(FD_ERR_FORMAT, "%s: hparams.trainer has no steps", v->dir));
done:
  return st;
}

/* [C, H, W] -> [H, W, C] for each of n images. */
static void to_nhwc(const float *x, int64_t n, int64_t C, int64_t HW, float *y) {
  for (int64_t i = 0; i < n; i++)
    for (int64_t c = 0; c < C; c++)
      for (int64_t p = 0; p < HW; p++) y[(i * HW + p) * C + c] = x[(i * C + c) * HW + p];
}

struct replay {
  struct hparams h;
  struct fd_h5_array latents, noise, u, states, mask;
  int64_t B, C, H, W, L, Dt, M;
  fd_scheduler *scheduler;
  fd_model *dit;
  fd_step *step;
  float *x, *z, *packed;  /* one micro-batch: latents, noise [B, H, W, C]; text rows without padding */
  int32_t *lengths;
  float *loss, *timesteps, *sigmas, *weights, *norm, *lr; /* results: [M], [M, B], [M, B], [B], [steps], [steps] */
};

static fd_status read_arrays(struct fd_verify *v, struct replay *r) {
  fd_status st = FD_OK;
  FD_TRY(fd_verify_read(v, "input/latents", FD_F32, &r->latents));
  FD_TRY(fd_verify_read(v, "input/noise", FD_F32, &r->noise));
  FD_TRY(fd_verify_read(v, "input/u", FD_F32, &r->u));
  FD_TRY(fd_verify_read(v, "input/text_hidden_states", FD_F32, &r->states));
  FD_TRY(fd_verify_read(v, "input/attention_mask", FD_I64, &r->mask));
  if (r->latents.ndim != 5 || r->states.ndim != 4)
    FD_TRY(FD_FAIL(FD_ERR_FORMAT, "%s: latents have %d dimensions (wanted 5), text_hidden_states %d (wanted 4)", v->dir,
                   r->latents.ndim, r->states.ndim));
  const int64_t *x = r->latents.shape, *t = r->states.shape;
  r->M = x[0], r->B = x[1], r->C = x[2], r->H = x[3], r->W = x[4], r->L = t[2], r->Dt = t[3];
  if (r->M != r->h.max_steps * r->h.accumulation || r->noise.numel != r->latents.numel || r->u.numel != r->M * r->B ||
      t[0] != r->M || t[1] != r->B || r->mask.numel != r->M * r->B * r->L)
    FD_TRY(FD_FAIL(FD_ERR_FORMAT, "%s: the arrays of io.h5 do not fit each other or max_steps", v->dir));
  const size_t image = (size_t)(r->B * r->C * r->H * r->W) * sizeof(float), steps = (size_t)r->h.max_steps * sizeof(float);
  r->x = malloc(image);
  r->z = malloc(image);
  r->packed = malloc((size_t)(r->B * r->L * r->Dt) * sizeof(float));
  r->lengths = malloc((size_t)r->B * sizeof(int32_t));
  r->loss = malloc((size_t)r->M * sizeof(float));
  r->timesteps = malloc((size_t)(r->M * r->B) * sizeof(float));
  r->sigmas = malloc((size_t)(r->M * r->B) * sizeof(float));
  r->weights = malloc((size_t)r->B * sizeof(float));
  r->norm = malloc(steps);
  r->lr = malloc(steps);
  if (!r->x || !r->z || !r->packed || !r->lengths || !r->loss || !r->timesteps || !r->sigmas || !r->weights || !r->norm || !r->lr)
    FD_TRY(FD_FAIL(FD_ERR_NOMEM, "%s: no memory for the record", v->dir));
done:
  return st;
}

static void free_replay(struct replay *r) {
  fd_step_destroy(&r->step);
  fd_model_destroy(&r->dit);
  fd_scheduler_destroy(&r->scheduler);
  fd_h5_array_free(&r->latents);
  fd_h5_array_free(&r->noise);
  fd_h5_array_free(&r->u);
  fd_h5_array_free(&r->states);
  fd_h5_array_free(&r->mask);
  free(r->x);
  free(r->z);
  free(r->packed);
  free(r->lengths);
  free(r->loss);
  free(r->timesteps);
  free(r->sigmas);
  free(r->weights);
  free(r->norm);
  free(r->lr);
}

static fd_status micro_batch(struct replay *r, int64_t m) {
  fd_status st = FD_OK;
  const int64_t B = r->B, size = r->C * r->H * r->W;
  to_nhwc((const float *)r->latents.data + m * B * size, B, r->C, r->H * r->W, r->x);
  to_nhwc((const float *)r->noise.data + m * B * size, B, r->C, r->H * r->W, r->z);
  int64_t rows = 0;
  for (int64_t b = 0; b < B; b++) {
    r->lengths[b] = 0;
    for (int64_t l = 0; l < r->L; l++) {
      const int64_t at = (m * B + b) * r->L + l;
      if (!((const int64_t *)r->mask.data)[at]) continue;
      memcpy(r->packed + rows * r->Dt, (const float *)r->states.data + at * r->Dt, (size_t)r->Dt * sizeof(float));
      r->lengths[b]++;
      rows++;
    }
    fd_density_at(&r->h.density, r->scheduler, ((const float *)r->u.data)[m * B + b], &r->sigmas[m * B + b], &r->timesteps[m * B + b],
                  &r->weights[b]);
  }
  const struct fd_step_batch batch = {.latents = r->x,
                                      .noise = r->z,
                                      .text = r->packed,
                                      .lengths = r->lengths,
                                      .sigma = r->sigmas + m * B,
                                      .timestep = r->timesteps + m * B,
                                      .weight = r->weights};
  FD_TRY(fd_step_micro(r->step, &batch));
  float losses[4096];
  if (B > 4096) FD_TRY(FD_FAIL(FD_ERR_UNSUPPORTED, "a record with more than 4096 samples in a batch"));
  FD_TRY(fd_step_losses(r->step, losses));
  double sum = 0;
  for (int64_t b = 0; b < B; b++) sum += losses[b];
  r->loss[m] = (float)(sum / (double)B);
done:
  return st;
}

static fd_status replay(struct replay *r) {
  fd_status st = FD_OK;
  for (int64_t s = 0; s < r->h.max_steps; s++) {
    const bool average = r->h.update_steps > 0 && (s + 1) % r->h.update_steps == 0;
    const struct fd_step_rates rates = {.lr = r->h.lr * fd_lr_factor(r->h.lr_kind, s, r->h.warmup_steps, r->h.max_steps),
                                        .ema_decay = average ? r->h.decay : 1.0,
                                        .update = s};
    struct fd_step_result result;
    FD_TRY(fd_step_begin(r->step, &rates));
    for (int64_t k = 0; k < r->h.accumulation; k++) FD_TRY(micro_batch(r, s * r->h.accumulation + k));
    FD_TRY(fd_step_update(r->step));
    FD_TRY(fd_step_result(r->step, &result));
    r->norm[s] = (float)result.grad_norm;
    r->lr[s] = (float)rates.lr;
  }
done:
  return st;
}

static fd_status compare_state(struct fd_verify *v, struct replay *r) {
  static const char *const group[FD_OPTIM_PARTS] = {"param", "exp_avg", "exp_avg_sq", "ema"};
  fd_status st = FD_OK;
  const fd_params *p = r->dit->params;
  float *host = NULL;
  char name[512];
  for (int part = 0; part < FD_OPTIM_PARTS; part++) {
    const double tolerance = fd_verify_tolerance(v, group[part], v->tol_output);
    for (int i = 0; i < fd_params_count(p); i++) {
      const struct fd_param *row = fd_params_row(p, i);
      snprintf(name, sizeof name, "output/%s/%s", group[part], row->name);
      if (row->buffer || !fd_h5_exists(v->io, name)) continue;
      host = realloc(host, (size_t)row->numel * sizeof(float));
      if (!host) FD_TRY(FD_FAIL(FD_ERR_NOMEM, "no memory for %s", row->name));
      FD_TRY(fd_optim_get(fd_step_optim(r->step), (enum fd_optim_part)part, i, host));
      FD_TRY(fd_verify_compare(v, name, host, row->numel, tolerance, NULL, 0));
    }
  }
done:
  free(host);
  return st;
}

fd_status fd_verify_train(struct fd_verify *v) {
  fd_status st = FD_OK;
  struct replay record = {0}, *r = &record;
  fd_ctx *ctx;
  FD_TRY(fd_verify_ctx(v, &ctx));
  FD_TRY(read_hparams(v, &r->h));
  FD_TRY(read_arrays(v, r));
  FD_TRY(fd_scheduler_create(r->h.num_train_timesteps, r->h.shift, &r->scheduler));
  FD_TRY(fd_model_open(v->dir, &r->dit));
  FD_TRY(fd_params_layout(r->dit->params, true, 1));
  fd_params_set_type(r->dit->params, v->dtype);
  const struct fd_step_config config = {.dit = r->dit,
                                        .dtype = v->dtype,
                                        .batch = r->B,
                                        .accumulation = r->h.accumulation,
                                        .height = r->H,
                                        .width = r->W,
                                        .max_length = r->L,
                                        .precondition = r->h.precondition,
                                        .given_noise = true,
                                        .optim = {.beta1 = r->h.beta1,
                                                  .beta2 = r->h.beta2,
                                                  .eps = r->h.eps,
                                                  .weight_decay = r->h.weight_decay,
                                                  .max_norm = r->h.max_norm,
                                                  .ema = true}};
  FD_TRY(fd_step_create(ctx, &config, &r->step));
  FD_TRY(fd_params_alloc(r->dit->params, ctx, v->dtype, true));
  FD_TRY(fd_step_alloc(r->step));
  FD_TRY(fd_model_load(r->dit, v->dir, fd_optim_fill, fd_step_optim(r->step)));
  FD_TRY(fd_optim_publish(fd_step_optim(r->step)));
  FD_TRY(replay(r));
  FD_TRY(fd_verify_compare(v, "output/loss", r->loss, r->M, -1, NULL, 0));
  FD_TRY(fd_verify_compare(v, "output/timesteps", r->timesteps, r->M * r->B, -1, NULL, 0));
  FD_TRY(fd_verify_compare(v, "output/sigmas", r->sigmas, r->M * r->B, -1, NULL, 0));
  FD_TRY(fd_verify_compare(v, "output/grad_norm", r->norm, r->h.max_steps, -1, NULL, 0));
  FD_TRY(fd_verify_compare(v, "output/lr", r->lr, r->h.max_steps, -1, NULL, 0));
  FD_TRY(compare_state(v, r));
done:
  free_replay(r);
  return st;
}
