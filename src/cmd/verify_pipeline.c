// SPDX-License-Identifier: Apache-2.0
// Kind pipeline: the sampler itself, from prompts to pictures, looked at after every stage; latents come from the record.
#include <math.h>
#include <stdio.h>
#include <stdlib.h>

#include "base/models.h"
#include "cmd/verify_model.h"
#include "eval/sampler.h"

struct watched {
  struct fd_verify *v;
  int steps;
  int64_t rows, B, H, W, h, w, C; /* of pictures and of latents */
  float *last;                    /* the final latents, as the sampler left them */
  float *pictures;                /* [B, H, W, 3] */
};

/* The ids of each row where the record's mask is 1 must be the sampler's, in order. */
static fd_status check_ids(struct watched *x, const struct fd_text *text) {
  fd_status st = FD_OK;
  struct fd_h5_array ids = {0}, mask = {0};
  FD_TRY(fd_verify_read(x->v, "input/input_ids", FD_I64, &ids));
  FD_TRY(fd_verify_read(x->v, "input/attention_mask", FD_I64, &mask));
  if (ids.ndim != 2 || ids.shape[0] != x->rows || mask.numel != ids.numel)
    FD_TRY(FD_FAIL(FD_ERR_FORMAT, "%s: input_ids are no [%lld, n]", x->v->dir, (long long)x->rows));
  int wrong = 0, row = 0;
  for (int64_t b = 0; b < ids.shape[0]; b++) {
    int32_t n = 0;
    bool same = true;
    for (int64_t k = 0; k < ids.shape[1]; k++) {
      const int64_t i = b * ids.shape[1] + k;
      if (!((int64_t *)mask.data)[i]) continue;
      if (n >= text->first[2 * b + 1] || text->ids[text->first[2 * b] + n] != ((int64_t *)ids.data)[i]) same = false;
      n++;
    }
    if (!same || n != text->first[2 * b + 1]) wrong++, row = (int)b;
  }
  fd_verify_report(x->v, "input/input_ids", wrong, 0, wrong == 0, "%d rows differ, the last is row %d", wrong, row);
done:
  fd_h5_array_free(&mask);
  fd_h5_array_free(&ids);
  return st;
}

static fd_status compare(struct watched *x, const char *record, const float *nhwc, int64_t B, int64_t C, int64_t H, int64_t W) {
  fd_status st = FD_OK;
  if (!fd_h5_exists(x->v->io, record)) return FD_OK;
  float *to = malloc((size_t)(B * C * H * W) * sizeof *to);
  if (!to) return FD_FAIL(FD_ERR_NOMEM, "no memory for %s", record);
  fd_to_nchw(nhwc, to, B, C, H, W);
  st = fd_verify_compare(x->v, record, to, B * C * H * W, -1, NULL, 0);
  free(to);
  return st;
}

static fd_status watch(void *user, enum fd_sampler_stage stage, int step, const float *values, int64_t n, const struct fd_text *text) {
  fd_status st = FD_OK;
  struct watched *x = user;
  char record[64];
  switch (stage) {
    case FD_SAMPLER_TEXT:
      FD_TRY(check_ids(x, text));
      break;
    case FD_SAMPLER_MODEL_OUT:
      snprintf(record, sizeof record, "output/noise_pred_%d", step + 1);
      FD_TRY(compare(x, record, values, x->rows, x->C, x->h, x->w));
      break;
    case FD_SAMPLER_LATENTS:
      snprintf(record, sizeof record, "output/latents_%d", step + 1);
      FD_TRY(compare(x, record, values, x->B, x->C, x->h, x->w));
      if (step + 1 < x->steps) break;
      FD_TRY(compare(x, "output/latents", values, x->B, x->C, x->h, x->w));
      memcpy(x->last, values, (size_t)n * sizeof *values);
      break;
    case FD_SAMPLER_PICTURES:
      memcpy(x->pictures, values, (size_t)n * sizeof *values);
      break;
  }
done:
  return st;
}

/* decoded [B, H, W, 3] against the records <decoded>, <image> and <image>_uint8. rgb: the sampler's own bytes, or NULL. */
static fd_status check_pictures(struct watched *x, const char *decoded, const char *image, const float *pictures, const unsigned char *rgb) {
  fd_status st = FD_OK;
  char record[80];
  struct fd_h5_array bytes = {0}, ref = {0};
  const int64_t n = x->B * x->H * x->W * 3, plane = x->H * x->W;
  float *clamped = malloc((size_t)n * sizeof *clamped);
  if (!clamped) FD_TRY(FD_FAIL(FD_ERR_NOMEM, "no memory for pictures"));
  for (int64_t i = 0; i < n; i++) clamped[i] = fminf(1.0f, fmaxf(0.0f, pictures[i] * 0.5f + 0.5f));
  snprintf(record, sizeof record, "output/%s", decoded);
  FD_TRY(compare(x, record, pictures, x->B, 3, x->H, x->W));
  snprintf(record, sizeof record, "output/%s", image);
  FD_TRY(compare(x, record, clamped, x->B, 3, x->H, x->W));
  if (!fd_h5_exists(x->v->io, record)) goto done;
  FD_TRY(fd_verify_read(x->v, record, FD_F32, &ref)); /* [B, 3, H, W] */
  snprintf(record, sizeof record, "output/%s_uint8", image);
  if (!fd_h5_exists(x->v->io, record)) goto done;
  FD_TRY(fd_verify_read(x->v, record, FD_U8, &bytes)); /* [B, H, W, 3] */
  if (bytes.numel != n || ref.numel != n) FD_TRY(FD_FAIL(FD_ERR_FORMAT, "%s: %s has %lld values", x->v->dir, record, (long long)bytes.numel));
  /* a byte may be one off where 255 * image lies within the tolerance of a half */
  const double slack = 255 * (x->v->dtype == FD_BF16 ? 16.0 / 256 : x->v->tol_output);
  int64_t wrong = 0, worst = 0;
  for (int64_t i = 0; i < n; i++) {
    const int64_t b = i / (plane * 3), p = i / 3 % plane, c = i % 3;
    const double level = 255.0 * ((float *)ref.data)[(b * 3 + c) * plane + p];
    const int ours = rgb ? rgb[i] : (int)nearbyintf(255.0f * clamped[i]), theirs = ((uint8_t *)bytes.data)[i];
    const bool near_half = fabs(level - floor(level) - 0.5) <= slack;
    if (llabs(ours - theirs) > worst) worst = llabs(ours - theirs);
    if (ours != theirs && !(llabs(ours - theirs) <= 1 && near_half) && (double)llabs(ours - theirs) > (slack > 1 ? slack + 1 : 0)) wrong++;
  }
  fd_verify_report(x->v, record, (double)wrong, 0, wrong == 0, "%lld of %lld bytes differ where they must not; largest difference %lld", (long long)wrong,
                   (long long)n, (long long)worst);
done:
  free(clamped);
  fd_h5_array_free(&bytes);
  fd_h5_array_free(&ref);
  return st;
}

/* What the original showed its users: the normalised latents in the decoder, as they are. */
static fd_status check_as_the_original(struct watched *x, fd_model *vae) {
  fd_status st = FD_OK;
  struct fd_verify_graph g = {0};
  const int64_t n = x->B * x->H * x->W * 3;
  float *pictures = malloc((size_t)n * sizeof *pictures);
  if (!pictures) FD_TRY(FD_FAIL(FD_ERR_NOMEM, "no memory for pictures"));
  FD_TRY(fd_verify_graph_open(x->v, "decode", &g));
  fd_var latents = fd_graph_input(g.g, "latents", x->v->dtype, 4, (int64_t[]){x->B, x->h, x->w, x->C});
  fd_var out = fd_vae_decode(vae, g.g, latents);
  fd_graph_keep(g.g, out);
  FD_TRY(fd_verify_graph_ready(&g, 1, &vae));
  FD_TRY(fd_verify_set(&g, latents, x->last, x->B * x->h * x->w * x->C));
  FD_TRY(fd_graph_run(g.g));
  FD_TRY(fd_verify_get(&g, out, pictures, n));
  FD_TRY(check_pictures(x, "decoded", "image", pictures, NULL));
done:
  if (g.g) fd_params_forget(vae->params, g.g);
  fd_verify_graph_close(&g);
  free(pictures);
  return st;
}

static int64_t number(const struct fd_verify *v, const char *key, int64_t otherwise) {
  const json_t *n = json_object_get(v->info, key);
  return json_is_integer(n) ? json_integer_value(n) : otherwise;
}

fd_status fd_verify_pipeline(struct fd_verify *v) {
  fd_status st = FD_OK;
  struct watched x = {.v = v};
  fd_model *dit = NULL, *text = NULL, *vae = NULL;
  fd_tokenizer *tokenizer = NULL;
  fd_sampler *sampler = NULL;
  struct fd_sample_request *request = NULL;
  struct fd_h5_array latents = {0};
  float *start = NULL;
  unsigned char *rgb = NULL;
  int64_t levels;
  double shift;
  FD_TRY(fd_noise_schedule_read(fd_verify_path(v, "scheduler/scheduler_config.json"), &levels, &shift));
  const json_t *prompts = json_object_get(v->info, "prompts"), *guidance = json_object_get(v->info, "guidance_scale");
  const json_t *negative_prompt = json_object_get(v->info, "negative_prompt"); /* a text, null, or a list of one */
  if (json_is_array(negative_prompt)) negative_prompt = json_array_get(negative_prompt, 0);
  const char *negative = json_string_value(negative_prompt);
  const int64_t n_prompts = (int64_t)json_array_size(prompts);

  FD_TRY(fd_verify_model_open(v, "transformer", NULL, false, &dit));
  FD_TRY(fd_verify_model_open(v, "text_encoder", NULL, false, &text));
  FD_TRY(fd_verify_model_open(v, "vae", NULL, false, &vae));
  FD_TRY(fd_tokenizer_open(fd_verify_path(v, "tokenizer"), &tokenizer));
  x.B = n_prompts * number(v, "num_images_per_prompt", 1);
  x.steps = (int)number(v, "num_inference_steps", 1);
  x.H = number(v, "height", 0);
  x.W = number(v, "width", 0);
  x.h = x.H / vae->dims.factor;
  x.w = x.W / vae->dims.factor;
  x.C = vae->dims.latent_channels;
  const struct fd_sampler_config config = {
      .batch = x.B, .height = x.H, .width = x.W, .num_inference_steps = x.steps,
      .guidance_scale = json_is_number(guidance) ? json_number_value(guidance) : 1, .negative_prompt = negative ? negative : "", .instruction = "",
      .max_length = number(v, "max_sequence_length", 256),
      .text_index = json_is_integer(json_object_get(dit->json, "text_hidden_states_index"))
                        ? (int)json_integer_value(json_object_get(dit->json, "text_hidden_states_index")) : -1,
      .shift = shift, .num_train_timesteps = levels, .dtype = v->dtype};
  x.rows = config.guidance_scale > 1 ? 2 * x.B : x.B;
  const struct fd_sampler_parts parts = {.ctx = v->ctx, .dit = dit, .text_encoder = text, .vae = vae, .tokenizer = tokenizer};
  FD_TRY(fd_sampler_create(&parts, &config, &sampler));
  FD_TRY(fd_verify_read(v, "input/latents", FD_F32, &latents));
  const int64_t n = x.B * x.h * x.w * x.C;
  if (latents.numel != n) FD_TRY(FD_FAIL(FD_ERR_FORMAT, "%s: latents do not fit height and width", v->dir));
  request = calloc((size_t)x.B, sizeof *request);
  start = malloc((size_t)n * sizeof *start);
  x.last = malloc((size_t)n * sizeof *x.last);
  x.pictures = malloc((size_t)(x.B * x.H * x.W * 3) * sizeof *x.pictures);
  rgb = malloc((size_t)(x.B * x.H * x.W * 3));
  if (!request || !start || !x.last || !x.pictures || !rgb) FD_TRY(FD_FAIL(FD_ERR_NOMEM, "no memory for pictures"));
  for (int64_t i = 0; i < x.B; i++) /* the whole list is repeated */
    request[i].prompt = json_string_value(json_array_get(prompts, (size_t)(i % n_prompts)));
  fd_to_nhwc(latents.data, start, x.B, x.C, x.h, x.w);
  FD_TRY(fd_sampler_run_watched(sampler, (int)x.B, request, start, watch, &x, rgb));
  FD_TRY(check_pictures(&x, "decoded_unnormalised", "image_unnormalised", x.pictures, rgb));
  FD_TRY(check_as_the_original(&x, vae));
done:
  fd_sampler_destroy(&sampler);
  fd_tokenizer_destroy(&tokenizer);
  fd_model_destroy(&vae);
  fd_model_destroy(&text);
  fd_model_destroy(&dit);
  fd_h5_array_free(&latents);
  free(rgb);
  free(x.pictures);
  free(x.last);
  free(start);
  free(request);
  return st;
}
