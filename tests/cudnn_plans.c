// SPDX-License-Identifier: Apache-2.0
// cudnn_plans PROPERTIES CACHE: the plans of all attention and convolution ops of the configurations below input/, made by the backend's own code for
// the device that a JSON file describes; then read back from the cache folder, then with that folder's files broken. Graphs are those of training,
// with the VAE's decoder beside them. One line per plan. 1 if a shape has no plan that must have one.
#include <dirent.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "cpu/cpu.h"
#include "cuda/attention.h"
#include "cuda/cudnn_graph.h"
#include "cuda/library.h"
#include "train/job.h"

fd_status cuda_conv2d_library_prepare(fd_ctx *ctx, enum fd_op op, const void *args, int *found, size_t *scratch);

static const struct {
  const char *config;
  int pixels, batch;
} runs[] = {{"e2eflux", 256, 32}, {"e2eflux", 512, 16}, {"e2eflux", 1024, 8}, {"e2esd35", 256, 32}, {"flux", 256, 32},
            {"sd35", 256, 32},    {"bench-mid", 256, 4}, {"demo", 64, 16}};
enum { DEMO = sizeof runs / sizeof runs[0] - 1 };

/* Heads of other models that the backend promises, at 256, 512 and 1024 px. */
static const struct {
  int A, K, E;
} heads[] = {{8, 1, 256}, {8, 2, 256}, {8, 8, 256}, {24, 8, 128}, {24, 4, 64}};

static int failed, made, read_back;
static bool expect_from_disk;

/* New plans since `before`, one line each; a missing one is a fault unless `optional`. */
static void report(fd_ctx *ctx, int before, bool optional) {
  struct fd_dnn_plan *const *plan;
  const int n = fd_dnn_plans(ctx, &plan);
  for (int i = before; i < n; i++) {
    const struct fd_dnn_plan *p = plan[i];
    const bool from_disk = p->plan && p->engine < 0;
    made += p->plan && !from_disk;
    read_back += from_disk;
    if (!p->plan && !optional) failed++;
    if (p->plan && from_disk != expect_from_disk) failed++, printf("FAIL %s disk: ", from_disk ? "from" : "not from");
    if (!p->plan)
      printf("%s: %s\n", optional ? "own kernels" : "FAIL no plan", p->key);
    else if (from_disk)
      printf("read in %.2f s: %s\n", p->seconds, p->key);
    else
      printf("engine %2lld, workspace %7.1f MB, %5.2f s: %s\n", (long long)p->engine, (double)p->workspace * 1e-6, p->seconds, p->key);
  }
}

static int plans(fd_ctx *ctx) {
  struct fd_dnn_plan *const *plan;
  return fd_dnn_plans(ctx, &plan);
}

static fd_status attention(fd_ctx *ctx, enum fd_op op, const void *args, size_t *scratch) {
  int found = 0;
  fd_status st = FD_OK;
  for (int deterministic = 0; deterministic < 2 && st == FD_OK; deterministic++) {
    const int before = plans(ctx);
    ctx->deterministic = deterministic;
    st = cuda_attention_library_prepare(ctx, op, args, &found, scratch);
    report(ctx, before, false);
  }
  ctx->deterministic = false;
  return st;
}

/* A convolution, the same deterministic, and both its gradients: those of channels that are no multiple of 8 may have none. */
static fd_status convolution(fd_ctx *ctx, const struct fd_conv2d_fwd_args *a, size_t *scratch) {
  const bool odd = a->x->shape[3] % 8 || a->y->shape[3] % 8;
#define GEOMETRY \
  .stride = a->stride, .pad_top = a->pad_top, .pad_left = a->pad_left, .pad_bottom = a->pad_bottom, .pad_right = a->pad_right
  const struct fd_conv2d_bwd_data_args data = {.dy = a->y, .w = a->w, .dx = a->x, GEOMETRY};
  const struct fd_conv2d_bwd_weights_args weights = {.dy = a->y, .x = a->x, .dw = a->w, GEOMETRY};
  const void *args[] = {a, a, &data, &weights};
  static const enum fd_op op[] = {FD_OP_conv2d_fwd, FD_OP_conv2d_fwd, FD_OP_conv2d_bwd_data, FD_OP_conv2d_bwd_weights};
  fd_status st = FD_OK;
  for (int i = 0; i < 4 && st == FD_OK; i++) {
    const int before = plans(ctx);
    int found;
    ctx->deterministic = i == 1;
    st = cuda_conv2d_library_prepare(ctx, op[i], args[i], &found, scratch);
    report(ctx, before, i > 1 && odd);
  }
  ctx->deterministic = false;
  return st;
}

/* What the graph asks of each op: here only what cuDNN does. */
static fd_status prepare(fd_ctx *ctx, enum fd_op op, const void *args, size_t *scratch) {
  *scratch = 0;
  if (op == FD_OP_conv2d_fwd) return convolution(ctx, args, scratch);
  if (op == FD_OP_attention_fwd) {
    const struct fd_attention_fwd_args *a = args;
    if (a->E <= 256) return attention(ctx, op, args, scratch); /* a wider head: matrix products of cuBLASLt */
  } else if (op == FD_OP_attention_bwd) {
    return ((const struct fd_attention_bwd_args *)args)->q_stride ? attention(ctx, op, args, scratch) : FD_OK;
  }
  return FD_OK;
}

static fd_status run(fd_ctx *ctx, const char *name, int size, int batch) {
  fd_status st = FD_OK;
  fd_config *config = NULL;
  struct fd_parts parts = {0};
  struct fd_step_config how;
  fd_step *step = NULL;
  fd_graph *decoder = NULL;
  char path[96], text[64];
  size_t bytes;
  printf("== %s, %d px, batch %d\n", name, size, batch);
  snprintf(path, sizeof path, "input/%s.cfg", name);
  FD_TRY(fd_config_create(&config));
  FD_TRY(fd_config_read(config, path));
  snprintf(text, sizeof text, "data.resolution=%d", size);
  FD_TRY(fd_config_set(config, "--set", text));
  snprintf(text, sizeof text, "data.batch_size=%d", batch);
  FD_TRY(fd_config_set(config, "--set", text));
  snprintf(text, sizeof text, "model.sample_size=%d", size / 8);
  FD_TRY(fd_config_set(config, "--set", text));
  FD_TRY(fd_config_set(config, "--set", "trainer.mixed_precision=bf16"));
  FD_TRY(fd_config_finish(config));
  FD_TRY(fd_parts_open(fd_config_options(config), FD_PARTS_CONFIG_ONLY, &parts));
  FD_TRY(fd_parts_layout(&parts, 1));
  fd_parts_step(&parts, fd_config_options(config)->data.max_prompt_length, &how);
  FD_TRY(fd_step_create(ctx, &how, &step));
  FD_TRY(fd_graph_create(ctx, "decoder", &decoder));
  const int64_t factor = parts.vae->dims.factor, latent[] = {how.batch, size / factor, size / factor, parts.vae->dims.latent_channels};
  fd_graph_keep(decoder, fd_vae_decode(parts.vae, decoder, fd_graph_input(decoder, "latent", FD_BF16, 4, latent)));
  FD_TRY(fd_graph_plan(decoder, &bytes));
done:
  fd_graph_destroy(&decoder);
  fd_step_destroy(&step);
  fd_parts_close(&parts);
  fd_config_destroy(&config);
  return st;
}

static fd_status more_heads(fd_ctx *ctx) {
  fd_status st = FD_OK;
  printf("== other heads\n");
  for (size_t i = 0; i < sizeof heads / sizeof heads[0]; i++)
    for (int64_t N = 256; N <= 4096 && st == FD_OK; N *= 4) {
      const int64_t B = 8, M = N + 256;
      const int A = heads[i].A, K = heads[i].K, E = heads[i].E;
      fd_tensor q = {NULL, {B * N, A, E}, 3, FD_BF16, 0}, k = {NULL, {B * M, K, E}, 3, FD_BF16, 0}, lse = {NULL, {B * N, A}, 2, FD_F32, 0};
      fd_tensor ranges = {NULL, {B, 4}, 2, FD_I32, 0};
      size_t scratch;
#define SAME .q = &q, .k = &k, .v = &k, .o = &q, .lse = &lse, .ranges = &ranges, .A = A, .K = K, .E = E, .scale = 1, .max_q = N, .max_k = M, \
             .q_stride = N, .k_stride = M
      st = attention(ctx, FD_OP_attention_fwd, &(struct fd_attention_fwd_args){SAME}, &scratch);
      if (st == FD_OK)
        st = attention(ctx, FD_OP_attention_bwd, &(struct fd_attention_bwd_args){SAME, .d_o = &q, .dq = &q, .dk = &k, .dv = &k}, &scratch);
    }
  return st;
}

static void break_files(const char *cache) {
  char folder[4096], path[8192];
  snprintf(folder, sizeof folder, "%s/cudnn-plans", cache);
  DIR *d = opendir(folder);
  for (struct dirent *e; d && (e = readdir(d));) {
    if (e->d_name[0] == '.') continue;
    snprintf(path, sizeof path, "%s/%s", folder, e->d_name);
    FILE *f = fopen(path, "wb");
    if (!f || fputs("{\"cudnnVersion\"", f) < 0) failed++;
    if (f) fclose(f);
  }
  if (d) closedir(d);
}

int main(int argc, char **argv) {
  fd_status st = FD_OK;
  struct fd_cuda state = {0};
  struct fd_backend backend = fd_cpu_backend; /* its memory: constants of a graph have some */
  fd_ctx ctx = {.backend = &backend, .n_threads = 1, .state = &state};
  if (argc != 3) {
    fprintf(stderr, "usage: cudnn_plans PROPERTIES CACHE\n");
    return 2;
  }
  setvbuf(stdout, NULL, _IOLBF, 0);
  backend.prepare = prepare;
  backend.kept_bytes = NULL;
  ctx.cache_dir = argv[2];
  printf("cuDNN %zu\n", cudnnGetVersion());
  for (int pass = 0; pass < 2; pass++) {
    expect_from_disk = pass == 1;
    if (pass) printf("== once more, from disk\n");
    FD_TRY(fd_dnn_open_without_device(&ctx, argv[1]));
    for (int i = 0; i <= DEMO; i++) FD_TRY(run(&ctx, runs[i].config, runs[i].pixels, runs[i].batch));
    FD_TRY(more_heads(&ctx));
    fd_dnn_close(&ctx);
  }
  printf("== the files are broken\n");
  break_files(argv[2]);
  expect_from_disk = false;
  FD_TRY(fd_dnn_open_without_device(&ctx, argv[1]));
  FD_TRY(run(&ctx, runs[DEMO].config, runs[DEMO].pixels, runs[DEMO].batch));
done:
  fd_dnn_close(&ctx);
  if (st != FD_OK) printf("FAIL %s\n", fd_status_message());
  if (made == 0 || read_back == 0) failed++;
  printf("%d plans made, %d read back, %d failed\n", made, read_back, failed + (st != FD_OK));
  return failed != 0 || st != FD_OK;
}
