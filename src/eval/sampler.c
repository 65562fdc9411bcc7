// SPDX-License-Identifier: Apache-2.0
// Sampling as four graphs that share one arena: text states once a batch, noise, one Euler step run n times, decoding.
// Invariant: the sample and the text states live outside the arena, so they survive from one graph to the next.
#include "eval/sampler.h"

#include <errno.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

#include "base/files.h"
#include "base/log.h"
#include "base/rng.h"
#include "graph/build.h"
#include "io/image.h"
#include "train/scheduler.h"

enum { TEXT_TILE = 16, SHEET_PICTURES = 64, SHEET_GAP = 2 };

struct fd_sampler {
  struct fd_sampler_parts parts;
  struct fd_sampler_config config;
  bool guided;
  int64_t rows;        /* samples of one evaluation of the DiT: batch, or twice that with guidance */
  int64_t h, w, C;     /* of the latent */
  fd_prompt *prompt, *negative; /* with and without the instruction */
  struct fd_text *text;
  int32_t *ids, *len;  /* [rows, stride], [rows] */
  int64_t stride;
  float *sigmas, *timesteps; /* [steps + 1], [steps] */
  fd_graph *text_graph, *noise_graph, *step_graph, *decode_graph;
  struct fd_text_vars text_in, step_in;
  fd_var keys, t, step, out, model_out, sample_in_step, pictures;
  void *states, *sample; /* device */
  void *arena;
  size_t arena_bytes, states_bytes, sample_bytes;
};

/* ---- building ---------------------------------------------------------------------------------------------------- */

static void build_text(fd_sampler *s, int text_index) {
  fd_graph *g = s->text_graph;
  const fd_tensor *t;
  fd_text_inputs(g, "text", s->text, 0, &s->text_in);
  fd_var states = fd_text_states(s->parts.text_encoder, g, &s->text_in, text_index, s->config.dtype);
  if (fd_graph_status(g) != FD_OK) return;
  t = fd_graph_get(g, states);
  fd_var kept = fd_graph_external(g, "states", t->dtype, t->ndim, t->shape, 0);
  fd_graph_emit(g, FD_OP_cast, &(struct fd_cast_args){0}, (fd_var[]){states, kept});
  s->states_bytes = fd_tensor_bytes(fd_graph_get(g, kept));
  s->out = kept;
}

static fd_var sample_var(fd_sampler *s, fd_graph *g) {
  return fd_graph_external(g, "sample", FD_F32, 4, (int64_t[]){s->config.batch, s->h, s->w, s->C}, 0);
}

static fd_var build_noise(fd_sampler *s) {
  fd_graph *g = s->noise_graph;
  fd_var sample = sample_var(s, g);
  s->keys = fd_graph_input(g, "keys", FD_U32, 2, (int64_t[]){s->config.batch, 4});
  fd_graph_emit(g, FD_OP_randn, &(struct fd_randn_args){.purpose = FD_RNG_SAMPLE}, (fd_var[]){s->keys, sample});
  return sample;
}

struct step_vars {
  fd_var sample, states;
};

static struct step_vars build_step(fd_sampler *s) {
  fd_graph *g = s->step_graph;
  const int64_t patch = s->parts.dit->dims.patch;
  struct step_vars v = {.sample = sample_var(s, g)};
  s->sample_in_step = v.sample;
  v.states = fd_graph_external(g, "states", s->config.dtype, 2, (int64_t[]){s->text->T, s->parts.text_encoder->dims.width}, 0);
  fd_text_inputs(g, "text", s->text, s->h / patch * (s->w / patch), &s->step_in);
  s->t = fd_graph_input(g, "timestep", FD_F32, 1, (int64_t[]){s->rows});
  s->step = fd_graph_input(g, "guidance, step", FD_F32, 1, (int64_t[]){2});
  fd_var x = fd_cast(g, v.sample, s->config.dtype, s->guided ? 2 : 1);
  fd_var out = fd_dit(s->parts.dit, g, &(struct fd_dit_inputs){.x = x, .t = s->t, .states = v.states, .text = &s->step_in});
  s->model_out = out;
  fd_graph_keep(g, out);
  fd_cfg_euler(g, out, s->step, v.sample);
  return v;
}

static fd_var build_decode(fd_sampler *s) {
  fd_graph *g = s->decode_graph;
  fd_var sample = sample_var(s, g);
  fd_var latent = fd_vae_unnormalise(s->parts.vae, g, sample, s->config.dtype);
  s->pictures = fd_cast(g, fd_vae_decode(s->parts.vae, g, latent), FD_F32, 1);
  fd_graph_keep(g, s->pictures);
  return sample;
}

static fd_status check(const fd_sampler *s) {
  const struct fd_model_dims *dit = &s->parts.dit->dims, *vae = &s->parts.vae->dims;
  const int64_t unit = vae->factor * dit->patch;
  if (s->config.batch < 1 || s->config.num_inference_steps < 1 || s->config.max_length < 1)
    return FD_FAIL(FD_ERR_CONFIG, "sampling: batch size, num_inference_steps and max_prompt_length must be at least 1");
  if (s->config.height % unit || s->config.width % unit || s->config.height < unit || s->config.width < unit)
    return FD_FAIL(FD_ERR_CONFIG, "sampling: %lld x %lld pixels; height and width must be multiples of %lld (VAE factor %lld x patch %lld)",
                   (long long)s->config.width, (long long)s->config.height, (long long)unit, (long long)vae->factor, (long long)dit->patch);
  if (dit->in_channels != vae->latent_channels || dit->out_channels != dit->in_channels)
    return FD_FAIL(FD_ERR_CONFIG, "sampling: the DiT has %lld channels in and %lld out, the VAE's latents have %lld", (long long)dit->in_channels,
                   (long long)dit->out_channels, (long long)vae->latent_channels);
  return FD_OK;
}

fd_status fd_sampler_create(const struct fd_sampler_parts *parts, const struct fd_sampler_config *config, fd_sampler **out) {
  fd_status st = FD_OK;
  fd_scheduler *schedule = NULL;
  fd_sampler *s = calloc(1, sizeof *s);
  if (!s) FD_TRY(FD_FAIL(FD_ERR_NOMEM, "no memory for the sampler"));
  s->parts = *parts;
  s->config = *config;
  FD_TRY(check(s));
  s->guided = config->guidance_scale > 1;
  s->rows = config->batch * (s->guided ? 2 : 1);
  s->h = config->height / parts->vae->dims.factor;
  s->w = config->width / parts->vae->dims.factor;
  s->C = parts->vae->dims.latent_channels;

  struct fd_prompt_config form = {.instruction = config->instruction, .max_prompt_length = config->max_length};
  s->stride = config->max_length;
  if (parts->tokenizer) {
    FD_TRY(fd_prompt_create(parts->tokenizer, &form, &s->prompt));
    form.instruction = "";
    FD_TRY(fd_prompt_create(parts->tokenizer, &form, &s->negative));
    s->stride = fd_prompt_length(s->prompt);
  }
  int64_t text_rows = s->rows * s->stride;
  const int64_t tile = fd_count_tile(parts->ctx, &text_rows, TEXT_TILE);
  FD_TRY(fd_text_create(s->rows, text_rows, s->stride, tile, &s->text));
  s->ids = calloc((size_t)(s->rows * s->stride), sizeof *s->ids);
  s->len = calloc((size_t)s->rows, sizeof *s->len);
  s->sigmas = calloc((size_t)config->num_inference_steps + 1, sizeof *s->sigmas);
  s->timesteps = calloc((size_t)config->num_inference_steps, sizeof *s->timesteps);
  if (!s->ids || !s->len || !s->sigmas || !s->timesteps) FD_TRY(FD_FAIL(FD_ERR_NOMEM, "no memory for the sampler"));
  FD_TRY(fd_scheduler_create(config->num_train_timesteps, config->shift, &schedule));
  FD_TRY(fd_scheduler_sampling(schedule, config->num_inference_steps, s->sigmas, s->timesteps));

  FD_TRY(fd_graph_create(parts->ctx, "sample text", &s->text_graph));
  FD_TRY(fd_graph_create(parts->ctx, "sample noise", &s->noise_graph));
  FD_TRY(fd_graph_create(parts->ctx, "sample step", &s->step_graph));
  FD_TRY(fd_graph_create(parts->ctx, "sample decode", &s->decode_graph));
  build_text(s, config->text_index);
  fd_var noise_sample = build_noise(s);
  struct step_vars step = build_step(s);
  fd_var decode_sample = build_decode(s);

  fd_graph *const graphs[] = {s->text_graph, s->noise_graph, s->step_graph, s->decode_graph};
  for (int i = 0; i < 4; i++) {
    size_t bytes;
    FD_TRY(fd_graph_plan(graphs[i], &bytes));
    if (bytes > s->arena_bytes) s->arena_bytes = bytes;
  }
  s->sample_bytes = (size_t)(config->batch * s->h * s->w * s->C) * sizeof(float);
  const struct fd_backend *device = parts->ctx->backend;
  FD_TRY(device->alloc(parts->ctx, s->states_bytes, &s->states));
  FD_TRY(device->alloc(parts->ctx, s->sample_bytes, &s->sample));
  FD_TRY(device->alloc(parts->ctx, s->arena_bytes, &s->arena));
  fd_graph_bind(s->text_graph, s->out, s->states);
  fd_graph_bind(s->noise_graph, noise_sample, s->sample);
  fd_graph_bind(s->step_graph, step.sample, s->sample);
  fd_graph_bind(s->step_graph, step.states, s->states);
  fd_graph_bind(s->decode_graph, decode_sample, s->sample);
  FD_TRY(fd_params_bind(parts->text_encoder->params, s->text_graph));
  FD_TRY(fd_params_bind(parts->dit->params, s->step_graph));
  FD_TRY(fd_params_bind(parts->vae->params, s->decode_graph));
  for (int i = 0; i < 4; i++) FD_TRY(fd_graph_attach(graphs[i], s->arena, s->arena_bytes));
  *out = s;
  s = NULL;
done:
  fd_scheduler_destroy(&schedule);
  fd_sampler_destroy(&s);
  return st;
}

void fd_sampler_destroy(fd_sampler **sampler) {
  fd_sampler *s = *sampler;
  if (!s) return;
  /* the models live on */
  if (s->text_graph) fd_params_forget(s->parts.text_encoder->params, s->text_graph);
  if (s->step_graph) fd_params_forget(s->parts.dit->params, s->step_graph);
  if (s->decode_graph) fd_params_forget(s->parts.vae->params, s->decode_graph);
  fd_graph_destroy(&s->text_graph);
  fd_graph_destroy(&s->noise_graph);
  fd_graph_destroy(&s->step_graph);
  fd_graph_destroy(&s->decode_graph);
  if (s->arena) s->parts.ctx->backend->free(s->parts.ctx, s->arena);
  if (s->sample) s->parts.ctx->backend->free(s->parts.ctx, s->sample);
  if (s->states) s->parts.ctx->backend->free(s->parts.ctx, s->states);
  fd_prompt_destroy(&s->prompt);
  fd_prompt_destroy(&s->negative);
  fd_text_destroy(&s->text);
  free(s->ids);
  free(s->len);
  free(s->sigmas);
  free(s->timesteps);
  free(s);
  *sampler = NULL;
}

size_t fd_sampler_bytes(const fd_sampler *s) { return s->arena_bytes + s->states_bytes + s->sample_bytes; }

/* ---- running ----------------------------------------------------------------------------------------------------- */

/* Rows 0 .. batch - 1 are the negative prompts where there is guidance, then come the prompts. */
static fd_status set_text(fd_sampler *s, int n, const struct fd_sample_request *request) {
  const int64_t B = s->config.batch;
  const char *negative = s->config.negative_prompt ? s->config.negative_prompt : "";
  for (int64_t i = 0; i < B; i++) {
    const struct fd_sample_request *r = &request[i < n ? i : n - 1];
    const char *text = r->prompt;
    const int64_t row = s->guided ? B + i : i;
    if (!s->prompt) {
      if (!r->ids || r->n_ids < 1 || r->n_ids > s->stride)
        return FD_FAIL(FD_ERR_ARG, "sampler: %d token ids without a tokenizer, expected 1 to %lld", r->ids ? r->n_ids : 0, (long long)s->stride);
      memcpy(s->ids + row * s->stride, r->ids, (size_t)r->n_ids * sizeof *r->ids);
      s->len[row] = r->n_ids;
      if (s->guided) s->ids[i * s->stride] = r->ids[0], s->len[i] = 1;
      continue;
    }
    if (!fd_utf8_valid(text, strlen(text))) return FD_FAIL(FD_ERR_DATA, "prompt %u is not UTF-8", request[i < n ? i : n - 1].prompt_index);
    s->len[row] = (int32_t)fd_prompt_encode(s->prompt, text, strlen(text), s->ids + row * s->stride);
    if (s->guided) s->len[i] = (int32_t)fd_prompt_encode(s->negative, negative, strlen(negative), s->ids + i * s->stride);
  }
  return fd_text_pack(s->text, s->rows, s->ids, s->stride, s->len);
}

/* Every sample has its own key: the same picture in whatever batch, on whatever rank. */
static uint64_t sample_key(const struct fd_sample_request *r) { return (uint64_t)r->prompt_index << 32 | r->sample; }

static fd_status set_noise(fd_sampler *s, int n, const struct fd_sample_request *request) {
  fd_status st = FD_OK;
  uint32_t *keys = calloc((size_t)s->config.batch * 4, sizeof *keys);
  if (!keys) return FD_FAIL(FD_ERR_NOMEM, "no memory");
  for (int64_t i = 0; i < s->config.batch; i++) {
    const struct fd_sample_request *r = &request[i < n ? i : n - 1];
    const uint64_t key = sample_key(r);
    keys[4 * i] = (uint32_t)r->seed;
    keys[4 * i + 1] = (uint32_t)(r->seed >> 32);
    keys[4 * i + 2] = (uint32_t)key;
    keys[4 * i + 3] = (uint32_t)(key >> 32);
  }
  st = fd_graph_set(s->noise_graph, s->keys, keys, (size_t)s->config.batch * 4 * sizeof *keys);
  free(keys);
  return st == FD_OK ? fd_graph_run(s->noise_graph) : st;
}

/* A value of either float type as f32, for the watcher. */
static fd_status show(fd_sampler *s, fd_graph *g, fd_var v, enum fd_sampler_stage stage, int step, fd_sampler_watch *watch, void *user) {
  fd_status st = FD_OK;
  const fd_tensor *t = fd_graph_get(g, v);
  const int64_t n = fd_tensor_numel(t);
  float *values = malloc((size_t)n * sizeof *values);
  void *raw = malloc(fd_tensor_bytes(t));
  if (!values || !raw) FD_TRY(FD_FAIL(FD_ERR_NOMEM, "no memory"));
  FD_TRY(fd_graph_read(g, v, raw, fd_tensor_bytes(t)));
  fd_convert(values, FD_F32, raw, t->dtype, n);
  FD_TRY(watch(user, stage, step, values, n, s->text));
done:
  free(raw);
  free(values);
  return st;
}

fd_status fd_sampler_run_watched(fd_sampler *s, int n, const struct fd_sample_request *request, const float *latents, fd_sampler_watch *watch,
                                 void *user, unsigned char *rgb) {
  fd_status st = FD_OK;
  float *t = malloc((size_t)s->rows * sizeof *t), *pictures = NULL;
  const int64_t values = s->config.height * s->config.width * 3;
  if (!t || n < 1 || n > s->config.batch) FD_TRY(FD_FAIL(FD_ERR_ARG, "sampler: %d requests, expected 1 to %lld", n, (long long)s->config.batch));
  FD_TRY(set_text(s, n, request));
  if (watch) FD_TRY(watch(user, FD_SAMPLER_TEXT, 0, NULL, 0, s->text));
  FD_TRY(fd_text_set(s->text_graph, &s->text_in, s->text));
  FD_TRY(fd_graph_run(s->text_graph));
  if (latents) FD_TRY(fd_graph_set(s->step_graph, s->sample_in_step, latents, s->sample_bytes));
  else FD_TRY(set_noise(s, n, request));
  FD_TRY(fd_text_set(s->step_graph, &s->step_in, s->text));
  for (int i = 0; i < s->config.num_inference_steps; i++) {
    const float step[2] = {(float)s->config.guidance_scale, s->sigmas[i + 1] - s->sigmas[i]};
    for (int64_t r = 0; r < s->rows; r++) t[r] = s->timesteps[i];
    FD_TRY(fd_graph_set(s->step_graph, s->t, t, (size_t)s->rows * sizeof *t));
    FD_TRY(fd_graph_set(s->step_graph, s->step, step, sizeof step));
    FD_TRY(fd_graph_run(s->step_graph));
    if (!watch) continue;
    FD_TRY(show(s, s->step_graph, s->model_out, FD_SAMPLER_MODEL_OUT, i, watch, user));
    FD_TRY(show(s, s->step_graph, s->sample_in_step, FD_SAMPLER_LATENTS, i, watch, user));
  }
  FD_TRY(fd_graph_run(s->decode_graph));
  if (watch) FD_TRY(show(s, s->decode_graph, s->pictures, FD_SAMPLER_PICTURES, 0, watch, user));
  if (!rgb) goto done;
  pictures = malloc((size_t)(n * values) * sizeof *pictures);
  if (!pictures) FD_TRY(FD_FAIL(FD_ERR_NOMEM, "no memory for %d pictures", n));
  FD_TRY(fd_graph_read(s->decode_graph, s->pictures, pictures, (size_t)(n * values) * sizeof *pictures));
  for (int64_t i = 0; i < n * values; i++) rgb[i] = fd_image_byte(pictures[i]);
done:
  free(pictures);
  free(t);
  return st;
}

fd_status fd_sampler_run(fd_sampler *s, int n, const struct fd_sample_request *request, unsigned char *rgb) {
  return fd_sampler_run_watched(s, n, request, NULL, NULL, NULL, rgb);
}

/* ---- many prompts, many ranks ------------------------------------------------------------------------------------ */

static void picture_path(char *out, size_t bytes, const char *dir, int prompt, int sample, int n_samples, bool jpeg) {
  const char *end = jpeg ? "jpg" : "png";
  if (n_samples == 1)
    snprintf(out, bytes, "%s/%05d.%s", dir, prompt, end);
  else
    snprintf(out, bytes, "%s/%05d-%02d.%s", dir, prompt, sample, end);
}

/* One batch on this rank: draw, write. */
static fd_status run_batch(fd_sampler *s, int64_t batch, int64_t total, const char *const *prompts, int n_samples, uint64_t seed, const char *dir,
                           bool jpeg, struct fd_sample_request *request, unsigned char *rgb) {
  fd_status st = FD_OK;
  const int64_t first = batch * s->config.batch, bytes = s->config.height * s->config.width * 3;
  const int n = (int)(total - first < s->config.batch ? total - first : s->config.batch);
  for (int i = 0; i < n; i++) {
    const int prompt = (int)((first + i) / n_samples), sample = (int)((first + i) % n_samples);
    request[i] = (struct fd_sample_request){.prompt = prompts[prompt], .seed = seed, .prompt_index = (uint32_t)prompt, .sample = (uint32_t)sample};
  }
  FD_TRY(fd_sampler_run(s, n, request, rgb));
  for (int i = 0; i < n; i++) {
    char path[4200];
    picture_path(path, sizeof path, dir, (int)request[i].prompt_index, (int)request[i].sample, n_samples, jpeg);
    FD_TRY(fd_image_write(path, rgb + i * bytes, (int)s->config.width, (int)s->config.height));
  }
done:
  return st;
}

static fd_status write_sheet(const fd_sampler *s, int64_t total, int n_samples, const char *dir, bool jpeg) {
  fd_status st = FD_OK;
  const int n = total < SHEET_PICTURES ? (int)total : SHEET_PICTURES;
  fd_image picture[SHEET_PICTURES] = {{0}}, sheet = {0};
  const uint8_t *rgb[SHEET_PICTURES];
  char path[4200];
  for (int i = 0; i < n; i++) {
    picture_path(path, sizeof path, dir, i / n_samples, i % n_samples, n_samples, jpeg);
    FD_TRY(fd_image_read(path, &picture[i]));
    rgb[i] = picture[i].rgb;
  }
  FD_TRY(fd_image_sheet(rgb, n, (int)s->config.width, (int)s->config.height, n_samples > 1 ? n_samples : 0, SHEET_GAP, &sheet));
  snprintf(path, sizeof path, "%s/sheet.png", dir);
  FD_TRY(fd_image_write(path, sheet.rgb, sheet.w, sheet.h));
done:
  for (int i = 0; i < n; i++) fd_image_free(&picture[i]);
  fd_image_free(&sheet);
  return st;
}

fd_status fd_sample_prompts(fd_sampler *s, fd_comm *comm, int n_prompts, const char *const *prompts, int n_samples, uint64_t seed, const char *dir,
                            bool jpeg, void (*progress)(void *user, int64_t done, int64_t total), void *user) {
  fd_status st = FD_OK;
  const int64_t total = (int64_t)n_prompts * n_samples, B = s->config.batch, batches = (total + B - 1) / B;
  const int rank = fd_comm_rank(comm), size = fd_comm_size(comm);
  struct fd_sample_request *request = calloc((size_t)B, sizeof *request);
  unsigned char *rgb = malloc((size_t)(B * s->config.height * s->config.width * 3));
  if (!request || !rgb) st = FD_FAIL(FD_ERR_NOMEM, "no memory for a batch of %lld pictures", (long long)B);
  if (st == FD_OK && rank == 0) st = fd_folder_make(dir);
  FD_TRY(fd_agree(comm, st));
  for (int64_t batch = rank; batch < batches && st == FD_OK; batch += size) {
    st = run_batch(s, batch, total, prompts, n_samples, seed, dir, jpeg, request, rgb);
    if (progress && st == FD_OK) progress(user, (batch + size) * B < total ? (batch + size) * B : total, total);
  }
  FD_TRY(fd_agree(comm, st));
  if (rank == 0) st = write_sheet(s, total, n_samples, dir, jpeg);
  FD_TRY(fd_agree(comm, st));
done:
  free(request);
  free(rgb);
  return st;
}
