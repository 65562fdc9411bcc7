// SPDX-License-Identifier: Apache-2.0
// The training run. Set-up is agreed between ranks; within the step loop a failure ends the job at once, since the other ranks
// are already waiting in a sum.
#include "train/job.h"

#include <errno.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#include "base/files.h"
#include "base/log.h"
#include "base/threads.h"
#include "io/loader.h"
#include "train/metrics.h"
#include "train/stop.h"
#include "train/watchdog.h"

struct job {
  const fd_config *config;
  const struct fd_options *opt;
  fd_comm *comm;
  fd_ctx *ctx;
  fd_watchdog *watchdog;
  struct fd_parts parts;
  fd_dataset *data;
  fd_loader *loader;
  fd_step *step;
  fd_sampler *sampler; /* NULL: no pictures */
  char vae_hash[17], text_hash[17];
  char *used; /* the configuration as text */
  FILE *metrics; /* rank 0 */
  char checkpoints[4096];
  int64_t at;       /* steps done */
  int64_t start;    /* steps done when this run began */
  int64_t skipped;  /* of all steps done */
  int64_t bad_before; /* bad samples counted before this run, all ranks */
  int64_t bad;      /* and now, as of the last row of metrics */
  int64_t last_checkpoint; /* step of the newest one; -1 none */
  bool agreed;      /* a failure now is every rank's: no need to end the job by force */
  double peak;      /* matmul rate of all ranks together, FLOP/s */
  /* per micro-batch, on the host */
  float *sigma, *timestep, *weight;
  /* since the last row of metrics */
  struct {
    int64_t steps, images, losses;
    double seconds, data_s, loss, tokens;
  } sum;
};

static double now(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static int64_t global_batch(const struct job *j) { return j->opt->data.batch_size * fd_comm_size(j->comm); }
static int64_t step_images(const struct job *j) { return global_batch(j) * j->opt->trainer.gradient_accumulation_steps; }

/* ---- run folder ---------------------------------------------------------------------------------------------------- */

static fd_status path_in(const struct job *j, const char *name, char *out, size_t bytes) {
  if (snprintf(out, bytes, "%s/%s", j->opt->trainer.checkpoint_dir, name) >= (int)bytes)
    return FD_FAIL(FD_ERR_CONFIG, "trainer.checkpoint_dir: %s is too long", j->opt->trainer.checkpoint_dir);
  return FD_OK;
}

static fd_status open_folder(struct job *j) {
  fd_status st = FD_OK;
  char path[4096];
  FD_TRY(path_in(j, "checkpoints", j->checkpoints, sizeof j->checkpoints));
  if (fd_comm_rank(j->comm)) goto done;
  FD_TRY(fd_folder_make(j->opt->trainer.checkpoint_dir));
  FD_TRY(path_in(j, "log.txt", path, sizeof path));
  FD_TRY(fd_log_init(0, path));
  FD_TRY(path_in(j, "used.cfg", path, sizeof path));
  FD_TRY(fd_config_write(j->config, path));
done:
  return fd_agree(j->comm, st);
}

/* ---- set-up -------------------------------------------------------------------------------------------------------- */

static fd_status open_data(struct job *j) {
  fd_status st = FD_OK;
  const struct fd_options *opt = j->opt;
  const struct fd_dataset_config data = {.paths = opt->data.data_path.at,
                                         .n_paths = opt->data.data_path.n,
                                         .image_column = opt->data.image_column,
                                         .caption_columns = {opt->data.caption_column.synthetic, opt->data.caption_column.original},
                                         .index_path = opt->data.index,
                                         .index_dir = opt->trainer.checkpoint_dir,
                                         .strict = true,
                                         .verbose = true};
  FD_TRY(fd_dataset_open(j->comm, &data, &j->data));
  int threads = (int)opt->data.dataloader_num_workers;
  if (threads > fd_threads_available()) threads = fd_threads_available();
  const struct fd_loader_config loader = {.dataset = j->data,
                                          .prompt = j->parts.prompt,
                                          .seed = (uint64_t)opt->trainer.seed,
                                          .resolution = (int)opt->data.resolution,
                                          .micros = (int)opt->trainer.gradient_accumulation_steps,
                                          .global_batch = global_batch(j),
                                          .first = opt->data.batch_size * fd_comm_rank(j->comm),
                                          .count = opt->data.batch_size,
                                          .center_crop = opt->data.center_crop,
                                          .fast_jpeg = opt->data.fast_jpeg,
                                          .random_dropping_rate = opt->data.random_dropping_rate,
                                          .original_caption_rate = opt->data.original_caption_rate,
                                          .max_bad_fraction = opt->data.max_bad_fraction,
                                          .threads = threads};
  FD_TRY(fd_loader_create(&loader, &j->loader));
done:
  return fd_agree(j->comm, st);
}

static fd_status open_step(struct job *j) {
  fd_status st = FD_OK;
  struct fd_step_config config;
  FD_TRY(fd_parts_layout(&j->parts, fd_comm_size(j->comm)));
  fd_parts_step(&j->parts, fd_prompt_length(j->parts.prompt), &config);
  FD_TRY(fd_step_create(j->ctx, &config, &j->step));
  const size_t row = (size_t)j->opt->data.batch_size * sizeof(float);
  j->sigma = malloc(row);
  j->timestep = malloc(row);
  j->weight = malloc(row);
  if (!j->sigma || !j->timestep || !j->weight) FD_TRY(FD_FAIL(FD_ERR_NOMEM, "no memory for a batch"));
done:
  return fd_agree(j->comm, st);
}

static fd_status open_sampler(struct job *j) {
  const struct fd_options *opt = j->opt;
  if (!opt->trainer.sampling_steps || !opt->gen.val_prompt.n) return FD_OK;
  const fd_status st = fd_parts_sampler(&j->parts, j->ctx, opt->gen.val_prompt.n * opt->gen.n_samples, &j->sampler);
  return fd_agree(j->comm, st);
}

/* ---- checkpoints --------------------------------------------------------------------------------------------------- */

/* Bad samples of all ranks since this run began. Collective. */
static fd_status count_bad(struct job *j) {
  int64_t counts[FD_BAD_COUNT], bad = 0;
  fd_loader_counts(j->loader, counts);
  for (int i = 0; i < FD_BAD_COUNT; i++)
    if (i != FD_BAD_NONE) bad += counts[i];
  const fd_status st = fd_comm_allreduce_i64(j->comm, &bad, 1, FD_COMM_SUM);
  j->bad = j->bad_before + bad;
  return st;
}

static fd_status write_checkpoint(struct job *j) {
  fd_status st = FD_OK;
  struct fd_checkpoint_row *rows = NULL;
  struct fd_checkpoint_family families[FD_OPTIM_PARTS];
  fd_optim *optim = fd_step_optim(j->step);
  if (j->last_checkpoint == j->at) return FD_OK;
  fd_watchdog_step(j->watchdog, j->at);
  fd_watchdog_phase(j->watchdog, "checkpoint");
  const double t0 = now();
  FD_TRY(count_bad(j));
  FD_TRY(fd_optim_rows(j->parts.dit->params, &rows));
  const struct fd_checkpoint_meta meta = {.step = j->at,
                                          .samples_seen = j->at * step_images(j),
                                          .parameters = fd_params_total(j->parts.dit->params),
                                          .seed = (uint64_t)j->opt->trainer.seed,
                                          .config = j->used,
                                          .vae_hash = j->vae_hash,
                                          .text_encoder_hash = j->text_hash,
                                          .n_counters = 2,
                                          .counters = {{"skipped_steps", j->skipped}, {"bad_samples", j->bad}}};
  const int n = fd_optim_families(optim, false, families);
  FD_TRY(fd_checkpoint_write(j->comm, j->checkpoints, &meta, fd_params_count(j->parts.dit->params), rows, n, families));
  j->last_checkpoint = j->at;
  fd_log_info("step %lld: checkpoint %s/step-%lld.h5 written in %.1f s", (long long)j->at, j->checkpoints, (long long)j->at,
              now() - t0);
done:
  fd_optim_free_rows(j->parts.dit->params, &rows);
  return st;
}

static fd_status read_checkpoint(struct job *j, const char *path) {
  fd_status st = FD_OK;
  fd_checkpoint *c = NULL;
  struct fd_checkpoint_row *rows = NULL;
  struct fd_checkpoint_family families[FD_OPTIM_PARTS];
  fd_optim *optim = fd_step_optim(j->step);
  const int n_rows = fd_params_count(j->parts.dit->params);
  FD_TRY(fd_checkpoint_open(j->comm, path, &c));
  FD_TRY(fd_optim_rows(j->parts.dit->params, &rows));
  const int n = fd_optim_families(optim, true, families);
  for (int i = 0; i < n; i++) FD_TRY(fd_checkpoint_match(c, families[i].path, families[i].buffers, n_rows, rows));
  FD_TRY(fd_checkpoint_read(c, n_rows, rows, n, families));
  FD_TRY(fd_optim_publish(optim));
  const struct fd_checkpoint_meta *meta = fd_checkpoint_meta(c);
  j->at = meta->step;
  j->skipped = fd_checkpoint_counter(c, "skipped_steps");
  j->bad = j->bad_before = fd_checkpoint_counter(c, "bad_samples");
  j->last_checkpoint = j->at;
  if (meta->seed != (uint64_t)j->opt->trainer.seed)
    fd_log_warn("trainer.seed is %lld, but %s was trained with %llu: data order and noise change here",
                (long long)j->opt->trainer.seed, path, (unsigned long long)meta->seed);
  if (meta->samples_seen != j->at * step_images(j))
    fd_log_warn("%s has seen %lld samples in %lld steps, now a step has %lld: some samples are seen twice or not at all in this epoch",
                path, (long long)meta->samples_seen, (long long)j->at, (long long)step_images(j));
  if (*meta->vae_hash && strcmp(meta->vae_hash, j->vae_hash))
    fd_log_warn("the weights of vae.pretrained_model_name_or_path are not those that %s was trained with", path);
  if (*meta->text_encoder_hash && strcmp(meta->text_encoder_hash, j->text_hash))
    fd_log_warn("the weights of model.base are not those that %s was trained with", path);
  fd_log_info("resumed from %s: step %lld, %lld samples seen", path, (long long)j->at, (long long)meta->samples_seen);
done:
  fd_optim_free_rows(j->parts.dit->params, &rows);
  fd_checkpoint_close(&c);
  return st;
}

/* First weights: of the checkpoint that is asked for, or by the table's rules. */
static fd_status open_weights(struct job *j) {
  fd_status st = FD_OK;
  char *path = NULL;
  fd_optim *optim = fd_step_optim(j->step);
  j->last_checkpoint = -1;
  FD_TRY(fd_checkpoint_choose(j->comm, j->checkpoints, j->opt->trainer.resume_from, &path));
  FD_TRY(fd_model_init(j->parts.dit, (uint64_t)j->opt->trainer.seed, fd_optim_fill, optim));
  FD_TRY(fd_optim_publish(optim));
  if (path) FD_TRY(read_checkpoint(j, path));
  j->start = j->at;
done:
  free(path);
  return fd_agree(j->comm, st);
}

/* ---- what is told -------------------------------------------------------------------------------------------------- */

static void log_bytes(const char *what, size_t bytes) {
  char text[32];
  fd_format_bytes((double)bytes, text, sizeof text);
  fd_log_info("  %-34s %10s", what, text);
}

static void log_memory(const struct job *j) {
  struct fd_step_bytes b;
  fd_step_bytes(j->step, &b);
  fd_log_info("memory per rank:");
  log_bytes("weights", b.weights);
  log_bytes("gradients", b.gradients);
  log_bytes("master weights", b.master);
  log_bytes("moments", b.moments);
  log_bytes("EMA", b.ema);
  log_bytes("frozen weights", b.frozen);
  if (b.copies) log_bytes("frozen weights as kernels read them", b.copies);
  log_bytes("activations and scratch", b.activations);
  if (j->sampler) log_bytes("sampling", fd_sampler_bytes(j->sampler));
  log_bytes("sum", b.weights + b.gradients + b.master + b.moments + b.ema + b.frozen + b.copies + b.activations +
                       (j->sampler ? fd_sampler_bytes(j->sampler) : 0));
}

static fd_status log_plan(struct job *j) {
  fd_status st = FD_OK;
  const struct fd_options *opt = j->opt;
  const int ranks = fd_comm_size(j->comm);
  const int64_t k = opt->trainer.gradient_accumulation_steps, samples = fd_dataset_samples(j->data);
  fd_log_info("training: %s with %lld parameters, %lld layers of width %lld, in %s", j->parts.dit->cls->name,
              (long long)fd_params_total(j->parts.dit->params), (long long)j->parts.dit->dims.layers,
              (long long)j->parts.dit->dims.width, j->parts.dtype == FD_BF16 ? "bf16 (fp32 master weights)" : "fp32");
  fd_log_info("frozen: %s %s, %s %s", j->parts.text_encoder->cls->name, opt->model.base, j->parts.vae->cls->name,
              opt->vae.pretrained_model_name_or_path);
  log_memory(j);
  fd_log_info("batch: %lld per rank x %d rank%s x %lld accumulated = %lld pictures of %lld x %lld per step", (long long)opt->data.batch_size,
              ranks, ranks == 1 ? "" : "s", (long long)k, (long long)step_images(j), (long long)opt->data.resolution,
              (long long)opt->data.resolution);
  fd_log_info("data: %lld samples, %.6g steps per epoch", (long long)samples, (double)samples / (double)step_images(j));
  int64_t elements;
  const int buckets = fd_step_buckets(j->step, &elements);
  fd_log_info("sharding: stage %lld (every rank keeps the whole state); gradients summed in %d bucket%s of %.3g elements %s",
              (long long)opt->trainer.zero_stage, buckets, buckets == 1 ? "" : "s", (double)elements / buckets,
              k == 1 ? "while backward runs" : "after the last micro-batch");
  fd_log_info("backend: %s, %d thread%s per rank, %d node%s", j->ctx->backend->name, j->ctx->n_threads,
              j->ctx->n_threads == 1 ? "" : "s", j->comm ? j->comm->n_nodes : 1, j->comm && j->comm->n_nodes > 1 ? "s" : "");
  if (ranks < fd_threads_online() && fd_threads_available() == 1)
    fd_log_info("hint: each rank may use one of %d cores; mpirun --bind-to none gives it all of them", fd_threads_online());
  st = fd_matmul_peak(j->ctx, j->parts.dtype, &j->peak);
  FD_TRY(fd_agree(j->comm, st));
  FD_TRY(fd_comm_allreduce_f64(j->comm, &j->peak, 1, FD_COMM_SUM));
  fd_log_info("matrix products: %.3g TFLOP/s over all ranks; a step needs %.4g TFLOP", j->peak * 1e-12,
              fd_step_flop(j->step, FD_PHASE_COUNT) * (double)(k * ranks) * 1e-12);
done:
  return fd_agree(j->comm, st);
}

/* FLOP per second of all ranks, from the rate of steps; text is counted as long as it was. */
static double flop_rate(const struct job *j, double seconds_per_step) {
  const double text = fd_step_flop(j->step, FD_PHASE_TEXT), all = fd_step_flop(j->step, FD_PHASE_COUNT);
  const double capacity = (double)(j->opt->data.batch_size * fd_prompt_length(j->parts.prompt));
  const double micros = (double)(j->sum.steps * j->opt->trainer.gradient_accumulation_steps);
  const double used = j->sum.tokens / (micros * capacity);
  return (all - text * (1 - used)) * (double)(j->opt->trainer.gradient_accumulation_steps * fd_comm_size(j->comm)) / seconds_per_step;
}

/* Shows the step just done; writes a row every logging_steps. Collective when it writes a row. */
static fd_status tell(struct job *j, const struct fd_step_result *r, double lr) {
  fd_status st = FD_OK;
  const struct fd_options *opt = j->opt;
  const double per_step = j->sum.seconds / (double)j->sum.steps;
  const double images = (double)j->sum.images / j->sum.seconds;
  char left[32];
  fd_format_duration(per_step * (double)(opt->trainer.max_steps - j->at), left, sizeof left);
  if (fd_log_has_terminal()) {
    const double rate = flop_rate(j, per_step);
    fd_log_progress("step %lld/%lld  loss %.4f  |g| %.3f  lr %.2e  %.1f images/s  %.2f TFLOP/s (%.0f %%)  %s left", (long long)j->at,
                    (long long)opt->trainer.max_steps, r->loss, r->grad_norm, lr, images, rate * 1e-12, 100 * rate / j->peak, left);
  }
  if (j->at % opt->trainer.logging_steps && j->at != opt->trainer.max_steps) return FD_OK;
  FD_TRY(count_bad(j));
  struct fd_metrics_row row = {.step = j->at,
                               .loss = r->loss,
                               .loss_mean = j->sum.losses ? j->sum.loss / (double)j->sum.losses : NAN,
                               .grad_norm = r->grad_norm,
                               .lr = lr,
                               .images_per_s = images,
                               .seconds = per_step,
                               .data_s = j->sum.data_s / (double)j->sum.steps,
                               .comm_s = fd_comm_take_wait_s(j->comm) / (double)j->sum.steps,
                               .bad_samples = j->bad,
                               .skipped_steps = j->skipped,
                               .samples_seen = j->at * step_images(j)};
  fd_step_take_seconds(j->step, row.phase_s);
  for (int i = 0; i < FD_PHASE_COUNT; i++) row.phase_s[i] /= (double)j->sum.steps;
  if (j->metrics) FD_TRY(fd_metrics_write(j->metrics, &row));
  const double rate = flop_rate(j, per_step);
  fd_log_info("step %lld/%lld  loss %.5f (mean %.5f)  |g| %.4f  lr %.3e  %.1f images/s  %.3g TFLOP/s (%.0f %% of peak)  %s left",
              (long long)j->at, (long long)opt->trainer.max_steps, r->loss, row.loss_mean, r->grad_norm, lr, images, rate * 1e-12,
              100 * rate / j->peak, left);
  memset(&j->sum, 0, sizeof j->sum);
done:
  return st;
}

static fd_status sample(struct job *j) {
  fd_status st = FD_OK;
  char dir[4096], name[64];
  fd_optim *optim = fd_step_optim(j->step);
  if (!j->sampler) return FD_OK;
  fd_watchdog_step(j->watchdog, j->at);
  fd_watchdog_phase(j->watchdog, "sampling");
  const double t0 = now();
  snprintf(name, sizeof name, "samples/step-%lld", (long long)j->at);
  FD_TRY(path_in(j, name, dir, sizeof dir));
  st = fd_folder_make(dir);
  FD_TRY(fd_agree(j->comm, st));
  FD_TRY(fd_optim_use_ema(optim, true));
  FD_TRY(fd_sample_prompts(j->sampler, j->comm, j->opt->gen.val_prompt.n, j->opt->gen.val_prompt.at, (int)j->opt->gen.n_samples,
                           (uint64_t)j->opt->gen.seed, dir, false, NULL, NULL));
  FD_TRY(fd_optim_use_ema(optim, false));
  fd_log_info("step %lld: pictures in %s (%.1f s)", (long long)j->at, dir, now() - t0);
done:
  return st;
}

/* ---- the loop ------------------------------------------------------------------------------------------------------ */

static fd_status micro_batch(struct job *j, int micro) {
  fd_status st = FD_OK;
  struct fd_batch b;
  double wait = 0;
  fd_watchdog_phase(j->watchdog, "data");
  FD_TRY(fd_loader_get(j->loader, j->at, micro, &b, &wait));
  j->sum.data_s += wait;
  j->sum.tokens += (double)b.total;
  const uint64_t seed = (uint64_t)j->opt->trainer.seed;
  for (int i = 0; i < b.B; i++) {
    const float u = fd_density_u(&j->parts.density, fd_density_draw(&j->parts.density, seed, (uint64_t)b.position[i]));
    fd_density_at(&j->parts.density, j->parts.scheduler, u, &j->sigma[i], &j->timestep[i], &j->weight[i]);
  }
  const struct fd_step_batch batch = {.pixels = b.pixels,
                                      .ids = b.ids,
                                      .lengths = b.len,
                                      .sigma = j->sigma,
                                      .timestep = j->timestep,
                                      .weight = j->weight,
                                      .sample = b.position,
                                      .seed = seed};
  fd_watchdog_phase(j->watchdog, "forward and backward");
  FD_TRY(fd_step_micro(j->step, &batch));
done:
  return st;
}

static fd_status one_step(struct job *j) {
  fd_status st = FD_OK;
  const struct fd_options *opt = j->opt;
  const int64_t every = opt->ema.update_steps, done_steps = j->at + 1;
  struct fd_step_result r;
  j->agreed = false;
  const bool average = every > 0 && done_steps % every == 0;
  const struct fd_step_rates rates = {
      .lr = opt->optimizer.lr *
            fd_lr_factor(j->parts.lr, j->at, opt->lr_scheduler.num_warmup_steps, opt->trainer.max_steps),
      .ema_decay = average ? fd_ema_decay(opt->ema.decay, opt->ema.warmup, done_steps / every - 1) : 1.0,
      .update = j->at - j->skipped};
  const double t0 = now();
  fd_watchdog_step(j->watchdog, j->at);
  FD_TRY(fd_step_begin(j->step, &rates));
  for (int m = 0; m < (int)opt->trainer.gradient_accumulation_steps; m++) FD_TRY(micro_batch(j, m));
  fd_watchdog_phase(j->watchdog, "optimizer");
  FD_TRY(fd_step_update(j->step));
  FD_TRY(fd_step_result(j->step, &r));
  j->at++;
  j->sum.steps++;
  j->sum.images += step_images(j);
  j->sum.seconds += now() - t0;
  if (r.skipped) {
    j->skipped++;
    if (!fd_comm_rank(j->comm))
      fd_log_warn("step %lld skipped: loss %g, gradient norm %g (%lld so far; trainer.max_skipped_steps %lld)", (long long)j->at,
                  r.loss, r.grad_norm, (long long)j->skipped, (long long)opt->trainer.max_skipped_steps);
  } else {
    j->sum.losses++;
    j->sum.loss += r.loss;
  }
  FD_TRY(tell(j, &r, rates.lr));
  j->agreed = true;
  if (j->skipped > opt->trainer.max_skipped_steps)
    FD_TRY(FD_FAIL(FD_ERR_NUMERIC,
                   "step %lld: loss or gradient was not finite in %lld steps (trainer.max_skipped_steps %lld); lower optimizer.lr, "
                   "or look at the pictures",
                   (long long)j->at, (long long)j->skipped, (long long)opt->trainer.max_skipped_steps));
  if (opt->trainer.sampling_steps && j->at % opt->trainer.sampling_steps == 0) FD_TRY(sample(j));
  if (opt->trainer.checkpointing_steps && j->at % opt->trainer.checkpointing_steps == 0) FD_TRY(write_checkpoint(j));
done:
  return st;
}

/* A failure within a step may be one rank's alone while the others wait for it: it ends the job. Failures of what follows the step
 * (too many skipped steps, pictures, checkpoints) are every rank's. */
static fd_status loop(struct job *j) {
  fd_status st = FD_OK;
  int signal_number = 0;
  while (j->at < j->opt->trainer.max_steps) {
    st = one_step(j);
    if (st != FD_OK && j->agreed) goto done;
    if (st != FD_OK) {
      fd_log_progress("%s", "");
      fd_log_error("step %lld: %s (%s)", (long long)j->at, fd_status_message(), fd_status_where());
      fd_log_close();
      fd_comm_abort(j->comm, fd_status_exit_code(st));
    }
    FD_TRY(fd_stop_requested(j->comm, &signal_number));
    if (!signal_number) continue;
    fd_log_info("step %lld: signal %d received, stopping", (long long)j->at, signal_number);
    break;
  }
  FD_TRY(write_checkpoint(j));
done:
  fd_log_progress("%s", "");
  return st;
}

static fd_status set_up(struct job *j) {
  fd_status st = FD_OK;
  char path[4096];
  FD_TRY(open_folder(j));
  fd_config_log_unused(j->config);
  FD_TRY(fd_parts_context(j->opt, j->comm, &j->ctx));
  st = fd_parts_open(j->opt, 0, &j->parts);
  FD_TRY(fd_agree(j->comm, st));
  FD_TRY(open_data(j));
  FD_TRY(open_step(j));
  FD_TRY(fd_parts_load(&j->parts, j->ctx, j->comm));
  FD_TRY(fd_parts_hash(&j->parts, j->comm, j->vae_hash, j->text_hash));
  FD_TRY(open_sampler(j));
  st = fd_step_alloc(j->step);
  FD_TRY(fd_agree(j->comm, st));
  FD_TRY(open_weights(j));
  FD_TRY(log_plan(j));
  st = FD_OK;
  if (!fd_comm_rank(j->comm)) {
    st = path_in(j, "metrics.csv", path, sizeof path);
    if (st == FD_OK) st = fd_metrics_open(path, j->start, &j->metrics);
  }
  FD_TRY(fd_agree(j->comm, st));
  FD_TRY(fd_watchdog_create(j->comm, j->opt->trainer.watchdog_minutes * 60, &j->watchdog));
done:
  if (st == FD_ERR_NOMEM && j->step) log_memory(j); /* what it was wanted for */
  return st;
}

fd_status fd_train_run(const fd_config *config, fd_comm *comm) {
  fd_status st = FD_OK;
  struct job job = {.config = config, .opt = fd_config_options(config), .comm = comm}, *j = &job;
  fd_stop_install();
  j->used = fd_config_text(config);
  if (!j->used) FD_TRY(FD_FAIL(FD_ERR_NOMEM, "no memory for the configuration's text"));
  FD_TRY(set_up(j));
  if (j->at >= j->opt->trainer.max_steps)
    fd_log_info("nothing to do: step %lld of trainer.max_steps %lld is done", (long long)j->at, (long long)j->opt->trainer.max_steps);
  FD_TRY(loop(j));
done:
  fd_watchdog_destroy(&j->watchdog);
  if (j->metrics) fclose(j->metrics);
  fd_sampler_destroy(&j->sampler);
  fd_loader_destroy(&j->loader);
  fd_dataset_destroy(&j->data);
  fd_step_destroy(&j->step);
  fd_parts_close(&j->parts);
  fd_ctx_destroy(&j->ctx);
  free(j->used);
  free(j->sigma);
  free(j->timestep);
  free(j->weight);
  return st;
}
