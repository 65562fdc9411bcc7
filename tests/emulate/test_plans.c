// SPDX-License-Identifier: Apache-2.0
// cuDNN's plans (cuda/cudnn_*.c on tests/emulate/cudnn_graph.cpp): each op of the backend gets one; it is kept on disk and read by the next context,
// with the same results; a file that is none is said in the log and made again; a deterministic context takes another engine; what cannot be
// done is said once; descriptors are given back; a plan is handed over with the stream, under capture too. And the emulation refuses what it should.
#include <cudnn_graph.h>
#include <dirent.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "base/dtype.h"
#include "base/log.h"
#include "cuda/cudnn_graph.h"
#include "cuda/library.h"

static int failed, checks;
#define CHECK(c)                                                                                                    \
  do {                                                                                                              \
    checks++;                                                                                                       \
    if (!(c)) failed++, fprintf(stderr, "%s:%d: not so: %s (%s)\n", __FILE__, __LINE__, #c, fd_status_message());   \
  } while (0)
#define OK(call) CHECK((call) == FD_OK)

static char folder[] = "test_plans_XXXXXX", log_path[64];

/* ---- files of the cache ------------------------------------------------------------------------------------------ */

/* Calls f for each file of the cache; returns how many there are. */
static int each_file(void (*f)(const char *path)) {
  char path[512];
  int n = 0;
  snprintf(path, sizeof path, "%s/cudnn-plans", folder);
  DIR *d = opendir(path);
  if (!d) return 0;
  for (struct dirent *e; (e = readdir(d));) {
    if (e->d_name[0] == '.') continue;
    snprintf(path, sizeof path, "%s/cudnn-plans/%s", folder, e->d_name);
    if (f) f(path);
    n++;
  }
  closedir(d);
  return n;
}
static void spoil(const char *path) {
  FILE *f = fopen(path, "wb");
  CHECK(f && fputs("{\"no\": \"plan\"}", f) >= 0 && fclose(f) == 0);
}
/* The emulation's version in the text is its own. */
static void make_older(const char *path) {
  char text[1 << 16], *at;
  FILE *f = fopen(path, "r+b");
  const size_t n = f ? fread(text, 1, sizeof text - 1, f) : 0;
  text[n] = 0;
  at = strstr(text, "\"version\":9");
  CHECK(at != NULL);
  if (at) {
    at[10] = '8';
    rewind(f);
    CHECK(fwrite(text, 1, n, f) == n);
  }
  if (f) fclose(f);
}
static void drop(const char *path) { unlink(path); }

/* How often the log says it; empties the log. */
static int said(const char *words) {
  char line[4096];
  int n = 0;
  FILE *f = fopen(log_path, "rb");
  while (f && fgets(line, sizeof line, f)) n += strstr(line, words) != NULL;
  if (f) fclose(f);
  CHECK(truncate(log_path, 0) == 0);
  return n;
}

/* ---- contexts, and one plan of each kind ------------------------------------------------------------------------- */

static fd_ctx *open_context(unsigned flags, bool cache) {
  fd_ctx *ctx = NULL;
  OK(fd_ctx_create_with(&fd_cuda_backend, 1, NULL, flags, &ctx));
  ctx->cache_dir = cache ? folder : NULL;
  return ctx;
}

enum { KINDS = 7, B = 2, N = 5, M = 7, A = 4, K = 2, E = 16 };
static struct fd_cuda_sdpa attention(int backward) {
  return (struct fd_cuda_sdpa){.B = B, .N = N, .M = M, .A = A, .K = K, .E = E, .backward = backward, .scale = 0.25f};
}
static struct fd_cuda_conv convolution(enum fd_cuda_conv_op op, int epilogue) {
  return (struct fd_cuda_conv){.op = op, .B = 2, .H = 6, .W = 4, .I = 8, .Ho = 3, .Wo = 2, .O = 5, .kh = 3, .kw = 3, .stride = 2, .bottom = 1,
                               .right = 1, .has_bias = epilogue, .has_residual = epilogue, .f32_data = op == FD_CUDA_CONV_DATA && epilogue};
}

/* Ask for all of them; returns how many there are. The last stands for the first of what the library lacks. */
static int ask(fd_ctx *ctx, size_t *scratch) {
  struct fd_cuda_sdpa a[] = {attention(0), attention(1)};
  struct fd_cuda_conv c[] = {convolution(FD_CUDA_CONV_FORWARD, 0), convolution(FD_CUDA_CONV_FORWARD, 1), convolution(FD_CUDA_CONV_DATA, 0),
                             convolution(FD_CUDA_CONV_DATA, 1), convolution(FD_CUDA_CONV_WEIGHTS, 0)};
  int n = 0, found;
  for (int i = 0; i < KINDS; i++) {
    found = -1;
    if (i < 2)
      OK(fd_cuda_sdpa_prepare(ctx, &a[i], &found, &scratch[i]));
    else
      OK(fd_cuda_conv_prepare(ctx, &c[i - 2], &found, &scratch[i]));
    CHECK(found == 1);
    CHECK(scratch[i] > 0);
    n += found == 1;
  }
  return n;
}

/* Engine of every plan: `engine`, but -1 (from disk) or 0 where allowed */
static bool all_of_engine(fd_ctx *ctx, int64_t engine) {
  struct fd_dnn_plan *const *plan;
  const int n = fd_dnn_plans(ctx, &plan);
  bool good = n >= KINDS;
  for (int i = 0; i < n; i++)
    if (plan[i]->plan) good = good && plan[i]->engine == engine;
  return good;
}

/* ---- one run ----------------------------------------------------------------------------------------------------- */

static void *on_device(fd_ctx *ctx, size_t bytes, int number) {
  void *p = NULL;
  fd_bf16 *host = malloc(bytes + 2);
  for (size_t i = 0; i < bytes / 2; i++) host[i] = fd_f32_to_bf16((float)((i * 7 + (size_t)number * 3) % 13) / 8 - 0.75f);
  OK(ctx->backend->alloc(ctx, bytes, &p));
  OK(FD_CUDA(cudaMemcpy(p, host, bytes, cudaMemcpyHostToDevice)));
  free(host);
  return p;
}

enum { Q_BYTES = B * N * A * E * 2, K_BYTES = B * M * K * E * 2, LSE_BYTES = B * A * N * 4 };
struct results {
  fd_bf16 o[Q_BYTES / 2], dq[Q_BYTES / 2], dk[K_BYTES / 2], dv[K_BYTES / 2];
};

/* Attention forward and backward, the latter captured and launched. k: values of the keys. */
static void run_attention(fd_ctx *ctx, struct results *r) {
  const int lengths[] = {N, N, M, M};
  struct fd_cuda_sdpa a = attention(0);
  size_t bytes[2];
  int found;
  void *scratch[2], *counts = NULL;
  cudaGraph_t graph = NULL;
  cudaGraphExec_t exec = NULL;
  OK(fd_cuda_sdpa_prepare(ctx, &a, &found, &bytes[0]));
  a.backward = 1;
  OK(fd_cuda_sdpa_prepare(ctx, &a, &found, &bytes[1]));
  a.q = on_device(ctx, Q_BYTES, 1), a.k = on_device(ctx, K_BYTES, 2), a.v = on_device(ctx, K_BYTES, 3), a.d_o = on_device(ctx, Q_BYTES, 4);
  a.o = on_device(ctx, Q_BYTES, 5), a.lse = on_device(ctx, LSE_BYTES, 6);
  a.dq = on_device(ctx, Q_BYTES, 7), a.dk = on_device(ctx, K_BYTES, 8), a.dv = on_device(ctx, K_BYTES, 9);
  OK(ctx->backend->alloc(ctx, sizeof lengths, &counts));
  OK(FD_CUDA(cudaMemcpy(counts, lengths, sizeof lengths, cudaMemcpyHostToDevice)));
  a.n = counts, a.m = a.n + B;
  scratch[0] = on_device(ctx, bytes[0], 10), scratch[1] = on_device(ctx, bytes[1], 11);
  a.backward = 0;
  OK(fd_cuda_sdpa(ctx, &a, scratch[0]));
  a.backward = 1;
  OK(FD_CUDA(cudaStreamBeginCapture(fd_cuda_stream(ctx), cudaStreamCaptureModeThreadLocal)));
  OK(fd_cuda_sdpa(ctx, &a, scratch[1]));
  a.scale = NAN; /* was copied */
  OK(FD_CUDA(cudaStreamEndCapture(fd_cuda_stream(ctx), &graph)));
  OK(FD_CUDA(cudaMemcpy(r->dq, a.dq, Q_BYTES, cudaMemcpyDeviceToHost)));
  CHECK(r->dq[0] == fd_f32_to_bf16((float)(7 * 3 % 13) / 8 - 0.75f)); /* not yet */
  OK(FD_CUDA(cudaGraphInstantiate(&exec, graph, 0)));
  for (int i = 0; i < 2; i++) OK(FD_CUDA(cudaGraphLaunch(exec, fd_cuda_stream(ctx))));
  OK(FD_CUDA(cudaMemcpy(r->o, a.o, Q_BYTES, cudaMemcpyDeviceToHost)));
  OK(FD_CUDA(cudaMemcpy(r->dq, a.dq, Q_BYTES, cudaMemcpyDeviceToHost)));
  OK(FD_CUDA(cudaMemcpy(r->dk, a.dk, K_BYTES, cudaMemcpyDeviceToHost)));
  OK(FD_CUDA(cudaMemcpy(r->dv, a.dv, K_BYTES, cudaMemcpyDeviceToHost)));
  cudaGraphDestroy(graph), cudaGraphExecDestroy(exec);
  void *all[] = {(void *)a.q, (void *)a.k, (void *)a.v, (void *)a.d_o, a.o, a.lse, a.dq, a.dk, a.dv, counts, scratch[0], scratch[1]};
  for (size_t i = 0; i < sizeof all / sizeof *all; i++) ctx->backend->free(ctx, all[i]);
}

/* ---- what the emulation refuses ---------------------------------------------------------------------------------- */

static void no_mask(struct fd_dnn_graph *g, const void *shape) {
  (void)shape;
  const int64_t dim[4] = {1, 1, 8, 8}, stride[4] = {64, 64, 8, 1};
  fd_dnn_tensor raw = fd_dnn_inner(g, CUDNN_DATA_FLOAT, dim, NULL);
  fd_dnn_matmul(g, fd_dnn_bound(g, 1, CUDNN_DATA_BFLOAT16, dim, stride), fd_dnn_bound(g, 2, CUDNN_DATA_BFLOAT16, dim, stride), raw, NULL, NULL, NULL);
  fd_dnn_pointwise(g, CUDNN_POINTWISE_EXP, CUDNN_DATA_FLOAT, 0, raw, NULL, NULL, fd_dnn_bound(g, 3, CUDNN_DATA_BFLOAT16, dim, stride));
}
static void two_of_one_name(struct fd_dnn_graph *g, const void *shape) {
  (void)shape;
  const int64_t dim[4] = {1, 1, 8, 8}, stride[4] = {64, 64, 8, 1}, turned[4] = {64, 64, 1, 8};
  fd_dnn_pointwise(g, CUDNN_POINTWISE_ADD, CUDNN_DATA_FLOAT, 0, fd_dnn_bound(g, 1, CUDNN_DATA_FLOAT, dim, stride),
                   fd_dnn_bound(g, 1, CUDNN_DATA_FLOAT, dim, turned), NULL, fd_dnn_bound(g, 2, CUDNN_DATA_FLOAT, dim, stride));
}
static void read_first(struct fd_dnn_graph *g, const void *shape) {
  (void)shape;
  const int64_t dim[4] = {1, 1, 8, 8}, stride[4] = {64, 64, 8, 1};
  fd_dnn_pointwise(g, CUDNN_POINTWISE_EXP, CUDNN_DATA_FLOAT, 0, fd_dnn_inner(g, CUDNN_DATA_FLOAT, dim, NULL), NULL, NULL,
                   fd_dnn_bound(g, 1, CUDNN_DATA_FLOAT, dim, stride));
}
static void other_lengths(struct fd_dnn_graph *g, const void *shape) {
  (void)shape;
  const int64_t dim[4] = {1, 1, 8, 8}, less[4] = {1, 1, 8, 4}, stride[4] = {64, 64, 8, 1};
  fd_dnn_pointwise(g, CUDNN_POINTWISE_ADD, CUDNN_DATA_FLOAT, 0, fd_dnn_bound(g, 1, CUDNN_DATA_FLOAT, dim, stride),
                   fd_dnn_bound(g, 3, CUDNN_DATA_FLOAT, less, stride), NULL, fd_dnn_bound(g, 2, CUDNN_DATA_FLOAT, dim, stride));
}
static void wrong_precision(struct fd_dnn_graph *g, const void *shape) {
  (void)shape;
  const int64_t dim[4] = {1, 1, 8, 8}, stride[4] = {64, 64, 8, 1};
  fd_dnn_pointwise(g, CUDNN_POINTWISE_EXP, CUDNN_DATA_BFLOAT16, 0, fd_dnn_bound(g, 1, CUDNN_DATA_FLOAT, dim, stride), NULL, NULL,
                   fd_dnn_bound(g, 2, CUDNN_DATA_FLOAT, dim, stride));
}

static void twice(struct fd_dnn_graph *g, const void *shape) { /* a good one */
  (void)shape;
  const int64_t dim[4] = {1, 1, 8, 8}, stride[4] = {64, 64, 8, 1};
  fd_dnn_pointwise(g, CUDNN_POINTWISE_MUL, CUDNN_DATA_FLOAT, 0, fd_dnn_bound(g, 1, CUDNN_DATA_FLOAT, dim, stride), fd_dnn_scalar(g, 2), NULL,
                   fd_dnn_bound(g, 3, CUDNN_DATA_FLOAT, dim, stride));
}

static void refusals(fd_ctx *ctx) {
  static const struct {
    void (*build)(struct fd_dnn_graph *g, const void *shape);
    const char *words;
  } bad[] = {{no_mask, "without a length mask"}, {two_of_one_name, "two different tensors"}, {read_first, "read before an operation has made it"},
             {other_lengths, "neither that of y nor 1"}, {wrong_precision, "precision"}};
  const struct fd_dnn_plan *p = NULL;
  for (size_t i = 0; i < sizeof bad / sizeof *bad; i++)
    for (int again = 0; again < 2; again++) { /* said once */
      OK(fd_dnn_plan_find(ctx, bad[i].words, bad[i].build, NULL, &p));
      CHECK(p == NULL);
      CHECK(said(bad[i].words) == !again);
    }
  OK(fd_dnn_plan_find(ctx, "twice", twice, NULL, &p));
  CHECK(p != NULL);
  if (!p) return;
  void *x = on_device(ctx, 256, 1), *y = on_device(ctx, 256, 1), *work = on_device(ctx, (size_t)p->workspace, 1);
  float two = 2, in[64], out[64];
  for (int i = 0; i < 64; i++) in[i] = (float)i;
  OK(FD_CUDA(cudaMemcpy(x, in, sizeof in, cudaMemcpyHostToDevice)));
  const int64_t uid[] = {1, 2, 3}, wrong_uid[] = {1, 2, 4}, same_uid[] = {1, 2, 1};
  void *data[] = {x, &two, y}, *host[] = {in, &two, y}, *odd[] = {x, &two, (char *)y + 4};
  const long before = fd_emu_cudnn_descriptors();
  OK(fd_dnn_run(ctx, p, 3, uid, data, work));
  OK(FD_CUDA(cudaMemcpy(out, y, sizeof out, cudaMemcpyDeviceToHost)));
  CHECK(out[1] == 2 && out[63] == 126);
  CHECK(fd_dnn_run(ctx, p, 3, wrong_uid, data, work) == FD_ERR_UNSUPPORTED);
  CHECK(fd_dnn_run(ctx, p, 3, same_uid, data, work) == FD_ERR_UNSUPPORTED);
  CHECK(fd_dnn_run(ctx, p, 2, uid, data, work) == FD_ERR_UNSUPPORTED && strstr(fd_status_message(), "tensor 3 is not bound"));
  CHECK(fd_dnn_run(ctx, p, 3, uid, host, work) == FD_ERR_UNSUPPORTED);
  CHECK(fd_dnn_run(ctx, p, 3, uid, odd, work) == FD_ERR_UNSUPPORTED && strstr(fd_status_message(), "not aligned"));
  CHECK(fd_dnn_run(ctx, p, 3, uid, data, NULL) == FD_ERR_UNSUPPORTED);
  CHECK(fd_emu_cudnn_descriptors() == before);
  ctx->backend->free(ctx, x), ctx->backend->free(ctx, y), ctx->backend->free(ctx, work);
}

int main(void) {
  static struct results first, again;
  size_t scratch[KINDS], from_disk[KINDS], found_scratch;
  const long before = fd_emu_cudnn_descriptors();
  int found = -1;
  CHECK(mkdtemp(folder) != NULL);
  snprintf(log_path, sizeof log_path, "%s/log.txt", folder);
  OK(fd_log_init(0, log_path));

  fd_ctx *ctx = open_context(FD_CTX_DETERMINISTIC, true);
  CHECK(ask(ctx, scratch) == KINDS);
  CHECK(all_of_engine(ctx, 1)); /* engine 0 varies */
  CHECK(each_file(NULL) == KINDS);
  run_attention(ctx, &first);
  fd_ctx_destroy(&ctx);
  CHECK(fd_emu_cudnn_descriptors() == before);

  ctx = open_context(FD_CTX_DETERMINISTIC, true);
  CHECK(ask(ctx, from_disk) == KINDS);
  CHECK(all_of_engine(ctx, -1));
  CHECK(memcmp(scratch, from_disk, sizeof scratch) == 0);
  const long runs = fd_emu_cudnn_executions();
  run_attention(ctx, &again);
  CHECK(fd_emu_cudnn_executions() == runs + 2); /* forward, and the captured backward once */
  CHECK(memcmp(&first, &again, sizeof first) == 0);
  fd_ctx_destroy(&ctx);
  CHECK(said("is not used") == 0);

  /* files that are no plans, or of another version: made again, and good again */
  for (int older = 0; older < 2; older++) {
    CHECK(each_file(older ? make_older : spoil) == KINDS);
    ctx = open_context(FD_CTX_DETERMINISTIC, true);
    CHECK(ask(ctx, from_disk) == KINDS);
    CHECK(all_of_engine(ctx, 1));
    CHECK(said("it is made again") == KINDS);
    fd_ctx_destroy(&ctx);
    ctx = open_context(FD_CTX_DETERMINISTIC, true);
    CHECK(ask(ctx, from_disk) == KINDS);
    CHECK(all_of_engine(ctx, -1));
    fd_ctx_destroy(&ctx);
  }

  /* another engine, with plans of its own */
  ctx = open_context(0, true);
  CHECK(ask(ctx, from_disk) == KINDS);
  CHECK(all_of_engine(ctx, 0));
  CHECK(from_disk[1] > scratch[1]); /* sums of dq in f32 */
  CHECK(each_file(NULL) == 2 * KINDS);
  fd_ctx_destroy(&ctx);

  /* nothing is kept without a folder; what the library lacks is said once */
  CHECK(each_file(drop) == 2 * KINDS);
  ctx = open_context(0, false);
  CHECK(ask(ctx, from_disk) == KINDS);
  CHECK(each_file(NULL) == 0);
  struct fd_cuda_conv c = convolution(FD_CUDA_CONV_FORWARD, 0);
  c.I = 3;
  CHECK(said("has no plan") == 0);
  for (int i = 0; i < 2; i++) {
    OK(fd_cuda_conv_prepare(ctx, &c, &found, &found_scratch));
    CHECK(found == 0 && found_scratch == 0);
  }
  CHECK(said("has no plan") == 1);
  refusals(ctx);
  fd_ctx_destroy(&ctx);
  CHECK(fd_emu_cudnn_descriptors() == before);

  fd_log_close();
  char path[128];
  snprintf(path, sizeof path, "%s/cudnn-plans", folder);
  CHECK(rmdir(path) == 0 && unlink(log_path) == 0 && rmdir(folder) == 0);
  printf("%d checks, %d failed\n", checks, failed);
  return failed != 0;
}
