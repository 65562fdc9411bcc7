// SPDX-License-Identifier: Apache-2.0
// `fdhpc bench CONFIG`: the training step of a configuration on this machine, with seeded random weights and synthetic pictures and captions; or
// sampling, or the VAE by itself. Needs no weights and no data. Steps are timed first without, then with a clock around every op, so that the second does not slow the first.
#include <errno.h>
#include <jansson.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "base/log.h"
#include "base/rng.h"
#include "cmd/cmd.h"
#include "graph/build.h"
#include "train/job.h"
#include "train/metrics.h"

enum { BENCH_MOST = 1000 }; /* repetitions */

struct op_sum {
  double seconds, flop, bytes;
  int64_t calls;
};

/* An op between two points (struct fd_backend). */
struct timed {
  enum fd_op op;
  const void *args;
  void *from, *to;
};

struct clock {
  struct timed *timed;
  int n, cap;
  fd_status st;
};

struct bench {
  const struct fd_options *opt;
  struct fd_parts parts;
  fd_ctx *ctx;
  fd_step *step;
  double peak; /* matmul rate of one rank, FLOP/s */
  /* host batch */
  unsigned char *pixels;
  int32_t *ids, *lengths;
  float *sigma, *timestep, *weight;
  int64_t *sample_index;
  int64_t tokens; /* drawn in all */
  /* clocks */
  struct op_sum ops[FD_OP_COUNT];
  struct clock clock;
  int64_t steps;
  double wall, best, median;
  double planned;  /* bytes of the step */
  int64_t clocked; /* steps with a clock around every op */
  double phase_s[FD_PHASE_COUNT];
  double program_bytes; /* resident before any memory of the plan */
  int64_t batches;      /* drawn in all */
  /* the work without training: of each piece all times, the best and the median */
  struct bench_piece {
    double seconds[BENCH_MOST], best, median;
    int n;
    int64_t images;
  } sample, encode, decode;
};

static double now(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

/* ---- a synthetic batch ------------------------------------------------------------------------------------------- */

static fd_status batch_alloc(struct bench *b) {
  const int64_t B = b->opt->data.batch_size, R = b->opt->data.resolution;
  b->pixels = malloc((size_t)(B * R * R * 3));
  b->ids = malloc((size_t)(B * b->opt->data.max_prompt_length) * sizeof *b->ids);
  b->lengths = malloc((size_t)B * sizeof *b->lengths);
  b->sigma = malloc((size_t)B * sizeof(float));
  b->timestep = malloc((size_t)B * sizeof(float));
  b->weight = malloc((size_t)B * sizeof(float));
  b->sample_index = malloc((size_t)B * sizeof *b->sample_index);
  if (!b->pixels || !b->ids || !b->lengths || !b->sigma || !b->timestep || !b->weight || !b->sample_index)
    return FD_FAIL(FD_ERR_NOMEM, "no memory for a batch");
  for (int64_t i = 0; i < B * R * R * 3; i++) b->pixels[i] = (unsigned char)(128 + 100 * sin(0.01 * (double)i));
  return FD_OK;
}

/* Caption `key`, of `least` to `most` tokens; their number. */
static int32_t caption_draw(const struct bench *b, uint64_t key, int64_t least, int64_t most, int32_t *ids) {
  const float vocab = (float)b->parts.text_encoder->dims.vocab;
  const int32_t n = (int32_t)(least + (int64_t)(fd_rng_uniform(1, FD_RNG_SYNTHETIC, key, 0) * (float)(most - least + 1)));
  for (int32_t k = 0; k < n; k++) ids[k] = (int32_t)(fd_rng_uniform(1, FD_RNG_SYNTHETIC, key, (uint32_t)k + 1) * vocab);
  return n;
}

/* Captions of `least` to `most` tokens; pictures stay, they cost the same. */
static void batch_draw(struct bench *b, int64_t step, int64_t least, int64_t most) {
  const int64_t B = b->opt->data.batch_size;
  int64_t at = 0;
  for (int64_t i = 0; i < B; i++) {
    const uint64_t key = (uint64_t)(step * B + i);
    b->lengths[i] = caption_draw(b, key, least, most, b->ids + at);
    at += b->lengths[i];
    const float u = fd_density_u(&b->parts.density, fd_density_draw(&b->parts.density, 1, key));
    fd_density_at(&b->parts.density, b->parts.scheduler, u, &b->sigma[i], &b->timestep[i], &b->weight[i]);
    b->sample_index[i] = (int64_t)key;
  }
  b->tokens += at;
  b->batches++;
}

static fd_status one_step(struct bench *b, int64_t step, int64_t least, int64_t most) {
  fd_status st = FD_OK;
  struct fd_step_result r;
  const struct fd_step_rates rates = {.lr = b->opt->optimizer.lr, .ema_decay = b->opt->ema.decay, .update = step};
  FD_TRY(fd_step_begin(b->step, &rates));
  for (int64_t m = 0; m < b->opt->trainer.gradient_accumulation_steps; m++) {
    batch_draw(b, step * b->opt->trainer.gradient_accumulation_steps + m, least, most);
    const struct fd_step_batch batch = {.pixels = b->pixels,
                                        .ids = b->ids,
                                        .lengths = b->lengths,
                                        .sigma = b->sigma,
                                        .timestep = b->timestep,
                                        .weight = b->weight,
                                        .sample = b->sample_index,
                                        .seed = 1};
    FD_TRY(fd_step_micro(b->step, &batch));
  }
  FD_TRY(fd_step_update(b->step));
  FD_TRY(fd_step_result(b->step, &r));
  if (r.skipped) FD_TRY(FD_FAIL(FD_ERR_NUMERIC, "bench: loss %g or gradient norm %g is not finite", r.loss, r.grad_norm));
done:
  return st;
}

/* ---- a clock around every op ------------------------------------------------------------------------------------- */

/* A host copy of a small tensor, for the caller to free; NULL: no memory. */
static int32_t *host_copy(fd_ctx *ctx, const fd_tensor *t) {
  int32_t *host = malloc(fd_tensor_bytes(t));
  if (host && ctx->backend->from_device(ctx, host, t->data, fd_tensor_bytes(t)) != FD_OK) {
    free(host);
    host = NULL;
  }
  return host;
}

static const fd_tensor *slot_named(enum fd_op op, const void *args, const char *name) {
  const struct fd_op_info *info = fd_op_info(op);
  for (int s = 0; s < info->n_slots; s++)
    if (!strcmp(info->slot[s], name)) return ((fd_tensor *const *)args)[s];
  return NULL;
}

/* Share of the capacity that this call really works on: rows in use, or pairs of queries and keys. */
static double share_used(fd_ctx *ctx, enum fd_op op, const void *args) {
  const struct fd_op_info *info = fd_op_info(op);
  double share = 1;
  if (op == FD_OP_attention_fwd || op == FD_OP_attention_bwd) {
    const fd_tensor *ranges = slot_named(op, args, "ranges");
    const int64_t max_q = op == FD_OP_attention_fwd ? ((const struct fd_attention_fwd_args *)args)->max_q : ((const struct fd_attention_bwd_args *)args)->max_q;
    const int64_t max_k = op == FD_OP_attention_fwd ? ((const struct fd_attention_fwd_args *)args)->max_k : ((const struct fd_attention_bwd_args *)args)->max_k;
    const double n = (double)ranges->shape[0] * (double)max_q * (double)max_k;
    int32_t *r = host_copy(ctx, ranges);
    double pairs = 0;
    for (int64_t i = 0; r && i < ranges->shape[0]; i++) pairs += (double)r[4 * i + 1] * (double)r[4 * i + 3];
    if (r && n > 0) share = pairs / n;
    free(r);
    return share;
  }
  const fd_tensor *count = slot_named(op, args, "count");
  if (!count) return 1;
  /* the first activation's rows are the capacity */
  fd_tensor *const *slot = args;
  const double rows = (double)fd_tensor_rows(slot[0]->ndim > 1 ? slot[0] : slot[info->n_slots - 1]);
  int32_t *used = host_copy(ctx, count);
  if (used && rows > 0) share = fmin(1, *used / rows);
  free(used);
  return share;
}

/* Remembers the op between two points of the device's own time; nothing waits, so ops follow each other as they do without a clock. */
static void clock_op(void *user, fd_ctx *ctx, enum fd_op op, const void *args, bool done) {
  struct bench *b = user;
  struct clock *c = &b->clock;
  if (c->st != FD_OK) return;
  if (!done && c->n == c->cap) {
    const int cap = c->cap ? 2 * c->cap : 1024;
    struct timed *t = realloc(c->timed, (size_t)cap * sizeof *t);
    if (!t) {
      c->st = FD_FAIL(FD_ERR_NOMEM, "no memory for the times of %d ops", cap);
      return;
    }
    memset(t + c->cap, 0, (size_t)(cap - c->cap) * sizeof *t);
    c->timed = t;
    c->cap = cap;
  }
  struct timed *t = &c->timed[c->n];
  if (!done) t->op = op, t->args = args;
  c->st = ctx->backend->mark(ctx, done ? &t->to : &t->from);
  if (done) c->n++;
}

/* The times of a step's ops, once it is over. Their args are the graph's, and counts are what they were. */
static fd_status read_clock(struct bench *b) {
  fd_status st = b->clock.st;
  for (int i = 0; i < b->clock.n && st == FD_OK; i++) {
    const struct timed *t = &b->clock.timed[i];
    struct op_sum *o = &b->ops[t->op];
    double s = 0, flop, bytes;
    st = b->ctx->backend->seconds(b->ctx, t->from, t->to, &s);
    const double share = share_used(b->ctx, t->op, t->args);
    fd_op_cost(t->op, t->args, &flop, &bytes);
    o->seconds += s;
    o->calls++;
    o->flop += flop * share;
    o->bytes += bytes * share;
  }
  b->clock.n = 0;
  return st;
}

static void free_clock(struct bench *b) {
  for (int i = 0; i < b->clock.cap; i++) {
    if (b->clock.timed[i].from) b->ctx->backend->mark_free(b->ctx, &b->clock.timed[i].from);
    if (b->clock.timed[i].to) b->ctx->backend->mark_free(b->ctx, &b->clock.timed[i].to);
  }
  free(b->clock.timed);
}

/* ---- what is told ------------------------------------------------------------------------------------------------ */

static int slower_first(const void *x, const void *y) {
  const struct op_sum *a = *(const struct op_sum *const *)x, *b = *(const struct op_sum *const *)y;
  return a->seconds < b->seconds ? 1 : a->seconds > b->seconds ? -1 : 0;
}

static double resident_bytes(void) {
  long pages = 0, resident = 0;
  FILE *f = fopen("/proc/self/statm", "r");
  if (f && fscanf(f, "%ld %ld", &pages, &resident) != 2) resident = 0;
  if (f) fclose(f);
  return (double)resident * (double)sysconf(_SC_PAGESIZE);
}

static double planned_bytes(const struct bench *b) {
  struct fd_step_bytes p;
  fd_step_bytes(b->step, &p);
  return (double)(p.weights + p.gradients + p.master + p.moments + p.ema + p.frozen + p.copies + p.activations) + b->program_bytes;
}

/* One piece of work without training, in the file. */
static void json_piece(json_t *root, const char *name, const struct bench_piece *p) {
  if (!p->n) return;
  json_t *all = json_array();
  for (int i = 0; i < p->n; i++) json_array_append_new(all, json_real(p->seconds[i]));
  json_object_set_new(root, name, json_pack("{s:I, s:f, s:f, s:f, s:o}", "images", (json_int_t)p->images, "images_per_s", (double)p->images / p->best,
                                            "best", p->best, "median", p->median, "seconds", all));
}

static int by_value(const void *x, const void *y) {
  const double a = *(const double *)x, b = *(const double *)y;
  return (a > b) - (a < b);
}

static fd_status write_json(const struct bench *b, const char *path, int ranks, double images_per_s) {
  json_t *root = json_pack("{s:s, s:i, s:i, s:s, s:f, s:f}", "backend", b->ctx->backend->name, "ranks", ranks, "threads_per_rank", b->ctx->n_threads,
                           "type", fd_dtype_name(b->parts.dtype), "matmul_flop_per_s", b->peak, "resident_bytes", resident_bytes());
  if (b->steps)
    json_object_update_new(root, json_pack("{s:f, s:f, s:f, s:f, s:I}", "images_per_s", images_per_s, "seconds_per_step", b->best, "median_seconds_per_step",
                                           b->median, "planned_bytes", b->planned, "clocked_steps", (json_int_t)b->clocked));
  json_t *phases = json_object(), *ops = json_object();
  for (int p = 0; p < FD_PHASE_COUNT && b->steps; p++) json_object_set_new(phases, fd_step_phase_name[p], json_real(b->phase_s[p] / (double)b->steps));
  for (int op = 0; op < FD_OP_COUNT; op++)
    if (b->ops[op].calls)
      json_object_set_new(ops, fd_op_info((enum fd_op)op)->name,
                          json_pack("{s:f, s:I, s:f, s:f}", "seconds", b->ops[op].seconds, "calls", (json_int_t)b->ops[op].calls, "flop", b->ops[op].flop,
                                    "bytes", b->ops[op].bytes));
  json_object_set_new(root, "phase_seconds_per_step", phases);
  json_object_set_new(root, "ops", ops);
  if (b->batches) json_object_set_new(root, "tokens_per_image", json_real((double)b->tokens / (double)(b->batches * b->opt->data.batch_size)));
  json_piece(root, "sample", &b->sample);
  json_piece(root, "encode", &b->encode);
  json_piece(root, "decode", &b->decode);
  const int failed = json_dump_file(root, path, JSON_INDENT(1) | JSON_REAL_PRECISION(6));
  json_decref(root);
  return failed ? FD_FAIL(FD_ERR_IO, "%s: cannot write: %s", path, strerror(errno)) : FD_OK;
}

static void print_result(const struct bench *b, int ranks, double images_per_s, int64_t clocked_steps) {
  const struct op_sum *order[FD_OP_COUNT];
  char planned[32], resident[32], program[32];
  double total = 0;
  printf("%.1f images/s on %d rank%s x %d thread%s, %s, %s backend: %.4f s per step at best, %.4f s on average of %lld steps\n", images_per_s, ranks,
         ranks == 1 ? "" : "s", b->ctx->n_threads, b->ctx->n_threads == 1 ? "" : "s", fd_dtype_name(b->parts.dtype), b->ctx->backend->name, b->best,
         b->wall / (double)b->steps, (long long)b->steps);
  printf("matrix products alone: %.1f GFLOP/s per rank\n", b->peak * 1e-9);
  fd_format_bytes(b->planned, planned, sizeof planned);
  fd_format_bytes(resident_bytes(), resident, sizeof resident);
  fd_format_bytes(b->program_bytes, program, sizeof program);
  printf("memory per rank: %s planned (%s of it program, libraries and kernels), %s resident\n\n", planned, program, resident);
  printf("%-12s %12s %8s\n", "phase", "ms / step", "share");
  for (int p = 0; p < FD_PHASE_COUNT; p++) total += b->phase_s[p];
  for (int p = 0; p < FD_PHASE_COUNT; p++)
    printf("%-12s %12.3f %7.1f%%\n", fd_step_phase_name[p], 1e3 * b->phase_s[p] / (double)b->steps, 100 * b->phase_s[p] / total);
  printf("\n%-18s %10s %12s %8s %10s %10s\n", "op", "calls/step", "ms / step", "share", "GFLOP/s", "GB/s");
  total = 0;
  for (int op = 0; op < FD_OP_COUNT; op++) order[op] = &b->ops[op], total += b->ops[op].seconds;
  qsort(order, FD_OP_COUNT, sizeof *order, slower_first);
  for (int i = 0; i < FD_OP_COUNT && order[i]->calls; i++) {
    const struct op_sum *o = order[i];
    printf("%-18s %10.1f %12.3f %7.1f%% %10.1f %10.1f\n", fd_op_info((enum fd_op)(o - b->ops))->name, (double)o->calls / (double)clocked_steps,
           1e3 * o->seconds / (double)clocked_steps, 100 * o->seconds / total, 1e-9 * o->flop / o->seconds, 1e-9 * o->bytes / o->seconds);
  }
}

/* ---- without training -------------------------------------------------------------------------------------------- */

/* A graph of the VAE alone, with memory. */
struct vae_half {
  fd_graph *graph;
  fd_var in;
  void *arena;
};

static fd_status open_half(struct bench *b, bool decode, struct vae_half *h) {
  fd_status st = FD_OK;
  size_t bytes;
  const int64_t B = b->opt->data.batch_size, R = b->opt->data.resolution, f = b->parts.vae->dims.factor;
  FD_TRY(fd_graph_create(b->ctx, decode ? "vae decode" : "vae encode", &h->graph));
  fd_var out = 0;
  if (decode) {
    h->in = fd_graph_input(h->graph, "latent", b->parts.dtype, 4, (int64_t[]){B, R / f, R / f, b->parts.vae->dims.latent_channels});
    out = fd_vae_decode(b->parts.vae, h->graph, h->in);
  } else {
    h->in = fd_graph_input(h->graph, "pixels", FD_U8, 4, (int64_t[]){B, R, R, 3});
    fd_vae_encode(b->parts.vae, h->graph, fd_pixels(h->graph, h->in, b->parts.dtype), 0, &out, NULL, NULL);
  }
  fd_graph_keep(h->graph, out);
  FD_TRY(fd_graph_plan(h->graph, &bytes));
  FD_TRY(b->ctx->backend->alloc(b->ctx, bytes, &h->arena));
  FD_TRY(fd_params_bind(b->parts.vae->params, h->graph));
  FD_TRY(fd_graph_attach(h->graph, h->arena, bytes));
done:
  return st;
}

static void close_half(struct bench *b, struct vae_half *h) {
  if (h->graph) fd_params_forget(b->parts.vae->params, h->graph);
  fd_graph_destroy(&h->graph);
  if (h->arena) b->ctx->backend->free(b->ctx, h->arena);
}

/* The first repetition is a warm-up and counts for nothing. */
static fd_status time_piece(struct bench *b, struct bench_piece *p, int64_t times, int64_t images, fd_status (*work)(struct bench *b, void *user), void *user) {
  fd_status st = FD_OK;
  double sorted[BENCH_MOST];
  p->images = images;
  for (int64_t i = -1; i < times; i++) {
    FD_TRY(b->ctx->backend->sync(b->ctx));
    const double t0 = now();
    FD_TRY(work(b, user));
    FD_TRY(b->ctx->backend->sync(b->ctx));
    if (i >= 0) p->seconds[p->n++] = now() - t0;
  }
  memcpy(sorted, p->seconds, (size_t)p->n * sizeof *sorted);
  qsort(sorted, (size_t)p->n, sizeof *sorted, by_value);
  p->best = sorted[0];
  p->median = sorted[p->n / 2];
done:
  return st;
}

static fd_status run_half(struct bench *b, void *user) {
  (void)b;
  return fd_graph_run(((struct vae_half *)user)->graph);
}

static fd_status bench_vae(struct bench *b, int64_t times) {
  fd_status st = FD_OK;
  struct vae_half half = {0};
  void *host = NULL;
  for (int decode = 0; decode < 2; decode++) {
    FD_TRY(open_half(b, decode, &half));
    const fd_tensor *in = fd_graph_get(half.graph, half.in);
    const int64_t n = fd_tensor_numel(in);
    host = malloc(fd_tensor_bytes(in));
    if (!host) FD_TRY(FD_FAIL(FD_ERR_NOMEM, "no memory for a batch"));
    if (decode) { /* normal numbers, of the type that the decoder reads */
      float *values = malloc(((size_t)n + 4) * sizeof *values);
      if (!values) FD_TRY(FD_FAIL(FD_ERR_NOMEM, "no memory for a batch"));
      for (int64_t i = 0; i < n; i += 4) fd_rng_normal4(1, FD_RNG_SYNTHETIC, 0, (uint32_t)(i / 4), values + i);
      fd_convert(host, in->dtype, values, FD_F32, n);
      free(values);
    } else
      memcpy(host, b->pixels, (size_t)n);
    FD_TRY(fd_graph_set(half.graph, half.in, host, fd_tensor_bytes(in)));
    FD_TRY(time_piece(b, decode ? &b->decode : &b->encode, times, b->opt->data.batch_size, run_half, &half));
    close_half(b, &half);
    half = (struct vae_half){0};
    free(host);
    host = NULL;
  }
done:
  close_half(b, &half);
  free(host);
  return st;
}

struct sampling {
  fd_sampler *sampler;
  struct fd_sample_request *request;
  int n;
  unsigned char *rgb;
};

static fd_status run_sampling(struct bench *b, void *user) {
  struct sampling *s = user;
  (void)b;
  return fd_sampler_run(s->sampler, s->n, s->request, s->rgb);
}

/* gen.batch_size pictures at a time, from captions of least to most tokens. */
static fd_status bench_sample(struct bench *b, int64_t times, int64_t least, int64_t most) {
  fd_status st = FD_OK;
  struct sampling s = {.n = (int)b->opt->gen.batch_size};
  int32_t *ids = malloc((size_t)(s.n * most) * sizeof *ids);
  s.request = calloc((size_t)s.n, sizeof *s.request);
  s.rgb = malloc((size_t)(s.n * b->opt->gen.H * b->opt->gen.W * 3));
  if (!ids || !s.request || !s.rgb) FD_TRY(FD_FAIL(FD_ERR_NOMEM, "no memory for a batch of pictures"));
  for (int i = 0; i < s.n; i++) {
    const int n = caption_draw(b, (uint64_t)i, least, most, ids + i * most);
    s.request[i] = (struct fd_sample_request){.seed = 1, .prompt_index = (uint32_t)i, .ids = ids + i * most, .n_ids = n};
  }
  FD_TRY(fd_parts_sampler(&b->parts, b->ctx, s.n, &s.sampler));
  FD_TRY(time_piece(b, &b->sample, times, s.n, run_sampling, &s));
done:
  fd_sampler_destroy(&s.sampler);
  free(ids);
  free(s.request);
  free(s.rgb);
  return st;
}

static void print_piece(const char *what, const struct bench_piece *p, int ranks) {
  if (p->n)
    printf("%s: %.2f images/s in batches of %lld per rank: %.4f s at best, %.4f s median of %d\n", what, (double)p->images * ranks / p->best,
           (long long)p->images, p->best, p->median, p->n);
}

/* The step's memory goes, weights stay. */
static void close_step(struct bench *b) {
  if (!b->step) return;
  fd_graph *g = fd_step_graph(b->step, false);
  fd_params_forget(b->parts.dit->params, g);
  fd_params_forget(b->parts.text_encoder->params, g);
  fd_params_forget(b->parts.vae->params, g);
  fd_step_destroy(&b->step);
}

/* ---- the command ------------------------------------------------------------------------------------------------- */

/* Random weights and a batch; with the step that trains them, or weights alone. */
static fd_status open_bench(struct bench *b, int ranks, bool trains) {
  fd_status st = FD_OK;
  struct fd_step_config config;
  FD_TRY(fd_parts_open(b->opt, FD_PARTS_CONFIG_ONLY, &b->parts));
  if (b->parts.shipped) fd_log_info("configurations come from input/models; weights are random");
  FD_TRY(fd_parts_layout(&b->parts, trains ? ranks : 1));
  if (trains) {
    fd_parts_step(&b->parts, b->opt->data.max_prompt_length, &config);
    FD_TRY(fd_step_create(b->ctx, &config, &b->step));
  }
  b->program_bytes = resident_bytes();
  FD_TRY(fd_params_alloc(b->parts.dit->params, b->ctx, b->parts.dtype, trains));
  FD_TRY(fd_params_alloc(b->parts.text_encoder->params, b->ctx, b->parts.dtype, false));
  FD_TRY(fd_params_alloc(b->parts.vae->params, b->ctx, b->parts.dtype, false));
  if (trains) FD_TRY(fd_step_alloc(b->step));
  FD_TRY(fd_model_init(b->parts.text_encoder, 2, NULL, NULL));
  FD_TRY(fd_model_init(b->parts.vae, 3, NULL, NULL));
  FD_TRY(fd_model_init(b->parts.dit, 1, trains ? fd_optim_fill : NULL, trains ? fd_step_optim(b->step) : NULL));
  if (trains) FD_TRY(fd_optim_publish(fd_step_optim(b->step)));
  FD_TRY(batch_alloc(b));
done:
  return st;
}

static fd_status bench_step(struct bench *b, fd_comm *comm, int64_t steps, int64_t least, int64_t most) {
  fd_status st = FD_OK;
  const int64_t warmup = 2, images = b->opt->data.batch_size * b->opt->trainer.gradient_accumulation_steps * fd_comm_size(comm);
  double *each = malloc((size_t)steps * sizeof *each);
  if (!each) st = FD_FAIL(FD_ERR_NOMEM, "no memory for the times of %lld steps", (long long)steps);
  if (st == FD_OK) st = open_bench(b, fd_comm_size(comm), true);
  FD_TRY(fd_agree(comm, st));
  FD_TRY(fd_matmul_peak(b->ctx, b->parts.dtype, &b->peak));
  for (int64_t i = 0; i < warmup; i++) FD_TRY(one_step(b, i, least, most));
  fd_step_take_seconds(b->step, b->phase_s);
  b->best = INFINITY;
  for (int64_t i = 0; i < steps; i++) {
    const double t0 = now();
    FD_TRY(one_step(b, warmup + i, least, most));
    each[i] = now() - t0;
    b->wall += each[i];
    b->steps++;
    if (each[i] < b->best) b->best = each[i];
    fd_log_progress("step %lld of %lld: %.3f s", (long long)i + 1, (long long)steps, each[i]);
  }
  fd_log_progress("%s", "");
  qsort(each, (size_t)steps, sizeof *each, by_value);
  b->median = each[steps / 2];
  fd_step_take_seconds(b->step, b->phase_s);
  b->clocked = steps < 5 ? steps : 5;
  fd_op_set_hook(clock_op, b);
  for (int64_t i = 0; i < b->clocked; i++) {
    FD_TRY(one_step(b, warmup + steps + i, least, most));
    FD_TRY(read_clock(b));
  }
  fd_op_set_hook(NULL, NULL);
  b->planned = planned_bytes(b);
  if (fd_comm_rank(comm) == 0) print_result(b, fd_comm_size(comm), (double)images / b->best, b->clocked);
done:
  fd_op_set_hook(NULL, NULL);
  free(each);
  return st;
}

/* "step", "step,vae", "sample": words of `known`. */
static fd_status read_what(const char *what, bool wanted[3]) {
  static const char *const known[] = {"step", "sample", "vae"};
  for (const char *at = what; *at;) {
    const size_t n = strcspn(at, ",");
    int k = 0;
    while (k < 3 && !(strlen(known[k]) == n && strncmp(at, known[k], n) == 0)) k++;
    if (k == 3) return FD_FAIL(FD_ERR_CONFIG, "bench: --what %s: step, sample, vae, or several with commas are wanted", what);
    wanted[k] = true;
    at += n + (at[n] == ',');
  }
  return FD_OK;
}

static fd_status run_bench(struct fd_run *run) {
  fd_status st = FD_OK;
  struct bench *b = calloc(1, sizeof *b);
  int64_t steps, least, most, times;
  bool wanted[3] = {false, false, false};
  const char *json = fd_run_flag(run, "--json"), *what = fd_run_flag(run, "--what");
  const int ranks = fd_comm_size(run->comm);
  if (!b) FD_TRY(FD_FAIL(FD_ERR_NOMEM, "no memory"));
  b->opt = run->opt;
  FD_TRY(read_what(what && *what ? what : "step", wanted));
  FD_TRY(fd_run_flag_int(run, "--steps", 10, 1, 1000000, &steps));
  FD_TRY(fd_run_flag_int(run, "--times", 3, 1, BENCH_MOST, &times));
  FD_TRY(fd_run_flag_int(run, "--least_tokens", 24 < b->opt->data.max_prompt_length ? 24 : 1, 1, b->opt->data.max_prompt_length, &least));
  FD_TRY(fd_run_flag_int(run, "--most_tokens", 120 < b->opt->data.max_prompt_length ? 120 : b->opt->data.max_prompt_length, least,
                         b->opt->data.max_prompt_length, &most));
  FD_TRY(fd_parts_context(run->opt, run->comm, &b->ctx));
  if (wanted[0]) FD_TRY(bench_step(b, run->comm, steps, least, most));
  close_step(b);
  if (!wanted[0]) {
    st = open_bench(b, ranks, false);
    FD_TRY(fd_agree(run->comm, st));
    FD_TRY(fd_matmul_peak(b->ctx, b->parts.dtype, &b->peak));
  }
  if (wanted[1]) st = bench_sample(b, times, least, most);
  FD_TRY(fd_agree(run->comm, st));
  if (wanted[2]) st = bench_vae(b, times);
  FD_TRY(fd_agree(run->comm, st));
  if (fd_comm_rank(run->comm) == 0) {
    char sampling[96];
    snprintf(sampling, sizeof sampling, "sampling, %lld steps with guidance %g", (long long)b->opt->gen.steps, b->opt->gen.scale);
    print_piece(sampling, &b->sample, ranks);
    print_piece("VAE encode", &b->encode, ranks);
    print_piece("VAE decode", &b->decode, ranks);
    const double images = (double)(b->opt->data.batch_size * b->opt->trainer.gradient_accumulation_steps * ranks);
    if (json) st = write_json(b, json, ranks, b->steps ? images / b->best : 0);
  }
  FD_TRY(fd_agree(run->comm, st));
done:
  if (b) {
    close_step(b);
    fd_parts_close(&b->parts);
    free_clock(b);
    fd_ctx_destroy(&b->ctx);
    free(b->pixels), free(b->ids), free(b->lengths), free(b->sigma), free(b->timestep), free(b->weight), free(b->sample_index);
  }
  free(b);
  return st;
}

const struct fd_command fd_cmd_bench = {
    .name = "bench",
    .args = "CONFIG",
    .help = "how fast a training step of this configuration runs here, by phase and by op; or sampling, or the VAE; needs no weights and no data",
    .takes_config = true,
    .flags = (const struct fd_flag[]){{"--what", "LIST", NULL, "step (default), sample (gen.batch_size pictures, gen.steps steps), vae (encode, decode), with commas"},
                                      {"--steps", "N", NULL, "steps to time (10); the best one counts"},
                                      {"--times", "N", NULL, "repetitions of sampling, encoding and decoding (3)"},
                                      {"--least_tokens", "N", NULL, "shortest caption (24)"},
                                      {"--most_tokens", "N", NULL, "longest caption (120)"},
                                      {"--json", "FILE", NULL, "write the figures to a file too"},
                                      {0}},
    .groups = "trainer model vae data gen",
    .run = run_bench,
};
