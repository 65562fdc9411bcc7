// SPDX-License-Identifier: Apache-2.0
// `fdhpc bench CONFIG`: the training step of a configuration on this machine, with seeded random weights and synthetic pictures and captions.
// Needs no weights and no data. Steps are timed first without, then with a clock around every op, so that the second does not slow the first.
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
#include "train/job.h"
#include "train/metrics.h"

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
  int64_t *sample;
  int64_t tokens; /* drawn in all */
  /* clocks */
  struct op_sum ops[FD_OP_COUNT];
  struct clock clock;
  int64_t steps;
  double wall, best;
  double phase_s[FD_PHASE_COUNT];
  double program_bytes; /* resident before any memory of the plan */
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
  b->sample = malloc((size_t)B * sizeof *b->sample);
  if (!b->pixels || !b->ids || !b->lengths || !b->sigma || !b->timestep || !b->weight || !b->sample)
    return FD_FAIL(FD_ERR_NOMEM, "no memory for a batch");
  for (int64_t i = 0; i < B * R * R * 3; i++) b->pixels[i] = (unsigned char)(128 + 100 * sin(0.01 * (double)i));
  return FD_OK;
}

/* Captions of `least` to `most` tokens; pictures stay, they cost the same. */
static void batch_draw(struct bench *b, int64_t step, int64_t least, int64_t most) {
  const int64_t B = b->opt->data.batch_size, vocab = b->parts.text_encoder->dims.vocab;
  int64_t at = 0;
  for (int64_t i = 0; i < B; i++) {
    const uint64_t key = (uint64_t)(step * B + i);
    b->lengths[i] = (int32_t)(least + (int64_t)(fd_rng_uniform(1, FD_RNG_SYNTHETIC, key, 0) * (float)(most - least + 1)));
    for (int32_t k = 0; k < b->lengths[i]; k++)
      b->ids[at++] = (int32_t)(fd_rng_uniform(1, FD_RNG_SYNTHETIC, key, (uint32_t)k + 1) * (float)vocab);
    const float u = fd_density_u(&b->parts.density, fd_density_draw(&b->parts.density, 1, key));
    fd_density_at(&b->parts.density, b->parts.scheduler, u, &b->sigma[i], &b->timestep[i], &b->weight[i]);
    b->sample[i] = (int64_t)key;
  }
  b->tokens += at;
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
                                        .sample = b->sample,
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

static fd_status write_json(const struct bench *b, const char *path, int ranks, double images_per_s) {
  json_t *root = json_pack("{s:s, s:i, s:i, s:s, s:f, s:f, s:f, s:f, s:f}", "backend", b->ctx->backend->name, "ranks", ranks, "threads_per_rank",
                           b->ctx->n_threads, "type", fd_dtype_name(b->parts.dtype), "images_per_s", images_per_s, "seconds_per_step", b->best,
                           "matmul_flop_per_s", b->peak, "planned_bytes", planned_bytes(b), "resident_bytes", resident_bytes());
  json_t *phases = json_object(), *ops = json_object();
  for (int p = 0; p < FD_PHASE_COUNT; p++) json_object_set_new(phases, fd_step_phase_name[p], json_real(b->phase_s[p] / (double)b->steps));
  for (int op = 0; op < FD_OP_COUNT; op++)
    if (b->ops[op].calls)
      json_object_set_new(ops, fd_op_info((enum fd_op)op)->name,
                          json_pack("{s:f, s:I, s:f, s:f}", "seconds", b->ops[op].seconds, "calls", (json_int_t)b->ops[op].calls, "flop", b->ops[op].flop,
                                    "bytes", b->ops[op].bytes));
  json_object_set_new(root, "phase_seconds_per_step", phases);
  json_object_set_new(root, "ops", ops);
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
  fd_format_bytes(planned_bytes(b), planned, sizeof planned);
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

/* ---- the command ------------------------------------------------------------------------------------------------- */

static fd_status open_bench(struct bench *b, fd_comm *comm) {
  fd_status st = FD_OK;
  struct fd_step_config config;
  FD_TRY(fd_parts_open(b->opt, FD_PARTS_CONFIG_ONLY, &b->parts));
  if (b->parts.shipped) fd_log_info("configurations come from input/models; weights are random");
  FD_TRY(fd_parts_layout(&b->parts, fd_comm_size(comm)));
  fd_parts_step(&b->parts, b->opt->data.max_prompt_length, &config);
  FD_TRY(fd_step_create(b->ctx, &config, &b->step));
  b->program_bytes = resident_bytes();
  FD_TRY(fd_params_alloc(b->parts.dit->params, b->ctx, b->parts.dtype, true));
  FD_TRY(fd_params_alloc(b->parts.text_encoder->params, b->ctx, b->parts.dtype, false));
  FD_TRY(fd_params_alloc(b->parts.vae->params, b->ctx, b->parts.dtype, false));
  FD_TRY(fd_step_alloc(b->step));
  FD_TRY(fd_model_init(b->parts.text_encoder, 2, NULL, NULL));
  FD_TRY(fd_model_init(b->parts.vae, 3, NULL, NULL));
  FD_TRY(fd_model_init(b->parts.dit, 1, fd_optim_fill, fd_step_optim(b->step)));
  FD_TRY(fd_optim_publish(fd_step_optim(b->step)));
  FD_TRY(batch_alloc(b));
done:
  return st;
}

static fd_status run_bench(struct fd_run *run) {
  fd_status st = FD_OK;
  struct bench *b = calloc(1, sizeof *b);
  int64_t steps, warmup = 2, clocked, least, most;
  const char *json = fd_run_flag(run, "--json");
  const int ranks = fd_comm_size(run->comm);
  if (!b) FD_TRY(FD_FAIL(FD_ERR_NOMEM, "no memory"));
  b->opt = run->opt;
  FD_TRY(fd_run_flag_int(run, "--steps", 10, 1, 1000000, &steps));
  FD_TRY(fd_run_flag_int(run, "--least_tokens", 24 < b->opt->data.max_prompt_length ? 24 : 1, 1, b->opt->data.max_prompt_length, &least));
  FD_TRY(fd_run_flag_int(run, "--most_tokens", 120 < b->opt->data.max_prompt_length ? 120 : b->opt->data.max_prompt_length, least,
                         b->opt->data.max_prompt_length, &most));
  clocked = steps < 5 ? steps : 5;
  FD_TRY(fd_parts_context(run->opt, run->comm, &b->ctx));
  st = open_bench(b, run->comm);
  FD_TRY(fd_agree(run->comm, st));
  FD_TRY(fd_matmul_peak(b->ctx, b->parts.dtype, &b->peak));
  for (int64_t i = 0; i < warmup; i++) FD_TRY(one_step(b, i, least, most));
  fd_step_take_seconds(b->step, b->phase_s);
  b->best = INFINITY;
  for (int64_t i = 0; i < steps; i++) {
    const double t0 = now();
    FD_TRY(one_step(b, warmup + i, least, most));
    const double s = now() - t0;
    b->wall += s;
    b->steps++;
    if (s < b->best) b->best = s;
    fd_log_progress("step %lld of %lld: %.3f s", (long long)i + 1, (long long)steps, s);
  }
  fd_log_progress("%s", "");
  fd_step_take_seconds(b->step, b->phase_s);
  fd_op_set_hook(clock_op, b);
  for (int64_t i = 0; i < clocked; i++) {
    FD_TRY(one_step(b, warmup + steps + i, least, most));
    FD_TRY(read_clock(b));
  }
  fd_op_set_hook(NULL, NULL);
  const double images = (double)(b->opt->data.batch_size * b->opt->trainer.gradient_accumulation_steps * ranks) / b->best;
  if (fd_comm_rank(run->comm) == 0) {
    print_result(b, ranks, images, clocked);
    if (json) st = write_json(b, json, ranks, images);
  }
  FD_TRY(fd_agree(run->comm, st));
done:
  fd_op_set_hook(NULL, NULL);
  if (b) {
    fd_step_destroy(&b->step);
    fd_parts_close(&b->parts);
    free_clock(b);
    fd_ctx_destroy(&b->ctx);
    free(b->pixels), free(b->ids), free(b->lengths), free(b->sigma), free(b->timestep), free(b->weight), free(b->sample);
  }
  free(b);
  return st;
}

const struct fd_command fd_cmd_bench = {
    .name = "bench",
    .args = "CONFIG",
    .help = "how fast a training step of this configuration runs here, by phase and by op; needs no weights and no data",
    .takes_config = true,
    .flags = (const struct fd_flag[]){{"--steps", "N", NULL, "steps to time (10); the best one counts"},
                                      {"--least_tokens", "N", NULL, "shortest caption (24)"},
                                      {"--most_tokens", "N", NULL, "longest caption (120)"},
                                      {"--json", "FILE", NULL, "write the figures to a file too"},
                                      {0}},
    .groups = "trainer model vae data",
    .run = run_bench,
};
