// SPDX-License-Identifier: Apache-2.0
// The CUDA backend's own kernels at production sizes: time, GB/s, and their share of what a copy on the device reaches in the same run, beside the
// share that the kernel's file promises. bench_kernels [part of a name]. Exit 77 without a GPU. Not a test.
//
// Bytes are those of the kernel's file: fd_op_cost (every slot once), times `passes` where a kernel must read something again.
// Each case runs over SETS sets of tensors in turn, so that no set is found in the L2 cache.
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "cuda/cuda.h"
#include "graph/graph.h"

enum { SETS = 3, SAMPLES = 11, MAX_TENSORS = 128 };
/* input/base-3b.cfg with its batch of 32; text: 32 captions, capacity 256 each; Gemma's width for the text, FLUX's VAE at 256 px */
enum { B = 32, N = 256, L = 256, D = 2048, A = 16, K = 4, E = 128, F = 8192, ROWS = B * N, TEXT = B * L };
static const int64_t PARAMS = (int64_t)1 << 28; /* a piece of the 2.66e9 */

static fd_ctx *ctx;
static fd_tensor tensors[MAX_TENSORS];
static int n_tensors;
static fd_tensor keys; /* of the random numbers */

static void must(fd_status st) {
  if (st == FD_OK) return;
  printf("%s\n", fd_status_message());
  exit(1);
}
static void must_cuda(cudaError_t e) { must(FD_CUDA(e)); }

static fd_tensor *empty(fd_dtype dtype, int64_t a, int64_t b) {
  if (n_tensors == MAX_TENSORS) abort();
  fd_tensor *t = &tensors[n_tensors++];
  *t = (fd_tensor){.dtype = dtype, .ndim = 2, .shape = {a, b}};
  must(ctx->backend->alloc(ctx, fd_tensor_bytes(t), &t->data));
  return t;
}

static fd_tensor *vector(fd_tensor *t) {
  *t = (fd_tensor){.data = t->data, .dtype = t->dtype, .ndim = 1, .shape = {fd_tensor_numel(t)}};
  return t;
}

/* Normal numbers: zeros could be faster than what a step sees. */
static fd_tensor *normal(fd_dtype dtype, int64_t a, int64_t b) {
  fd_tensor *t = empty(dtype, a, b), all = *t;
  void *numbers = NULL;
  all.dtype = FD_F32, all.ndim = 2, all.shape[0] = 1, all.shape[1] = a * b;
  if (dtype == FD_BF16) {
    must(ctx->backend->alloc(ctx, fd_tensor_bytes(&all), &numbers));
    all.data = numbers;
  }
  must(fd_op_run(ctx, FD_OP_randn, &(struct fd_randn_args){.keys = &keys, .y = &all, .purpose = (uint32_t)n_tensors}));
  if (numbers) {
    fd_tensor flat = *t;
    flat.ndim = 2, flat.shape[0] = 1, flat.shape[1] = a * b;
    must(fd_op_run(ctx, FD_OP_cast, &(struct fd_cast_args){.x = &all, .y = &flat}));
    must(ctx->backend->sync(ctx));
    ctx->backend->free(ctx, numbers);
  }
  return t;
}

static fd_tensor *ones(int64_t n) {
  fd_tensor *t = vector(empty(FD_F32, 1, n));
  must(fd_op_run(ctx, FD_OP_fill, &(struct fd_fill_args){.y = t, .value = 1}));
  return t;
}

static fd_tensor *picture(fd_tensor *t, int64_t side, int64_t C) {
  *t = (fd_tensor){.data = t->data, .dtype = t->dtype, .ndim = 4, .shape = {fd_tensor_numel(t) / (side * side * C), side, side, C}};
  return t;
}

/* ---- cases ------------------------------------------------------------------------------------------------------------ */

#define CASE(op) static void op##_case(struct fd_##op##_args *a)
#define BF16 FD_BF16
CASE(rmsnorm_fwd) {
  *a = (struct fd_rmsnorm_fwd_args){.x = normal(BF16, ROWS, D), .w = vector(normal(FD_F32, 1, D)), .mod = normal(BF16, B, 6 * D),
                                    .y = empty(BF16, ROWS, D), .rstd = ones(ROWS), .eps = 1e-6f, .rows_per_mod = N, .scale_col = D};
}
CASE(rmsnorm_bwd) {
  *a = (struct fd_rmsnorm_bwd_args){.dy = normal(BF16, ROWS, D), .x = normal(BF16, ROWS, D), .w = vector(normal(FD_F32, 1, D)), .rstd = ones(ROWS),
                                    .mod = normal(BF16, B, 6 * D), .dx = normal(BF16, ROWS, D), .dw = ones(D), .dmod = normal(BF16, B, 6 * D),
                                    .acc = 7u << 6, .eps = 1e-6f, .rows_per_mod = N, .scale_col = D};
}
CASE(gate_residual_fwd) {
  *a = (struct fd_gate_residual_fwd_args){.x = normal(BF16, ROWS, D), .a = normal(BF16, ROWS, D), .mod = normal(BF16, B, 6 * D),
                                          .y = empty(BF16, ROWS, D), .rows_per_mod = N, .gate_col = 2 * D};
}
CASE(gate_residual_bwd) {
  *a = (struct fd_gate_residual_bwd_args){.dy = normal(BF16, ROWS, D), .a = normal(BF16, ROWS, D), .mod = normal(BF16, B, 6 * D),
                                          .da = empty(BF16, ROWS, D), .dmod = normal(BF16, B, 6 * D), .acc = 32, .rows_per_mod = N, .gate_col = 2 * D};
}
/* heads: every caption at its capacity */
static fd_tensor *captions(void) {
  int32_t text[B][2];
  fd_tensor *t = empty(FD_I32, B, 2);
  for (int b = 0; b < B; b++) text[b][0] = b * L, text[b][1] = L;
  must(ctx->backend->to_device(ctx, t->data, text, sizeof text));
  must(ctx->backend->sync(ctx));
  return t;
}
static fd_tensor *heads_of(fd_tensor *t, int64_t heads) {
  *t = (fd_tensor){.data = t->data, .dtype = t->dtype, .ndim = 3, .shape = {fd_tensor_numel(t) / (heads * E), heads, E}};
  return t;
}
CASE(heads_fwd) {
  *a = (struct fd_heads_fwd_args){.qkv = normal(BF16, ROWS, (A + 2 * K) * E), .text_kv = normal(BF16, TEXT, 2 * K * E),
                                  .q_norm = vector(normal(FD_F32, 1, E)), .k_norm = vector(normal(FD_F32, 1, E)), .text = captions(),
                                  .q = heads_of(empty(BF16, ROWS, A * E), A), .k = heads_of(empty(BF16, ROWS + TEXT, K * E), K),
                                  .v = heads_of(empty(BF16, ROWS + TEXT, K * E), K), .q_rstd = empty(FD_F32, ROWS, A),
                                  .k_rstd = empty(FD_F32, ROWS + TEXT, K), .B = B, .N = N, .L = L, .A = A, .K = K, .E = E, .eps = 1e-6f};
}
CASE(heads_bwd) {
  fd_tensor *q_rstd = ones(ROWS * A), *k_rstd = ones((ROWS + TEXT) * K);
  *q_rstd = (fd_tensor){.data = q_rstd->data, .dtype = FD_F32, .ndim = 2, .shape = {ROWS, A}};
  *k_rstd = (fd_tensor){.data = k_rstd->data, .dtype = FD_F32, .ndim = 2, .shape = {ROWS + TEXT, K}};
  *a = (struct fd_heads_bwd_args){.dq = heads_of(normal(BF16, ROWS, A * E), A), .dk = heads_of(normal(BF16, ROWS + TEXT, K * E), K),
                                  .dv = heads_of(normal(BF16, ROWS + TEXT, K * E), K), .qkv = normal(BF16, ROWS, (A + 2 * K) * E),
                                  .text_kv = normal(BF16, TEXT, 2 * K * E), .q_norm = vector(normal(FD_F32, 1, E)),
                                  .k_norm = vector(normal(FD_F32, 1, E)), .text = captions(), .q_rstd = q_rstd, .k_rstd = k_rstd,
                                  .dqkv = empty(BF16, ROWS, (A + 2 * K) * E), .dtext_kv = empty(BF16, TEXT, 2 * K * E), .dq_norm = ones(E),
                                  .dk_norm = ones(E), .B = B, .N = N, .L = L, .A = A, .K = K, .E = E, .eps = 1e-6f};
}
CASE(geglu_fwd) {
  *a = (struct fd_geglu_fwd_args){.gate_up = normal(BF16, ROWS, 2 * F), .y = empty(BF16, ROWS, F), .act = FD_ACT_GELU_TANH};
}
CASE(geglu_bwd) {
  *a = (struct fd_geglu_bwd_args){.dy = normal(BF16, ROWS, F), .gate_up = normal(BF16, ROWS, 2 * F), .dgate_up = empty(BF16, ROWS, 2 * F),
                                  .act = FD_ACT_GELU_TANH};
}
CASE(act_fwd) { *a = (struct fd_act_fwd_args){.x = normal(BF16, ROWS, F), .y = empty(BF16, ROWS, F), .act = FD_ACT_SILU}; }
CASE(act_bwd) {
  *a = (struct fd_act_bwd_args){.dy = normal(BF16, ROWS, F), .x = normal(BF16, ROWS, F), .dx = empty(BF16, ROWS, F), .act = FD_ACT_SILU};
}
CASE(add_fwd) { *a = (struct fd_add_fwd_args){.x = normal(BF16, ROWS, F), .y = normal(BF16, ROWS, F), .z = empty(BF16, ROWS, F)}; }
CASE(colsum) { *a = (struct fd_colsum_args){.x = normal(BF16, ROWS, F), .y = ones(F)}; }
CASE(embed_fwd) {
  static int32_t id[TEXT];
  fd_tensor *ids = vector(empty(FD_I32, 1, TEXT));
  for (int i = 0; i < TEXT; i++) id[i] = (int32_t)(i * 7919LL % 65536);
  must(ctx->backend->to_device(ctx, ids->data, id, sizeof id));
  *a = (struct fd_embed_fwd_args){.ids = ids, .table = normal(BF16, 65536, D), .y = empty(BF16, TEXT, D), .scale = 45.25f, .padding_idx = -1};
}
CASE(groupnorm_fwd) {
  *a = (struct fd_groupnorm_fwd_args){.x = picture(normal(BF16, B * 65536, 128), 256, 128), .w = vector(normal(FD_F32, 1, 128)),
                                      .b = vector(normal(FD_F32, 1, 128)), .y = picture(empty(BF16, B * 65536, 128), 256, 128),
                                      .stats = ones(B * 32 * 2), .groups = 32, .eps = 1e-6f, .act = FD_ACT_SILU};
  *a->stats = (fd_tensor){.data = a->stats->data, .dtype = FD_F32, .ndim = 3, .shape = {B, 32, 2}};
}
CASE(groupnorm_bwd) {
  struct fd_groupnorm_fwd_args f;
  groupnorm_fwd_case(&f);
  *a = (struct fd_groupnorm_bwd_args){.dy = picture(normal(BF16, B * 65536, 128), 256, 128), .x = f.x, .w = f.w, .b = f.b, .stats = f.stats,
                                      .dx = f.y, .dw = ones(128), .db = ones(128), .groups = 32, .eps = 1e-6f, .act = FD_ACT_SILU};
}
CASE(upsample2x_fwd) {
  *a = (struct fd_upsample2x_fwd_args){.x = picture(normal(BF16, B * 16384, 256), 128, 256), .y = picture(empty(BF16, B * 65536, 256), 256, 256)};
}
CASE(upsample2x_bwd) {
  *a = (struct fd_upsample2x_bwd_args){.dy = picture(normal(BF16, B * 65536, 256), 256, 256), .dx = picture(empty(BF16, B * 16384, 256), 128, 256)};
}
CASE(pixels_fwd) {
  *a = (struct fd_pixels_fwd_args){.bytes = picture(empty(FD_U8, 4 * B * 65536, 3), 256, 3), .y = picture(empty(BF16, 4 * B * 65536, 3), 256, 3)};
}
CASE(channel_affine) {
  *a = (struct fd_channel_affine_args){.x = normal(FD_F32, 1 << 20, 16), .sub = ones(16), .mul = ones(16), .y = empty(BF16, 1 << 20, 16)};
}
CASE(cast) { *a = (struct fd_cast_args){.x = normal(FD_F32, ROWS, F), .y = empty(BF16, ROWS, F)}; }
CASE(fill) { *a = (struct fd_fill_args){.y = empty(FD_F32, ROWS, F), .value = 1}; }
CASE(sumsq) { *a = (struct fd_sumsq_args){.x = normal(FD_F32, 1, PARAMS), .y = vector(empty(FD_F64, 1, 1))}; }
CASE(adamw) {
  const float control[FD_CONTROL_COUNT] = {[FD_CONTROL_LR] = 1e-4f,   [FD_CONTROL_BIAS1] = 0.5f, [FD_CONTROL_BIAS2] = 0.5f,
                                           [FD_CONTROL_EMA_DECAY] = 0.999f, [FD_CONTROL_CLIP] = 1};
  *a = (struct fd_adamw_args){.p = vector(normal(FD_F32, 1, PARAMS)), .g = vector(normal(FD_F32, 1, PARAMS)), .m = vector(normal(FD_F32, 1, PARAMS)),
                              .v = ones(PARAMS), .ema = vector(normal(FD_F32, 1, PARAMS)), .compute = vector(empty(BF16, 1, PARAMS)),
                              .control = ones(FD_CONTROL_COUNT), .beta1 = 0.9, .beta2 = 0.999, .eps = 1e-8f, .weight_decay = 1e-4f};
  must(ctx->backend->to_device(ctx, a->control->data, control, sizeof control));
}
CASE(randn) { *a = (struct fd_randn_args){.keys = &keys, .y = empty(FD_F32, 1, 1 << 24), .purpose = 1}; }

static const struct {
  enum fd_op op;
  void (*make)(void *args);
  double passes; /* bytes over fd_op_cost's */
  int promised;  /* percent of the copy's rate; of the file in cuda/ */
} cases[] = {
#define C(name, passes, promised) {FD_OP_##name, (void (*)(void *))name##_case, passes, promised}
    C(rmsnorm_fwd, 1, 85),       C(rmsnorm_bwd, 1.06, 70),  C(gate_residual_fwd, 1, 85), C(gate_residual_bwd, 1, 85), C(heads_fwd, 1, 75),
    C(heads_bwd, 1, 75),         C(geglu_fwd, 1, 85),       C(geglu_bwd, 1, 85),         C(act_fwd, 1, 75),           C(act_bwd, 1, 85),
    C(add_fwd, 1, 85),           C(colsum, 1, 85),          C(embed_fwd, 1, 80),         C(groupnorm_fwd, 1.5, 80),   C(groupnorm_bwd, 5.0 / 3, 70),
    C(upsample2x_fwd, 1, 85),    C(upsample2x_bwd, 1, 85),  C(pixels_fwd, 1, 80),        C(channel_affine, 1, 80),    C(cast, 1, 85),
    C(fill, 1, 85),              C(sumsq, 1, 90),           C(adamw, 1, 90),             C(randn, 1, 25),
};

/* ---- time ------------------------------------------------------------------------------------------------------------- */

static int by_value(const void *x, const void *y) {
  const float a = *(const float *)x, b = *(const float *)y;
  return (a > b) - (a < b);
}

/* Median of SAMPLES times of `runs` calls each, in seconds a call. */
static double seconds(void (*call)(int i, void *user), void *user, int runs) {
  cudaEvent_t begin, end;
  float ms[SAMPLES];
  must_cuda(cudaEventCreate(&begin));
  must_cuda(cudaEventCreate(&end));
  for (int i = 0; i < SETS; i++) call(i, user); /* warm */
  for (int s = 0; s < SAMPLES; s++) {
    must_cuda(cudaEventRecord(begin, fd_cuda_stream(ctx)));
    for (int i = 0; i < runs; i++) call(i, user);
    must_cuda(cudaEventRecord(end, fd_cuda_stream(ctx)));
    must_cuda(cudaEventSynchronize(end));
    must_cuda(cudaEventElapsedTime(&ms[s], begin, end));
  }
  must_cuda(cudaEventDestroy(begin));
  must_cuda(cudaEventDestroy(end));
  qsort(ms, SAMPLES, sizeof *ms, by_value);
  return 1e-3 * ms[SAMPLES / 2] / runs;
}

static void copy(int i, void *user) {
  char *half = user;
  (void)i;
  must_cuda(cudaMemcpyAsync(half, half + ((size_t)1 << 30), (size_t)1 << 30, cudaMemcpyDeviceToDevice, fd_cuda_stream(ctx)));
}

struct sets {
  enum fd_op op;
  _Alignas(16) char args[SETS][FD_OP_ARGS_MAX];
};
static void run_set(int i, void *user) {
  struct sets *s = user;
  must(fd_op_run(ctx, s->op, s->args[i % SETS]));
}

int main(int argc, char **argv) {
  const char *part = argc > 1 ? argv[1] : "";
  if (!fd_cuda_backend.usable()) {
    printf("no GPU here: nothing to measure\n");
    return 77;
  }
  must(fd_ctx_create(&fd_cuda_backend, 1, NULL, &ctx));
  struct cudaDeviceProp device;
  must_cuda(cudaGetDeviceProperties(&device, fd_cuda_of(ctx)->device));
  const uint32_t key[4] = {1, 2, 3, 4};
  keys = (fd_tensor){.dtype = FD_U32, .ndim = 2, .shape = {1, 4}};
  must(ctx->backend->alloc(ctx, sizeof key, &keys.data));
  must(ctx->backend->to_device(ctx, keys.data, key, sizeof key));
  char *memory = normal(FD_F32, 1, (int64_t)1 << 29)->data;
  const double rate = 2.0 * ((size_t)1 << 30) / seconds(copy, memory, 10) * 1e-9;
  ctx->backend->free(ctx, memory);
  n_tensors = 0;
  printf("%s: a copy on the device moves %.0f GB/s\n%-20s %10s %10s %8s %8s\n", device.name, rate, "op", "us", "GB/s", "share", "promised");
  for (size_t c = 0; c < sizeof cases / sizeof cases[0]; c++) {
    const char *name = fd_op_info(cases[c].op)->name;
    static struct sets sets;
    size_t scratch_bytes = 0;
    double bytes = 0;
    if (!strstr(name, part)) continue;
    sets.op = cases[c].op;
    for (int i = 0; i < SETS; i++) {
      memset(sets.args[i], 0, sizeof sets.args[i]);
      cases[c].make(sets.args[i]);
    }
    must(ctx->backend->prepare(ctx, cases[c].op, sets.args[0], &scratch_bytes));
    if (scratch_bytes) must(ctx->backend->alloc(ctx, scratch_bytes, &ctx->scratch));
    ctx->scratch_bytes = scratch_bytes;
    fd_op_cost(cases[c].op, sets.args[0], NULL, &bytes);
    bytes *= cases[c].passes;
    const double s = seconds(run_set, &sets, 30);
    printf("%-20s %10.1f %10.0f %6.0f %% %6d %%\n", name, s * 1e6, bytes / s * 1e-9, 100 * bytes / s * 1e-9 / rate, cases[c].promised);
    if (scratch_bytes) ctx->backend->free(ctx, ctx->scratch);
    ctx->scratch = NULL;
    for (int i = 0; i < n_tensors; i++) ctx->backend->free(ctx, tensors[i].data);
    n_tensors = 0;
  }
  ctx->backend->free(ctx, keys.data);
  fd_ctx_destroy(&ctx);
  return 0;
}
