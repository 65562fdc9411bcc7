// SPDX-License-Identifier: Apache-2.0
// From options to models: found, opened, laid out, loaded.
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "base/log.h"
#include "base/models.h"
#include "base/rng.h"
#include "base/threads.h"
#include "graph/backend.h"
#include "graph/build.h"
#include "io/safetensors.h"
#include "train/job.h"

/* Sizes of the products that are timed for the machine's peak: larger ones only while they take less than this. */
enum { PEAK_LEAST = 1024, PEAK_MOST = 8192 };
#define PEAK_SECONDS 1e-3

static fd_status open_scheduler(const struct fd_options *opt, fd_scheduler **out) {
  return fd_scheduler_create(opt->noise_scheduler.num_train_timesteps, opt->noise_scheduler.shift, out);
}

static fd_status open_prompt(struct fd_parts *p) {
  fd_status st = FD_OK;
  const struct fd_options *opt = p->opt;
  FD_TRY(fd_model_find(opt, "data.tokenizer", opt->data.tokenizer, "", &p->tokenizer_dir));
  FD_TRY(fd_tokenizer_open(p->tokenizer_dir, &p->tokenizer));
  if (fd_tokenizer_vocabulary(p->tokenizer) > p->text_encoder->dims.vocab)
    FD_TRY(FD_FAIL(FD_ERR_CONFIG, "data.tokenizer %s has %d ids, but the text encoder %s knows %lld only", p->tokenizer_dir,
                   fd_tokenizer_vocabulary(p->tokenizer), p->text_dir, (long long)p->text_encoder->dims.vocab));
  const struct fd_prompt_config config = {.instruction = opt->data.instruction,
                                          .max_prompt_length = opt->data.max_prompt_length,
                                          .apply_chat_template = opt->data.apply_chat_template,
                                          .add_generation_prompt = opt->data.add_generation_prompt};
  FD_TRY(fd_prompt_create(p->tokenizer, &config, &p->prompt));
done:
  return st;
}

static fd_status find(const struct fd_options *opt, bool config_only, const char *key, const char *name, const char *subfolder,
                      char **folder, bool *shipped) {
  bool here = false;
  if (!config_only) return fd_model_find(opt, key, name, subfolder, folder);
  const fd_status st = fd_model_find_config(opt, key, name, subfolder, folder, &here);
  *shipped = *shipped || here;
  return st;
}

fd_status fd_parts_open(const struct fd_options *opt, unsigned flags, struct fd_parts *out) {
  fd_status st = FD_OK;
  json_t *json = NULL;
  struct fd_parts p = {.opt = opt};
  const bool config_only = flags & FD_PARTS_CONFIG_ONLY;
  p.dtype = strcmp(opt->trainer.mixed_precision, "bf16") ? FD_F32 : FD_BF16;
  FD_TRY(fd_lr_parse(opt->lr_scheduler.name, &p.lr));
  p.density = (struct fd_density){.logit_mean = opt->trainer.logit_mean,
                                  .logit_std = opt->trainer.logit_std,
                                  .mode_scale = opt->trainer.mode_scale};
  FD_TRY(fd_weighting_parse(opt->trainer.weighting_scheme, &p.density.scheme));
  FD_TRY(open_scheduler(opt, &p.scheduler));
  FD_TRY(find(opt, config_only, "model.base", opt->model.base, "", &p.text_dir, &p.shipped));
  FD_TRY(find(opt, config_only, "vae.pretrained_model_name_or_path", opt->vae.pretrained_model_name_or_path, opt->vae.subfolder,
              &p.vae_dir, &p.shipped));
  FD_TRY(fd_model_open(p.text_dir, &p.text_encoder));
  FD_TRY(fd_model_open(p.vae_dir, &p.vae));
  if (p.text_encoder->cls->family != FD_FAMILY_TEXT)
    FD_TRY(FD_FAIL(FD_ERR_CONFIG, "model.base: %s holds a %s, wanted a text encoder", p.text_dir, p.text_encoder->cls->name));
  if (p.vae->cls->family != FD_FAMILY_VAE)
    FD_TRY(FD_FAIL(FD_ERR_CONFIG, "vae.pretrained_model_name_or_path: %s holds a %s, wanted a VAE", p.vae_dir, p.vae->cls->name));
  FD_TRY(fd_dit_config(opt, p.text_encoder->json, &json));
  FD_TRY(fd_model_create("model", json, &p.dit));
  if (!config_only) FD_TRY(open_prompt(&p));
  *out = p;
  memset(&p, 0, sizeof p);
done:
  json_decref(json);
  fd_parts_close(&p);
  return st;
}

void fd_parts_close(struct fd_parts *p) {
  fd_prompt_destroy(&p->prompt);
  fd_tokenizer_destroy(&p->tokenizer);
  fd_model_destroy(&p->dit);
  fd_model_destroy(&p->text_encoder);
  fd_model_destroy(&p->vae);
  fd_scheduler_destroy(&p->scheduler);
  free(p->text_dir);
  free(p->vae_dir);
  free(p->tokenizer_dir);
  memset(p, 0, sizeof *p);
}

void fd_parts_step(const struct fd_parts *p, int64_t max_length, struct fd_step_config *out) {
  const struct fd_options *opt = p->opt;
  *out = (struct fd_step_config){.dit = p->dit,
                                 .text_encoder = p->text_encoder,
                                 .vae = p->vae,
                                 .dtype = p->dtype,
                                 .batch = opt->data.batch_size,
                                 .accumulation = opt->trainer.gradient_accumulation_steps,
                                 .height = opt->data.resolution,
                                 .width = opt->data.resolution,
                                 .max_length = max_length,
                                 .text_index = (int)opt->model.text_hidden_states_index,
                                 .precondition = opt->trainer.precondition_outputs,
                                 .checkpointing = opt->trainer.enable_gradient_checkpointing,
                                 .optim = {.zero_stage = opt->trainer.zero_stage,
                                           .beta1 = opt->optimizer.betas[0],
                                           .beta2 = opt->optimizer.betas[1],
                                           .eps = opt->optimizer.eps,
                                           .weight_decay = opt->optimizer.weight_decay,
                                           .max_norm = opt->trainer.gradient_clipping,
                                           .ema = opt->ema.update_steps > 0}};
}

fd_status fd_parts_layout(struct fd_parts *p, int ranks) {
  fd_status st = FD_OK;
  FD_TRY(fd_params_layout(p->dit->params, true, ranks));
  FD_TRY(fd_params_layout(p->text_encoder->params, false, ranks));
  FD_TRY(fd_params_layout(p->vae->params, false, ranks));
  fd_params_set_type(p->dit->params, p->dtype);
  fd_params_set_type(p->text_encoder->params, p->dtype);
  fd_params_set_type(p->vae->params, p->dtype);
done:
  return st;
}

fd_status fd_parts_load(struct fd_parts *p, fd_ctx *ctx, fd_comm *comm) {
  const fd_status st = fd_params_alloc(p->dit->params, ctx, p->dtype, true);
  return st == FD_OK ? fd_parts_load_frozen(p, ctx, comm) : fd_agree(comm, st);
}

fd_status fd_parts_load_frozen(struct fd_parts *p, fd_ctx *ctx, fd_comm *comm) {
  fd_status st = FD_OK;
  fd_params_share(p->text_encoder->params, comm); /* one copy per node, read once */
  fd_params_share(p->vae->params, comm);
  FD_TRY(fd_params_alloc(p->text_encoder->params, ctx, p->dtype, false));
  FD_TRY(fd_params_alloc(p->vae->params, ctx, p->dtype, false));
  FD_TRY(fd_model_load(p->text_encoder, p->text_dir, NULL, NULL));
  FD_TRY(fd_model_load(p->vae, p->vae_dir, NULL, NULL));
done:
  return fd_agree(comm, st);
}

/* "auto" is each rank's own choice, but they must compute alike. */
static fd_status same_backend(fd_comm *comm, const struct fd_backend *backend) {
  int64_t i = 0;
  while (fd_backend_at((int)i) && fd_backend_at((int)i) != backend) i++;
  int64_t ends[2] = {i, -i};
  const fd_status st = fd_comm_allreduce_i64(comm, ends, 2, FD_COMM_MIN);
  const int64_t least = ends[0], most = -ends[1];
  if (st != FD_OK || least == most) return st;
  if (i == least) return FD_OK; /* the others say it */
  return FD_FAIL(FD_ERR_UNSUPPORTED,
                 "trainer.backend \"auto\": no usable device for backend %s here, but other ranks have one; start no ranks on this node, or set "
                 "trainer.backend = \"cpu\"",
                 fd_backend_at((int)least)->name);
}

fd_status fd_parts_context(const struct fd_options *opt, fd_comm *comm, fd_ctx **out) {
  fd_status st = FD_OK;
  const struct fd_backend *backend = NULL;
  const unsigned flags = (opt->trainer.deterministic ? (unsigned)FD_CTX_DETERMINISTIC : 0u) |
                         (opt->trainer.share_gpu ? (unsigned)FD_CTX_SHARE_DEVICE : 0u) | (opt->trainer.cuda_graph ? 0u : (unsigned)FD_CTX_NO_RECORD);
  st = fd_backend_find(opt->trainer.backend, &backend);
  FD_TRY(fd_agree(comm, st));
  st = same_backend(comm, backend);
  FD_TRY(fd_agree(comm, st));
  FD_TRY(fd_ctx_create_with(backend, fd_threads_setup(), comm, flags, out));
  (*out)->cache_dir = opt->trainer.checkpoint_dir;
done:
  return st; /* the same on every rank */
}

fd_status fd_parts_sampler(const struct fd_parts *p, fd_ctx *ctx, int64_t pictures, fd_sampler **out) {
  const struct fd_options *opt = p->opt;
  const struct fd_sampler_parts parts = {
      .ctx = ctx, .dit = p->dit, .text_encoder = p->text_encoder, .vae = p->vae, .tokenizer = p->tokenizer};
  const struct fd_sampler_config config = {.batch = pictures < opt->gen.batch_size ? pictures : opt->gen.batch_size,
                                           .height = opt->gen.H,
                                           .width = opt->gen.W,
                                           .num_inference_steps = (int)opt->gen.steps,
                                           .guidance_scale = opt->gen.scale,
                                           .negative_prompt = opt->gen.negative_prompt,
                                           .instruction = opt->gen.instruction,
                                           .max_length = opt->data.max_prompt_length,
                                           .text_index = (int)opt->model.text_hidden_states_index,
                                           .shift = p->scheduler->shift,
                                           .num_train_timesteps = p->scheduler->num_train_timesteps,
                                           .dtype = p->dtype};
  return fd_sampler_create(&parts, &config, out);
}

static fd_status hash_folder(fd_comm *comm, const char *dir, char hash[17]) {
  fd_status st = FD_OK;
  fd_safetensors *files = NULL;
  const char **paths = NULL;
  int n = 0;
  FD_TRY(fd_safetensors_open(dir, &files));
  const int count = fd_safetensors_count(files);
  paths = calloc((size_t)count + 1, sizeof *paths);
  if (!paths) FD_TRY(FD_FAIL(FD_ERR_NOMEM, "no memory for %d names", count));
  for (int i = 0; i < count; i++) {
    const int file = fd_safetensors_at(files, i)->file;
    if (file >= n) n = file + 1;
    paths[file] = fd_safetensors_path(files, i);
  }
  int used = 0; /* a file without tensors has no path here */
  for (int i = 0; i < n; i++)
    if (paths[i]) paths[used++] = paths[i];
  FD_TRY(fd_checkpoint_hash_files(comm, used, paths, hash));
done:
  free(paths);
  fd_safetensors_close(&files);
  return st;
}

fd_status fd_parts_hash(const struct fd_parts *p, fd_comm *comm, char vae[17], char text[17]) {
  fd_status st = FD_OK;
  FD_TRY(hash_folder(comm, p->vae_dir, vae));
  FD_TRY(hash_folder(comm, p->text_dir, text));
done:
  return fd_agree(comm, st);
}

/* Numbers from -1 to 1: a GPU multiplies zeros faster than data. */
static fd_status fill_matrix(fd_ctx *ctx, fd_dtype dtype, char *at, int64_t n) {
  enum { PIECE = 1 << 16 };
  fd_status st = FD_OK;
  float *values = malloc(PIECE * sizeof *values);
  char *typed = malloc(PIECE * sizeof *values);
  if (!values || !typed) FD_TRY(FD_FAIL(FD_ERR_NOMEM, "no memory"));
  for (int i = 0; i < PIECE; i++) values[i] = 2 * fd_rng_uniform(1, FD_RNG_SYNTHETIC, 0, (uint32_t)i) - 1;
  fd_convert(typed, dtype, values, FD_F32, PIECE);
  for (int64_t i = 0; i < n; i += PIECE)
    FD_TRY(ctx->backend->to_device(ctx, at + (size_t)i * fd_dtype_bytes(dtype), typed, (size_t)(n - i < PIECE ? n - i : PIECE) * fd_dtype_bytes(dtype)));
  FD_TRY(ctx->backend->sync(ctx));
done:
  free(values);
  free(typed);
  return st;
}

/* Best rate of a product of n x n matrices, and its time. */
static fd_status matmul_rate(fd_ctx *ctx, fd_dtype dtype, int64_t n, double *flop_per_s, double *seconds) {
  fd_status st = FD_OK;
  fd_graph *g = NULL;
  void *memory[2] = {NULL, NULL}, *arena = NULL, *from = NULL, *to = NULL;
  size_t bytes = 0;
  const int64_t shape[] = {n, n};
  const struct fd_backend *device = ctx->backend;
  FD_TRY(fd_graph_create(ctx, "peak", &g));
  const fd_var x = fd_graph_external(g, "x", dtype, 2, shape, 0), w = fd_graph_external(g, "w", dtype, 2, shape, FD_T_CONST);
  fd_graph_keep(g, fd_linear(g, x, w, 0, 0));
  FD_TRY(fd_graph_plan(g, &bytes));
  for (int i = 0; i < 2; i++) FD_TRY(device->alloc(ctx, (size_t)(n * n) * fd_dtype_bytes(dtype), &memory[i]));
  for (int i = 0; i < 2; i++) FD_TRY(fill_matrix(ctx, dtype, memory[i], n * n));
  FD_TRY(device->alloc(ctx, bytes, &arena));
  FD_TRY(fd_graph_attach(g, arena, bytes));
  fd_graph_bind(g, x, memory[0]);
  fd_graph_bind(g, w, memory[1]);
  *seconds = INFINITY;
  for (int i = 0; i < 4; i++) { /* the first creates what the others use */
    double s;
    FD_TRY(device->mark(ctx, &from));
    FD_TRY(fd_graph_run(g));
    FD_TRY(device->mark(ctx, &to));
    FD_TRY(device->seconds(ctx, from, to, &s));
    if (s < *seconds) *seconds = s;
  }
  *flop_per_s = 2.0 * (double)(n * n) * (double)n / *seconds;
done:
  fd_graph_destroy(&g);
  for (int i = 0; i < 2; i++)
    if (memory[i]) device->free(ctx, memory[i]);
  if (arena) device->free(ctx, arena);
  if (from) device->mark_free(ctx, &from);
  if (to) device->mark_free(ctx, &to);
  return st;
}

fd_status fd_matmul_peak(fd_ctx *ctx, fd_dtype dtype, double *flop_per_s) {
  double best = 0, rate = 0, seconds = 0;
  for (int64_t n = PEAK_LEAST; n <= PEAK_MOST && seconds < PEAK_SECONDS; n *= 2) {
    const fd_status st = matmul_rate(ctx, dtype, n, &rate, &seconds);
    if (st == FD_ERR_NOMEM && best > 0) break; /* the run itself has the memory */
    if (st != FD_OK) return st;
    if (rate > best) best = rate;
  }
  *flop_per_s = best;
  return FD_OK;
}
