// SPDX-License-Identifier: Apache-2.0
// `fdhpc plan CONFIG --ranks N`: what a run needs, before it is run: parameters, memory, FLOP, communication, checkpoint. Needs no weights and
// allocates nothing: the graphs of the step are built and planned as for training.
#include <stdio.h>

#include "base/log.h"
#include "cmd/cmd.h"
#include "train/job.h"
#include "train/metrics.h"

static void line_bytes(const char *what, double bytes) {
  char text[32];
  fd_format_bytes(bytes, text, sizeof text);
  printf("  %-44s %14s\n", what, text);
}

static void line_flop(const char *what, double flop) { printf("  %-44s %11.4g GFLOP\n", what, flop * 1e-9); }

/* 2660490816 -> "2 660 490 816" */
static void grouped(int64_t n, char out[32]) {
  char digits[24];
  const int length = snprintf(digits, sizeof digits, "%lld", (long long)n);
  int at = 0;
  for (int i = 0; i < length; i++) {
    if (i && (length - i) % 3 == 0) out[at++] = ' ';
    out[at++] = digits[i];
  }
  out[at] = 0;
}

static void print_plan(const struct fd_options *opt, const struct fd_parts *parts, const fd_step *step, int ranks, const char *backend) {
  struct fd_step_bytes b;
  char count[32];
  int64_t elements;
  const double images = (double)(opt->data.batch_size), parameters = (double)fd_params_total(parts->dit->params);
  const double k = (double)opt->trainer.gradient_accumulation_steps;
  const int buckets = fd_step_buckets(step, &elements);
  fd_step_bytes(step, &b);
  grouped(fd_params_total(parts->dit->params), count);
  printf("%s: %s parameters, %lld layers of width %lld, trained in %s\n", parts->dit->cls->name, count, (long long)parts->dit->dims.layers,
         (long long)parts->dit->dims.width, parts->dtype == FD_BF16 ? "bf16 with fp32 master weights" : "fp32");
  grouped(fd_params_total(parts->text_encoder->params), count);
  printf("text encoder %s: %s parameters, frozen\n", opt->model.base, count);
  grouped(fd_params_total(parts->vae->params), count);
  printf("VAE %s: %s parameters, frozen\n", opt->vae.pretrained_model_name_or_path, count);
  printf("%d ranks x %lld pictures x %lld accumulated = %lld pictures of %lld x %lld per step\n", ranks, (long long)opt->data.batch_size,
         (long long)opt->trainer.gradient_accumulation_steps, (long long)(ranks * opt->data.batch_size * opt->trainer.gradient_accumulation_steps),
         (long long)opt->data.resolution, (long long)opt->data.resolution);
  if (parts->shipped) printf("configurations come from input/models: training needs the published weights\n");

  printf("\nmemory per rank (%s backend, ZeRO stage %lld)\n", backend, (long long)opt->trainer.zero_stage);
  line_bytes("master weights (fp32)", (double)b.master);
  line_bytes("moments (fp32, two)", (double)b.moments);
  line_bytes("EMA (fp32)", (double)b.ema);
  line_bytes("weights, moments and EMA together", (double)(b.master + b.moments + b.ema));
  line_bytes("weights to compute with", (double)b.weights);
  line_bytes("gradients (fp32)", (double)b.gradients);
  line_bytes("frozen weights", (double)b.frozen);
  if (b.copies) line_bytes("frozen weights as the kernels read them", (double)b.copies);
  line_bytes("activations and scratch", (double)b.activations);
  line_bytes("sum", (double)(b.master + b.moments + b.ema + b.weights + b.gradients + b.frozen + b.copies + b.activations));

  printf("\nwork per picture (text at its longest, %lld tokens)\n", (long long)opt->data.max_prompt_length);
  line_flop("DiT, forward", fd_step_flop(step, FD_PHASE_FORWARD) / images);
  line_flop("DiT, backward", fd_step_flop(step, FD_PHASE_BACKWARD) / images);
  line_flop("text encoder", fd_step_flop(step, FD_PHASE_TEXT) / images);
  line_flop("VAE", fd_step_flop(step, FD_PHASE_VAE) / images);
  line_flop("sum", fd_step_flop(step, FD_PHASE_COUNT) / images);
  printf("  %-44s %11.4g TFLOP\n", "one step, all ranks", fd_step_flop(step, FD_PHASE_COUNT) * k * ranks * 1e-12);

  printf("\ncommunication per step and rank: %d buckets, fp32\n", buckets);
  line_bytes("sent and received by a ring (2 (n-1)/n)", 2.0 * (ranks - 1) / ranks * 4 * (double)elements);
  printf("\nfiles\n");
  line_bytes("checkpoint (weights, moments, EMA)", parameters * 4 * (b.ema ? 4 : 3));
}

static fd_status run_plan(struct fd_run *run) {
  fd_status st = FD_OK;
  struct fd_parts parts = {0};
  struct fd_step_config config;
  fd_step *step = NULL;
  fd_ctx *ctx = NULL;
  int64_t ranks;
  FD_TRY(fd_run_flag_int(run, "--ranks", fd_comm_size(run->comm), 1, 1000000, &ranks));
  FD_TRY(fd_parts_context(run->opt, run->comm, &ctx));
  if (fd_comm_rank(run->comm)) goto done; /* one rank's work */
  ctx->cache_dir = NULL; /* nothing is run */
  FD_TRY(fd_parts_open(run->opt, FD_PARTS_CONFIG_ONLY, &parts));
  FD_TRY(fd_parts_layout(&parts, (int)ranks));
  fd_parts_step(&parts, run->opt->data.max_prompt_length, &config);
  FD_TRY(fd_step_create(ctx, &config, &step));
  print_plan(run->opt, &parts, step, (int)ranks, ctx->backend->name);
done:
  st = fd_agree(run->comm, st);
  fd_step_destroy(&step);
  fd_parts_close(&parts);
  fd_ctx_destroy(&ctx);
  return st;
}

const struct fd_command fd_cmd_plan = {
    .name = "plan",
    .args = "CONFIG",
    .help = "what a run needs: parameters, memory per rank, FLOP, communication, checkpoint; needs no weights",
    .takes_config = true,
    .flags = (const struct fd_flag[]){{"--ranks", "N", NULL, "ranks of the run; default: those of this command"}, {0}},
    .groups = "trainer model ema vae data",
    .run = run_plan,
};
