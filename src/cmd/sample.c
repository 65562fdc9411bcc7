// SPDX-License-Identifier: Apache-2.0
// `fdhpc sample CONFIG`: pictures from a checkpoint. Flags have the names of the original's sampling scripts.
#include <errno.h>
#include <jansson.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/log.h"
#include "cmd/cmd.h"
#include "train/job.h"

struct prompts {
  json_t *json;       /* owns the texts of a JSON file */
  char *text;         /* owns those of a text file */
  const char **at;
  int n;
};

static void prompts_free(struct prompts *p) {
  json_decref(p->json);
  free(p->text);
  free(p->at);
}

/* One prompt a line; empty lines are left out. */
static fd_status read_lines(const char *path, struct prompts *p) {
  fd_status st = FD_OK;
  size_t bytes = 0, room = 0;
  FILE *f = fopen(path, "rb");
  if (!f) return FD_FAIL(FD_ERR_IO, "%s: %s", path, strerror(errno));
  if (getdelim(&p->text, &room, 0, f) < 0) FD_TRY(FD_FAIL(FD_ERR_FORMAT, "%s: the file is empty", path));
  bytes = strlen(p->text);
  p->at = calloc(bytes + 1, sizeof *p->at);
  if (!p->at) FD_TRY(FD_FAIL(FD_ERR_NOMEM, "no memory for the prompts"));
  for (char *save, *line = strtok_r(p->text, "\r\n", &save); line; line = strtok_r(NULL, "\r\n", &save)) p->at[p->n++] = line;
done:
  fclose(f);
  return st;
}

/* A JSON list of strings, as the original's prompt files, or a text file. */
static fd_status read_prompts(const char *path, struct prompts *p) {
  fd_status st = FD_OK;
  json_error_t error;
  const size_t n = strlen(path);
  if (n < 5 || strcmp(path + n - 5, ".json") != 0) FD_TRY(read_lines(path, p));
  else {
    p->json = json_load_file(path, 0, &error);
    if (!p->json)
      FD_TRY(FD_FAIL(error.line < 0 ? FD_ERR_IO : FD_ERR_FORMAT, "%s: line %d: %s", path, error.line, error.text));
    if (!json_is_array(p->json)) FD_TRY(FD_FAIL(FD_ERR_FORMAT, "%s: expected a JSON list of strings", path));
    p->at = calloc(json_array_size(p->json) + 1, sizeof *p->at);
    if (!p->at) FD_TRY(FD_FAIL(FD_ERR_NOMEM, "no memory for the prompts"));
    for (size_t i = 0; i < json_array_size(p->json); i++) {
      p->at[p->n] = json_string_value(json_array_get(p->json, i));
      if (!p->at[p->n++]) FD_TRY(FD_FAIL(FD_ERR_FORMAT, "%s: entry %zu is no string", path, i));
    }
  }
  if (p->n == 0) FD_TRY(FD_FAIL(FD_ERR_FORMAT, "%s: no prompt", path));
done:
  return st;
}

/* The DiT's weights: the moving average of a checkpoint, or its raw weights. */
static fd_status load_dit(struct fd_run *run, fd_model *dit, const char *dir, const char *tag, bool ema, int64_t *step) {
  fd_status st = FD_OK;
  fd_checkpoint *c = NULL;
  struct fd_checkpoint_row *rows = NULL;
  float *values = NULL;
  char folder[4096], *path = NULL;
  const int n = fd_params_count(dit->params);
  snprintf(folder, sizeof folder, "%s/checkpoints", dir);
  FD_TRY(fd_checkpoint_choose(run->comm, folder, tag, &path));
  if (!path)
    FD_TRY(FD_FAIL(FD_ERR_IO, "%s: no checkpoint; train first, or name the run with --checkpoint (trainer.checkpoint_dir)", folder));
  FD_TRY(fd_checkpoint_open(run->comm, path, &c));
  const char *family = ema ? "ema" : "model";
  if (ema && !fd_checkpoint_has(c, family))
    FD_TRY(FD_FAIL(FD_ERR_FORMAT, "%s: it has no moving average (ema.update_steps was 0); use --no-ema_weights", path));
  /* buffers are computed from the configuration, so the first values are right for them */
  FD_TRY(fd_model_init(dit, 0, NULL, NULL));
  FD_TRY(fd_optim_rows(dit->params, &rows));
  FD_TRY(fd_checkpoint_match(c, family, true, n, rows));
  for (int i = 0; i < n; i++) {
    if (rows[i].buffer) continue;
    values = malloc((size_t)fd_params_row(dit->params, i)->numel * sizeof *values);
    if (!values) FD_TRY(FD_FAIL(FD_ERR_NOMEM, "no memory for %s", rows[i].name));
    FD_TRY(fd_checkpoint_read_row(c, family, &rows[i], values));
    FD_TRY(fd_params_set(dit->params, i, values));
    free(values);
    values = NULL;
  }
  *step = fd_checkpoint_meta(c)->step;
  fd_log_info("%s: %s of step %lld", path, ema ? "moving average" : "weights", (long long)*step);
done:
  free(values);
  fd_optim_free_rows(dit->params, &rows);
  fd_checkpoint_close(&c);
  free(path);
  return fd_agree(run->comm, st);
}

static void show_progress(void *user, int64_t done, int64_t total) {
  (void)user;
  fd_log_progress("%lld of %lld pictures", (long long)done, (long long)total);
}

static fd_status run_sample(struct fd_run *run) {
  fd_status st = FD_OK;
  const struct fd_options *opt = run->opt;
  const char *prompt = fd_run_flag(run, "--prompt"), *file = fd_run_flag(run, "--prompts"), *out = fd_run_flag(run, "--save_dir");
  const char *tag = fd_run_flag(run, "--tag");
  struct prompts prompts = {0};
  struct fd_parts parts = {0};
  fd_ctx *ctx = NULL;
  fd_sampler *sampler = NULL;
  int64_t step = 0, most = 0;
  if (!out) FD_TRY(FD_FAIL(FD_ERR_CONFIG, "sample: where should the pictures go? give -o DIR"));
  if (prompt && file) FD_TRY(FD_FAIL(FD_ERR_CONFIG, "sample: give --prompt or --prompts, not both"));
  if (file) st = read_prompts(file, &prompts);
  FD_TRY(fd_agree(run->comm, st));
  FD_TRY(fd_run_flag_int(run, "--num_samples", 0, 1, INT32_MAX, &most));
  const char *const *list = file ? prompts.at : prompt ? &prompt : opt->gen.val_prompt.at;
  int n = file ? prompts.n : prompt ? 1 : opt->gen.val_prompt.n;
  if (n == 0) FD_TRY(FD_FAIL(FD_ERR_CONFIG, "sample: no prompt; give --prompt TEXT, --prompts FILE or set gen.val_prompt"));
  if (most && most < n) n = (int)most;
  FD_TRY(fd_parts_context(opt, run->comm, &ctx));
  st = fd_parts_open(opt, 0, &parts);
  FD_TRY(fd_agree(run->comm, st));
  st = fd_parts_layout(&parts, 1);
  if (st == FD_OK) st = fd_params_alloc(parts.dit->params, ctx, parts.dtype, false);
  FD_TRY(fd_agree(run->comm, st));
  FD_TRY(fd_parts_load_frozen(&parts, ctx, run->comm));
  FD_TRY(load_dit(run, parts.dit, opt->trainer.checkpoint_dir, tag ? tag : "latest", fd_run_switch(run, "--ema_weights", true), &step));
  st = fd_parts_sampler(&parts, ctx, (int64_t)n * opt->gen.n_samples, &sampler);
  FD_TRY(fd_agree(run->comm, st));
  FD_TRY(fd_sample_prompts(sampler, run->comm, n, list, (int)opt->gen.n_samples, (uint64_t)opt->gen.seed, out,
                           fd_run_switch(run, "--jpeg", false), show_progress, NULL));
  fd_log_progress("%s", "");
  fd_log_info("%s: %lld pictures of %lld x %lld; overview in %s/sheet.png", out, (long long)n * (long long)opt->gen.n_samples,
              (long long)opt->gen.W, (long long)opt->gen.H, out);
done:
  fd_sampler_destroy(&sampler);
  fd_parts_close(&parts);
  fd_ctx_destroy(&ctx);
  prompts_free(&prompts);
  return st;
}

const struct fd_command fd_cmd_sample = {
    .name = "sample",
    .args = "CONFIG",
    .help = "make pictures from a checkpoint",
    .takes_config = true,
    .flags = (const struct fd_flag[]){{"--prompt", "TEXT", NULL, "one prompt; default: gen.val_prompt"},
                                      {"--prompts", "FILE", NULL, "many: a JSON list of strings, or a text file with one a line"},
                                      {"--save_dir -o", "DIR", NULL, "folder for the pictures"},
                                      {"--checkpoint", "DIR", "trainer.checkpoint_dir", "run folder"},
                                      {"--tag", "STEP", NULL, "step of the checkpoint; default: the latest"},
                                      {"--ema_weights", NULL, NULL, "use the moving average (default); --no-ema_weights: the raw weights"},
                                      {"--guidance_scale", "S", "gen.scale", "guidance; 1 or less: none"},
                                      {"--num_inference_steps", "N", "gen.steps", "steps from noise to picture"},
                                      {"--batch_size", "N", "gen.batch_size", "pictures made at a time by one rank"},
                                      {"--seed", "S", "gen.seed", "seed of the first noise"},
                                      {"--negative_prompt", "TEXT", "gen.negative_prompt", "what guidance leads away from"},
                                      {"--n_samples", "N", "gen.n_samples", "pictures per prompt"},
                                      {"--num_samples", "N", NULL, "use only the first N prompts"},
                                      {"--resolution", "R", "gen.H gen.W", "side of the pictures in pixels"},
                                      {"--H", "H", "gen.H", "height in pixels"},
                                      {"--W", "W", "gen.W", "width in pixels"},
                                      {"--vae", "MODEL", "vae.pretrained_model_name_or_path", "folder or name of the VAE"},
                                      {"--scheduler", "MODEL", "noise_scheduler.pretrained_model_name_or_path", "folder or name of the noise levels"},
                                      {"--type", "TYPE", "gen.model_type", "kind of model"},
                                      {"--jpeg", NULL, NULL, "write .jpg files instead of .png"},
                                      {0}},
    .groups = "gen",
    .run = run_sample,
};
