// SPDX-License-Identifier: Apache-2.0
// The graphs of a training step. Nothing is allocated and nothing decided between fd_step_begin and fd_step_update.
#include "train/step.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "base/rng.h"
#include "graph/build.h"

const char *const fd_step_phase_name[FD_PHASE_COUNT] = {"vae", "text", "forward", "backward", "optimizer"};

enum { TEXT_TILE = 16 }; /* packed text rows are counted in these at least */

/* Bounds on a bucket: small enough that the first starts early, large enough that a message is worth its start; and
 * far below the 2^30 elements of one reduction. */
enum { BUCKETS = 8, BUCKET_MIN = 1 << 16, BUCKET_MAX = 1 << 26 };

/* A fixed range of the flat gradient. Bucket 0 is the last range: backward finishes the last layers first. */
struct bucket {
  int64_t first, n;
  int64_t missing; /* elements whose gradient is not complete yet, while the graph is built */
  fd_var value;    /* in the graph that starts it */
  fd_var wait;     /* in the optimiser's graph */
};

/* Nodes [first, last) of a graph that are one phase. */
struct span {
  int first, last;
  enum fd_step_phase phase;
};

struct fd_step {
  fd_ctx *ctx;
  struct fd_step_config c;
  struct fd_text *layout; /* owned: where each sample's text lies */
  struct fd_text_vars tv;
  int64_t N, H, W, C; /* image tokens per sample; latents */
  fd_graph *micro, *opt;
  fd_optim *optim;
  void *arena; /* owned; both graphs use it, one after the other */
  size_t arena_bytes;
  float *control; /* device, owned */
  fd_var micro_control, opt_control;
  fd_var pixels, latents, noise, text, text_input;
  fd_var sigma, timestep, weight, keys, loss;
  int n_buckets;
  struct bucket *bucket;
  int n_spans;
  struct span *span;
  void **mark; /* points around the spans of each micro-batch, then around the optimiser (backend's, owned) */
  int n_marks;
  int micro_at;  /* micro-batches of this step so far */
  int32_t *host_ids; /* staging: [B, max_length] */
  float *host_text;  /* staging of given text states: [T, width] */
  uint32_t *host_keys;
  double seconds[FD_PHASE_COUNT];
};

/* ---- buckets ------------------------------------------------------------------------------------------------------ */

static fd_status make_buckets(fd_step *s) {
  const int64_t numel = fd_params_flat_numel(s->c.dit->params);
  int64_t n = numel / BUCKETS;
  if (n < BUCKET_MIN) n = BUCKET_MIN;
  if (n > BUCKET_MAX) n = BUCKET_MAX;
  s->n_buckets = (int)((numel + n - 1) / n);
  s->bucket = calloc((size_t)s->n_buckets, sizeof *s->bucket);
  if (!s->bucket) return FD_FAIL(FD_ERR_NOMEM, "no memory for %d buckets", s->n_buckets);
  for (int b = 0; b < s->n_buckets; b++) {
    const int64_t end = numel - b * n;
    s->bucket[b].first = end > n ? end - n : 0;
    s->bucket[b].n = end - s->bucket[b].first;
  }
  const fd_params *p = s->c.dit->params;
  for (int i = 0; i < fd_params_count(p); i++) {
    const struct fd_param *row = fd_params_row(p, i);
    if (row->buffer) continue;
    for (int b = 0; b < s->n_buckets; b++) {
      const int64_t lo = row->offset > s->bucket[b].first ? row->offset : s->bucket[b].first;
      const int64_t end = s->bucket[b].first + s->bucket[b].n;
      const int64_t hi = row->offset + row->numel < end ? row->offset + row->numel : end;
      if (hi > lo) s->bucket[b].missing += hi - lo;
    }
  }
  return FD_OK;
}

/* Request numbers: bucket b is b, the loss comes after them. */
static void emit_start(fd_graph *g, fd_var x, int request) {
  fd_graph_emit(g, FD_OP_reduce_start, &(struct fd_reduce_start_args){.request = request}, &x);
}

static void emit_wait(fd_graph *g, fd_var x, int request) {
  fd_graph_emit(g, FD_OP_reduce_wait, &(struct fd_reduce_wait_args){.request = request}, &x);
}

static fd_var bucket_value(fd_step *s, fd_graph *g, int b) {
  return fd_graph_external(g, "bucket", FD_F32, 1, &s->bucket[b].n, 0);
}

static void start_bucket(fd_step *s, fd_graph *g, int b) {
  s->bucket[b].value = bucket_value(s, g, b);
  emit_start(g, s->bucket[b].value, b);
}

/* Backward has appended the last op that adds to `grad`: buckets that are whole now start their sum. */
static void on_grad_done(void *user, fd_graph *g, fd_var grad) {
  fd_step *s = user;
  int64_t first, n;
  if (!fd_params_grad_range(s->c.dit->params, g, grad, &first, &n)) return;
  for (int b = 0; b < s->n_buckets; b++) {
    struct bucket *k = &s->bucket[b];
    const int64_t lo = first > k->first ? first : k->first;
    const int64_t hi = first + n < k->first + k->n ? first + n : k->first + k->n;
    if (hi <= lo) continue;
    k->missing -= hi - lo;
    if (k->missing == 0 && !k->value) start_bucket(s, g, b);
  }
}

/* ---- graphs ------------------------------------------------------------------------------------------------------- */

static fd_var input(fd_graph *g, const char *name, fd_dtype dtype, int ndim, int64_t a, int64_t b, int64_t c, int64_t d) {
  return fd_graph_input(g, name, dtype, ndim, (const int64_t[]){a, b, c, d});
}

/* Normalised latents [B, H, W, C] of the pictures: a sample of the VAE's posterior, or what the caller gives. */
static void build_latents(fd_step *s, fd_graph *g) {
  const int64_t B = s->c.batch;
  fd_graph_phase(g, fd_step_phase_name[FD_PHASE_VAE]);
  if (!s->c.vae) {
    s->latents = input(g, "latents", FD_F32, 4, B, s->H, s->W, s->C);
    return;
  }
  fd_var latent = 0;
  s->pixels = input(g, "pixels", FD_U8, 4, B, s->c.height, s->c.width, 3);
  const fd_var noise = fd_randn(g, s->keys, FD_RNG_POSTERIOR, 4, (const int64_t[]){B, s->H, s->W, s->C});
  fd_vae_encode(s->c.vae, g, fd_pixels(g, s->pixels, s->c.dtype), noise, NULL, NULL, &latent);
  s->latents = fd_vae_normalise(s->c.vae, g, latent, FD_F32);
}

/* Text states [T, width] of the packed tokens. */
static void build_text(fd_step *s, fd_graph *g) {
  fd_graph_phase(g, fd_step_phase_name[FD_PHASE_TEXT]);
  fd_text_inputs(g, "text", s->layout, s->N, &s->tv);
  if (s->c.text_encoder) {
    s->text = fd_text_states(s->c.text_encoder, g, &s->tv, s->c.text_index, s->c.dtype);
    return;
  }
  s->text = s->text_input = input(g, "text states", FD_F32, 2, s->layout->T, s->c.dit->dims.text_width, 0, 0);
  if (s->c.dtype != FD_F32) s->text = fd_cast(g, s->text_input, s->c.dtype, 1);
}

static fd_status build_micro(fd_step *s) {
  fd_status st = FD_OK;
  const int64_t B = s->c.batch;
  FD_TRY(fd_graph_create(s->ctx, "micro-batch", &s->micro));
  fd_graph *g = s->micro;
  s->keys = input(g, "keys", FD_U32, 2, B, 4, 0, 0);
  s->sigma = input(g, "sigma", FD_F32, 1, B, 0, 0, 0);
  s->timestep = input(g, "timestep", FD_F32, 1, B, 0, 0, 0);
  s->weight = input(g, "weight", FD_F32, 1, B, 0, 0, 0);
  s->micro_control = fd_graph_external(g, "control", FD_F32, 1, (const int64_t[]){FD_CONTROL_COUNT}, 0);

  build_latents(s, g);
  build_text(s, g);

  fd_graph_phase(g, fd_step_phase_name[FD_PHASE_FORWARD]);
  const int64_t shape[] = {B, s->H, s->W, s->C};
  s->noise = s->c.given_noise ? fd_graph_input(g, "noise", FD_F32, 4, shape) : fd_randn(g, s->keys, FD_RNG_NOISE, 4, shape);
  const fd_var x_t = fd_flow_noise(g, s->latents, s->noise, s->sigma, s->c.dtype);
  fd_params_grads(s->c.dit->params, g);
  if (s->c.accumulation == 1) fd_graph_new_grads(g);
  const struct fd_dit_inputs in = {
      .x = x_t, .t = s->timestep, .states = s->text, .text = &s->tv, .checkpoint = s->c.checkpointing};
  const fd_var out = fd_dit(s->c.dit, g, &in);
  s->loss = fd_flow_loss(g, out, s->latents, s->noise, s->c.precondition ? x_t : 0, s->sigma, s->weight, s->c.precondition);
  fd_graph_keep(g, s->loss);
  const fd_var sum = fd_graph_rows(g, s->micro_control, FD_CONTROL_LOSS, 1);
  fd_graph_emit(g, FD_OP_colsum, &(struct fd_colsum_args){.acc = 1u << 2},
                (fd_var[]){fd_graph_view(g, s->loss, 2, (const int64_t[]){B, 1}), 0, sum});

  fd_graph_phase(g, fd_step_phase_name[FD_PHASE_BACKWARD]);
  if (s->c.accumulation == 1) emit_start(g, sum, s->n_buckets); /* here, since a run of ops may end with all sums joined */
  const fd_var dloss = fd_graph_tensor(g, FD_F32, 1, &B);
  fd_graph_emit(g, FD_OP_fill, &(struct fd_fill_args){.value = 1.0f / (float)(B * s->c.accumulation)}, &dloss);
  if (s->c.accumulation == 1) fd_graph_on_grad_done(g, on_grad_done, s);
  fd_graph_backward(g, 1, &s->loss, &dloss);
  FD_TRY(fd_graph_status(g));
  if (s->c.accumulation == 1)
    for (int b = 0; b < s->n_buckets; b++)
      if (!s->bucket[b].value) start_bucket(s, g, b);
done:
  return st;
}

static fd_status build_optimizer(fd_step *s) {
  fd_status st = FD_OK;
  FD_TRY(fd_graph_create(s->ctx, "optimizer", &s->opt));
  fd_graph *g = s->opt;
  fd_graph_phase(g, fd_step_phase_name[FD_PHASE_OPTIMIZER]);
  s->opt_control = fd_graph_external(g, "control", FD_F32, 1, (const int64_t[]){FD_CONTROL_COUNT}, 0);
  const fd_var sum = fd_graph_rows(g, s->opt_control, FD_CONTROL_LOSS, 1);
  for (int b = 0; b < s->n_buckets; b++) s->bucket[b].wait = bucket_value(s, g, b);
  if (s->c.accumulation > 1) {
    emit_start(g, sum, s->n_buckets);
    for (int b = 0; b < s->n_buckets; b++) emit_start(g, s->bucket[b].wait, b);
  }
  emit_wait(g, sum, s->n_buckets);
  for (int b = 0; b < s->n_buckets; b++) emit_wait(g, s->bucket[b].wait, b);
  fd_optim_build(s->optim, g, s->opt_control);
  FD_TRY(fd_graph_status(g));
done:
  return st;
}

/* Runs of nodes of one phase; what has another name (recomputation) belongs to backward. */
static fd_status find_spans(fd_step *s) {
  const int n = fd_graph_n_nodes(s->micro);
  s->span = calloc((size_t)n + 1, sizeof *s->span);
  if (!s->span) return FD_FAIL(FD_ERR_NOMEM, "no memory for the phases of %d nodes", n);
  for (int i = 0; i < n; i++) {
    const void *args;
    const char *name;
    enum fd_step_phase phase = FD_PHASE_BACKWARD;
    fd_graph_node(s->micro, i, &args, &name);
    for (int p = 0; p < FD_PHASE_COUNT; p++)
      if (name && !strcmp(name, fd_step_phase_name[p])) phase = (enum fd_step_phase)p;
    if (!s->n_spans || s->span[s->n_spans - 1].phase != phase)
      s->span[s->n_spans++] = (struct span){.first = i, .phase = phase};
    s->span[s->n_spans - 1].last = i + 1;
  }
  const int marks = (int)s->c.accumulation * (s->n_spans + 1) + 2;
  s->mark = calloc((size_t)marks, sizeof *s->mark);
  if (!s->mark) return FD_FAIL(FD_ERR_NOMEM, "no memory for %d points in time", marks);
  s->n_marks = marks;
  return FD_OK;
}

static fd_status check(const struct fd_step_config *c) {
  if (c->batch < 1 || c->accumulation < 1 || c->max_length < 1)
    return FD_FAIL(FD_ERR_CONFIG, "data.batch_size %lld, trainer.gradient_accumulation_steps %lld, text length %lld: all must be at least 1",
                   (long long)c->batch, (long long)c->accumulation, (long long)c->max_length);
  if (c->batch * c->max_length > INT32_MAX / 4)
    return FD_FAIL(FD_ERR_CONFIG, "data.batch_size %lld x text length %lld is too large", (long long)c->batch, (long long)c->max_length);
  return FD_OK;
}

fd_status fd_step_create(fd_ctx *ctx, const struct fd_step_config *config, fd_step **out) {
  fd_status st = FD_OK;
  fd_step *s = NULL;
  size_t micro_bytes = 0, opt_bytes = 0;
  FD_TRY(check(config));
  s = calloc(1, sizeof *s);
  if (!s) FD_TRY(FD_FAIL(FD_ERR_NOMEM, "no memory for a training step"));
  s->ctx = ctx;
  s->c = *config;
  const struct fd_model_dims *dit = &config->dit->dims, *vae = config->vae ? &config->vae->dims : NULL;
  const int64_t B = config->batch, f = vae ? vae->factor : 1, P = dit->patch;
  if (config->height < 1 || config->width < 1 || config->height % (f * P) || config->width % (f * P))
    FD_TRY(FD_FAIL(FD_ERR_CONFIG, "data.resolution: %lld x %lld is not divisible by %lld (VAE factor %lld x patch %lld)",
                   (long long)config->height, (long long)config->width, (long long)(f * P), (long long)f, (long long)P));
  if (vae && vae->latent_channels != dit->in_channels)
    FD_TRY(FD_FAIL(FD_ERR_CONFIG, "model.in_channels is %lld, but the VAE's latents have %lld channels",
                   (long long)dit->in_channels, (long long)vae->latent_channels));
  if (dit->out_channels != dit->in_channels)
    FD_TRY(FD_FAIL(FD_ERR_CONFIG, "model.out_channels is %lld, must be model.in_channels (%lld) for training",
                   (long long)dit->out_channels, (long long)dit->in_channels));
  if (config->text_encoder && config->text_encoder->dims.width != dit->text_width)
    FD_TRY(FD_FAIL(FD_ERR_CONFIG, "model.text_hidden_size is %lld, but the text encoder's states have width %lld",
                   (long long)dit->text_width, (long long)config->text_encoder->dims.width));
  s->C = dit->in_channels;
  s->H = config->height / f;
  s->W = config->width / f;
  s->N = s->H / P * (s->W / P);
  s->host_ids = calloc((size_t)(B * config->max_length), sizeof(int32_t));
  s->host_keys = malloc((size_t)(4 * B) * sizeof(uint32_t));
  if (!s->host_ids || !s->host_keys) FD_TRY(FD_FAIL(FD_ERR_NOMEM, "no memory for a batch of %lld", (long long)B));
  int64_t rows = B * config->max_length;
  const int64_t tile = fd_count_tile(ctx, &rows, TEXT_TILE);
  FD_TRY(fd_text_create(B, rows, config->max_length, tile, &s->layout));
  if (!config->text_encoder) {
    s->host_text = malloc((size_t)(s->layout->T * dit->text_width) * sizeof(float));
    if (!s->host_text) FD_TRY(FD_FAIL(FD_ERR_NOMEM, "no memory for text states"));
  }
  s->c.optim.compute = config->dtype;
  s->c.optim.keep_g = config->accumulation == 1;
  FD_TRY(fd_optim_create(ctx, config->dit->params, &s->c.optim, &s->optim));
  FD_TRY(make_buckets(s));
  FD_TRY(build_micro(s));
  FD_TRY(build_optimizer(s));
  FD_TRY(fd_graph_plan(s->micro, &micro_bytes));
  FD_TRY(fd_graph_plan(s->opt, &opt_bytes));
  FD_TRY(find_spans(s));
  s->arena_bytes = micro_bytes > opt_bytes ? micro_bytes : opt_bytes;
  *out = s;
  s = NULL;
done:
  fd_step_destroy(&s);
  return st;
}

void fd_step_destroy(fd_step **s) {
  if (!s || !*s) return;
  fd_step *x = *s;
  fd_graph_destroy(&x->micro);
  fd_graph_destroy(&x->opt);
  fd_optim_destroy(&x->optim);
  if (x->arena) x->ctx->backend->free(x->ctx, x->arena);
  if (x->control) x->ctx->backend->free(x->ctx, x->control);
  free(x->bucket);
  free(x->span);
  for (int i = 0; i < x->n_marks; i++)
    if (x->mark[i]) x->ctx->backend->mark_free(x->ctx, &x->mark[i]);
  free(x->mark);
  fd_text_destroy(&x->layout);
  free(x->host_ids);
  free(x->host_text);
  free(x->host_keys);
  free(x);
  *s = NULL;
}

void fd_step_bytes(const fd_step *s, struct fd_step_bytes *bytes) {
  const fd_params *dit = s->c.dit->params;
  const size_t size = fd_dtype_bytes(s->c.dtype);
  memset(bytes, 0, sizeof *bytes);
  bytes->weights = (size_t)fd_params_flat_numel(dit) * size;
  bytes->gradients = (size_t)fd_params_flat_numel(dit) * sizeof(float);
  fd_optim_bytes(s->optim, &bytes->master, &bytes->moments, &bytes->ema);
  bytes->frozen = fd_params_frozen_bytes(dit, s->c.dtype);
  if (s->c.vae) bytes->frozen += fd_params_frozen_bytes(s->c.vae->params, s->c.dtype);
  if (s->c.text_encoder) bytes->frozen += fd_params_frozen_bytes(s->c.text_encoder->params, s->c.dtype);
  bytes->activations = s->arena_bytes;
  struct fd_graph_memory m;
  fd_graph_memory(s->micro, &m);
  bytes->copies = m.copies;
}

double fd_step_flop(const fd_step *s, enum fd_step_phase phase) {
  if (phase == FD_PHASE_COUNT) return fd_graph_flop(s->micro, NULL);
  return fd_graph_flop(phase == FD_PHASE_OPTIMIZER ? s->opt : s->micro, fd_step_phase_name[phase]);
}

int fd_step_buckets(const fd_step *s, int64_t *elements) {
  if (elements) *elements = fd_params_flat_numel(s->c.dit->params);
  return s->n_buckets;
}

fd_optim *fd_step_optim(fd_step *s) { return s->optim; }
fd_graph *fd_step_graph(fd_step *s, bool optimizer) { return optimizer ? s->opt : s->micro; }

fd_status fd_step_alloc(fd_step *s) {
  fd_status st = FD_OK;
  fd_params *dit = s->c.dit->params;
  FD_TRY(s->ctx->backend->alloc(s->ctx, s->arena_bytes, &s->arena));
  FD_TRY(s->ctx->backend->alloc(s->ctx, FD_CONTROL_COUNT * sizeof(float), (void **)&s->control));
  FD_TRY(fd_optim_alloc(s->optim));
  FD_TRY(fd_graph_attach(s->micro, s->arena, s->arena_bytes));
  FD_TRY(fd_graph_attach(s->opt, s->arena, s->arena_bytes));
  FD_TRY(fd_params_bind(dit, s->micro));
  if (s->c.vae) FD_TRY(fd_params_bind(s->c.vae->params, s->micro));
  if (s->c.text_encoder) FD_TRY(fd_params_bind(s->c.text_encoder->params, s->micro));
  fd_graph_bind(s->micro, s->micro_control, s->control);
  fd_graph_bind(s->opt, s->opt_control, s->control);
  for (int b = 0; b < s->n_buckets; b++) {
    float *data = fd_params_flat_grad(dit) + s->bucket[b].first;
    if (s->bucket[b].value) fd_graph_bind(s->micro, s->bucket[b].value, data);
    fd_graph_bind(s->opt, s->bucket[b].wait, data);
  }
  fd_optim_bind(s->optim, s->opt);
  FD_TRY(fd_graph_status(s->micro));
  FD_TRY(fd_graph_status(s->opt));
done:
  return st;
}

/* ---- a step ------------------------------------------------------------------------------------------------------- */

static fd_status mark(fd_step *s, int i) { return s->ctx->backend->mark(s->ctx, &s->mark[i]); }

fd_status fd_step_begin(fd_step *s, const struct fd_step_rates *rates) {
  float control[FD_CONTROL_COUNT] = {0};
  s->micro_at = 0;
  const double k = (double)(rates->update + 1);
  control[FD_CONTROL_LR] = (float)rates->lr;
  control[FD_CONTROL_BIAS1] = (float)(1.0 - pow(s->c.optim.beta1, k));
  control[FD_CONTROL_BIAS2] = (float)(1.0 - pow(s->c.optim.beta2, k));
  control[FD_CONTROL_EMA_DECAY] = (float)rates->ema_decay;
  control[FD_CONTROL_GRAD_SCALE] = 1.0f / (float)fd_comm_size(s->ctx->comm);
  return s->ctx->backend->to_device(s->ctx, s->control, control, sizeof control);
}

/* Where each sample's text lies, from the lengths; ids or states themselves. */
static fd_status set_text(fd_step *s, const struct fd_step_batch *b) {
  fd_status st = FD_OK;
  const int64_t B = s->c.batch, L = s->c.max_length;
  int64_t rows = 0;
  for (int64_t i = 0; i < B; i++) {
    const int64_t n = b->lengths[i];
    if (n < 1 || n > L)
      FD_TRY(FD_FAIL(FD_ERR_ARG, "a text of %lld tokens in a step planned for 1 to %lld", (long long)n, (long long)L));
    if (s->c.text_encoder) memcpy(s->host_ids + i * L, b->ids + rows, (size_t)n * sizeof(int32_t));
    rows += n;
  }
  FD_TRY(fd_text_pack(s->layout, B, s->host_ids, L, b->lengths));
  FD_TRY(fd_text_set(s->micro, &s->tv, s->layout));
  if (s->c.text_encoder) goto done;
  /* The rows that fill up the last tile belong to no sample, but are computed with: they must be finite. */
  const size_t row = (size_t)s->c.dit->dims.text_width * sizeof(float);
  memset(s->host_text, 0, (size_t)s->layout->count * row);
  memcpy(s->host_text, b->text, (size_t)rows * row);
  FD_TRY(fd_graph_set(s->micro, s->text_input, s->host_text, (size_t)s->layout->count * row));
done:
  return st;
}

fd_status fd_step_micro(fd_step *s, const struct fd_step_batch *b) {
  fd_status st = FD_OK;
  const int64_t B = s->c.batch;
  if (s->micro_at == s->c.accumulation)
    return FD_FAIL(FD_ERR_ARG, "a step of %lld micro-batches is given one more", (long long)s->c.accumulation);
  const size_t latents = (size_t)(B * s->H * s->W * s->C) * sizeof(float), row = (size_t)B * sizeof(float);
  if (s->c.vae)
    FD_TRY(fd_graph_set(s->micro, s->pixels, b->pixels, (size_t)(B * s->c.height * s->c.width * 3)));
  else
    FD_TRY(fd_graph_set(s->micro, s->latents, b->latents, latents));
  if (s->c.given_noise) FD_TRY(fd_graph_set(s->micro, s->noise, b->noise, latents));
  if (s->c.vae || !s->c.given_noise) {
    for (int64_t i = 0; i < B; i++) {
      const uint64_t sample = (uint64_t)b->sample[i];
      memcpy(s->host_keys + 4 * i,
             (const uint32_t[]){(uint32_t)b->seed, (uint32_t)(b->seed >> 32), (uint32_t)sample, (uint32_t)(sample >> 32)},
             4 * sizeof(uint32_t));
    }
    FD_TRY(fd_graph_set(s->micro, s->keys, s->host_keys, (size_t)(4 * B) * sizeof(uint32_t)));
  }
  FD_TRY(set_text(s, b));
  FD_TRY(fd_graph_set(s->micro, s->sigma, b->sigma, row));
  FD_TRY(fd_graph_set(s->micro, s->timestep, b->timestep, row));
  FD_TRY(fd_graph_set(s->micro, s->weight, b->weight, row));
  const int at = s->micro_at++ * (s->n_spans + 1);
  FD_TRY(mark(s, at));
  for (int i = 0; i < s->n_spans; i++) {
    FD_TRY(fd_graph_run_nodes(s->micro, s->span[i].first, s->span[i].last));
    FD_TRY(mark(s, at + i + 1));
  }
done:
  return st;
}

fd_status fd_step_update(fd_step *s) {
  fd_status st = FD_OK;
  const int at = (int)s->c.accumulation * (s->n_spans + 1);
  FD_TRY(mark(s, at));
  FD_TRY(fd_graph_run(s->opt));
  FD_TRY(mark(s, at + 1));
done:
  return st;
}

/* Where the time of this step went, once its results are there. */
static fd_status add_seconds(fd_step *s) {
  fd_status st = FD_OK;
  const struct fd_backend *b = s->ctx->backend;
  double t;
  for (int m = 0; m < s->micro_at; m++)
    for (int i = 0, at = m * (s->n_spans + 1); i < s->n_spans; i++) {
      FD_TRY(b->seconds(s->ctx, s->mark[at + i], s->mark[at + i + 1], &t));
      s->seconds[s->span[i].phase] += t;
    }
  const int at = (int)s->c.accumulation * (s->n_spans + 1);
  FD_TRY(b->seconds(s->ctx, s->mark[at], s->mark[at + 1], &t));
  s->seconds[FD_PHASE_OPTIMIZER] += t;
done:
  return st;
}

fd_status fd_step_result(fd_step *s, struct fd_step_result *result) {
  fd_status st = FD_OK;
  float control[FD_CONTROL_COUNT];
  FD_TRY(s->ctx->backend->from_device(s->ctx, control, s->control, sizeof control));
  const double samples = (double)(s->c.batch * s->c.accumulation) * fd_comm_size(s->ctx->comm);
  result->loss = control[FD_CONTROL_LOSS] / samples;
  result->grad_norm = control[FD_CONTROL_NORM];
  result->skipped = control[FD_CONTROL_SKIP] != 0;
  FD_TRY(add_seconds(s));
done:
  return st;
}

fd_status fd_step_losses(fd_step *s, float *losses) {
  return fd_graph_read(s->micro, s->loss, losses, (size_t)s->c.batch * sizeof(float));
}

void fd_step_take_seconds(fd_step *s, double seconds[FD_PHASE_COUNT]) {
  memcpy(seconds, s->seconds, sizeof s->seconds);
  memset(s->seconds, 0, sizeof s->seconds);
}
