// SPDX-License-Identifier: Apache-2.0
// Every op of the CUDA backend that one GPU runs, at production sizes: time, GB/s, their share of what a copy on the device reaches in the same run,
// beside the share that the kernel's file promises, and TFLOP/s. bench_kernels [part of a name]. Exit 77 without a GPU. Not a test.
//
// Bytes are those of the kernel's file: fd_op_cost (every slot once), times `passes` where a kernel must read something again.
// Each case runs over SETS sets of tensors in turn, so that no set is found in the L2 cache.
// `make check` runs the same rows small on the emulated device (FD_EMULATE), for their sake: figures mean nothing there.
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "cuda/cuda.h"
#include "graph/graph.h"

#ifdef FD_EMULATE
enum { SETS = 1, SAMPLES = 1, RUNS = 1 };
enum { B = 2, N = 16, L = 8, D = 128, A = 4, K = 1, E = 32, F = 64, SIDE = 32, CHANNELS = 32, WIDE = 264, VOCABULARY = 64, PATCH = 2, Z = 4, PARAMS = 1 << 10 };
#else
enum { SETS = 3, SAMPLES = 11, RUNS = 30 };
/* input/base-3b.cfg with its batch of 32; text: 32 captions, capacity 256 each; Gemma's width for the text, FLUX's VAE at 256 px, WIDE in its middle */
enum { B = 32, N = 256, L = 256, D = 2048, A = 16, K = 4, E = 128, F = 8192, SIDE = 256, CHANNELS = 128, WIDE = 512, VOCABULARY = 65536, PATCH = 2, Z = 16 };
enum { PARAMS = 1 << 28 /* a piece of the 2.66e9 */ };
#endif
enum { ROWS = B * N, TEXT = B * L, LATENT_SIDE = SIDE / 8, LATENTS = LATENT_SIDE * LATENT_SIDE * Z, MAX_TENSORS = 128 };

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
/* every caption at its capacity */
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
static fd_tensor *ids(void) {
  static int32_t id[TEXT];
  fd_tensor *t = vector(empty(FD_I32, 1, TEXT));
  for (int i = 0; i < TEXT; i++) id[i] = (int32_t)(i * 7919LL % VOCABULARY);
  must(ctx->backend->to_device(ctx, t->data, id, sizeof id));
  must(ctx->backend->sync(ctx));
  return t;
}
CASE(embed_fwd) {
  *a = (struct fd_embed_fwd_args){.ids = ids(), .table = normal(BF16, VOCABULARY, D), .y = empty(BF16, TEXT, D), .scale = 45.25f, .padding_idx = -1};
}
CASE(embed_bwd) {
  *a = (struct fd_embed_bwd_args){.dy = normal(BF16, TEXT, D), .ids = ids(), .dtable = normal(FD_F32, VOCABULARY, D), .acc = 8, .scale = 45.25f, .padding_idx = -1};
}

/* pictures and features */
static fd_tensor *features(fd_tensor *t, int64_t side) { return picture(t, side, fd_tensor_cols(t)); }
enum { POINTS = B * SIDE * SIDE };
CASE(groupnorm_fwd) {
  *a = (struct fd_groupnorm_fwd_args){.x = features(normal(BF16, POINTS, CHANNELS), SIDE), .w = vector(normal(FD_F32, 1, CHANNELS)),
                                      .b = vector(normal(FD_F32, 1, CHANNELS)), .y = features(empty(BF16, POINTS, CHANNELS), SIDE),
                                      .stats = ones(B * 32 * 2), .groups = 32, .eps = 1e-6f, .act = FD_ACT_SILU};
  *a->stats = (fd_tensor){.data = a->stats->data, .dtype = FD_F32, .ndim = 3, .shape = {B, 32, 2}};
}
CASE(groupnorm_bwd) {
  struct fd_groupnorm_fwd_args f;
  groupnorm_fwd_case(&f);
  *a = (struct fd_groupnorm_bwd_args){.dy = features(normal(BF16, POINTS, CHANNELS), SIDE), .x = f.x, .w = f.w, .b = f.b, .stats = f.stats,
                                      .dx = f.y, .dw = ones(CHANNELS), .db = ones(CHANNELS), .groups = 32, .eps = 1e-6f, .act = FD_ACT_SILU};
}
CASE(upsample2x_fwd) {
  *a = (struct fd_upsample2x_fwd_args){.x = features(normal(BF16, POINTS / 4, 2 * CHANNELS), SIDE / 2), .y = features(empty(BF16, POINTS, 2 * CHANNELS), SIDE)};
}
CASE(upsample2x_bwd) {
  *a = (struct fd_upsample2x_bwd_args){.dy = features(normal(BF16, POINTS, 2 * CHANNELS), SIDE), .dx = features(empty(BF16, POINTS / 4, 2 * CHANNELS), SIDE / 2)};
}
CASE(pixels_fwd) { *a = (struct fd_pixels_fwd_args){.bytes = features(empty(FD_U8, 4 * POINTS, 3), SIDE), .y = features(empty(BF16, 4 * POINTS, 3), SIDE)}; }
CASE(channel_affine) { *a = (struct fd_channel_affine_args){.x = normal(FD_F32, POINTS / 2, Z), .sub = ones(Z), .mul = ones(Z), .y = empty(BF16, POINTS / 2, Z)}; }
CASE(cast) { *a = (struct fd_cast_args){.x = normal(FD_F32, ROWS, F), .y = empty(BF16, ROWS, F)}; }
CASE(fill) { *a = (struct fd_fill_args){.y = empty(FD_F32, ROWS, F), .value = 1}; }

/* the library's: 3x3 at full size; attention of the transformer, of Gemma's packed text, of the VAE's middle */
static fd_tensor *kernel(fd_tensor *t, int64_t side) {
  *t = (fd_tensor){.data = t->data, .dtype = t->dtype, .ndim = 4, .shape = {t->shape[0], t->shape[1] / (side * side), side, side}};
  return t;
}
#define SAME .stride = 1, .pad_top = 1, .pad_left = 1, .pad_bottom = 1, .pad_right = 1
CASE(conv2d_fwd) {
  *a = (struct fd_conv2d_fwd_args){.x = features(normal(BF16, POINTS, CHANNELS), SIDE), .w = kernel(normal(BF16, CHANNELS, CHANNELS * 9), 3),
                                   .bias = vector(normal(BF16, 1, CHANNELS)), .y = features(empty(BF16, POINTS, CHANNELS), SIDE), SAME};
}
CASE(conv2d_bwd_data) {
  *a = (struct fd_conv2d_bwd_data_args){.dy = features(normal(BF16, POINTS, CHANNELS), SIDE), .w = kernel(normal(BF16, CHANNELS, CHANNELS * 9), 3),
                                        .dx = features(empty(BF16, POINTS, CHANNELS), SIDE), SAME};
}
CASE(conv2d_bwd_weights) {
  *a = (struct fd_conv2d_bwd_weights_args){.dy = features(normal(BF16, POINTS, CHANNELS), SIDE), .x = features(normal(BF16, POINTS, CHANNELS), SIDE),
                                           .dw = kernel(empty(FD_F32, CHANNELS, CHANNELS * 9), 3), .dbias = ones(CHANNELS), SAME};
}
/* B sequences of n queries and m keys, one behind the other */
static fd_tensor *ranges(int32_t n, int32_t m) {
  int32_t range[B][4];
  fd_tensor *t = empty(FD_I32, B, 4);
  for (int b = 0; b < B; b++) range[b][0] = b * n, range[b][1] = n, range[b][2] = b * m, range[b][3] = m;
  must(ctx->backend->to_device(ctx, t->data, range, sizeof range));
  must(ctx->backend->sync(ctx));
  return t;
}
static struct fd_attention_fwd_args attention(int64_t n, int64_t m, int heads, int kv_heads, int width, bool regular) {
  return (struct fd_attention_fwd_args){.q = heads_of(normal(BF16, B * n, heads * width), heads), .k = heads_of(normal(BF16, B * m, kv_heads * width), kv_heads),
                                        .v = heads_of(normal(BF16, B * m, kv_heads * width), kv_heads), .ranges = ranges((int32_t)n, (int32_t)m),
                                        .o = heads_of(empty(BF16, B * n, heads * width), heads), .lse = empty(FD_F32, B * n, heads), .A = heads, .K = kv_heads,
                                        .E = width, .scale = 0.05f, .max_q = n, .max_k = m, .q_stride = regular ? n : 0, .k_stride = regular ? m : 0};
}
CASE(attention_fwd) { *a = attention(N, N + L, A, K, E, true); }
static void attention_text_case(struct fd_attention_fwd_args *a) {
  *a = attention(L, L, 8, 1, 2 * E, false);
  a->causal = 1;
}
static void attention_wide_case(struct fd_attention_fwd_args *a) { *a = attention(LATENT_SIDE * LATENT_SIDE, LATENT_SIDE * LATENT_SIDE, 1, 1, WIDE, true); }
CASE(attention_bwd) {
  const struct fd_attention_fwd_args f = attention(N, N + L, A, K, E, true);
  *a = (struct fd_attention_bwd_args){.d_o = heads_of(normal(BF16, ROWS, A * E), A), .q = f.q, .k = f.k, .v = f.v, .o = f.o, .lse = f.lse, .ranges = f.ranges,
                                      .dq = heads_of(empty(BF16, ROWS, A * E), A), .dk = heads_of(empty(BF16, ROWS + TEXT, K * E), K),
                                      .dv = heads_of(empty(BF16, ROWS + TEXT, K * E), K), .A = A, .K = K, .E = E, .scale = f.scale, .max_q = N, .max_k = N + L,
                                      .q_stride = N, .k_stride = N + L};
}
CASE(matmul) { *a = (struct fd_matmul_args){.a = normal(BF16, ROWS, D), .b = normal(BF16, 2 * F, D), .c = empty(BF16, ROWS, 2 * F), .trans_b = 1}; }

/* latents: too small for any share of the bandwidth */
static fd_tensor *latents(fd_tensor *t) { return picture(t, LATENT_SIDE, fd_tensor_numel(t) / (B * LATENT_SIDE * LATENT_SIDE)); }
CASE(patchify) {
  *a = (struct fd_patchify_args){.x = latents(normal(BF16, B, LATENTS)), .y = empty(BF16, B * LATENTS / (Z * PATCH * PATCH), Z * PATCH * PATCH), .P = PATCH};
  *a->y = (fd_tensor){.data = a->y->data, .dtype = BF16, .ndim = 3, .shape = {B, a->y->shape[0] / B, Z * PATCH * PATCH}};
}
CASE(unpatchify) {
  struct fd_patchify_args p;
  patchify_case(&p);
  *a = (struct fd_unpatchify_args){.x = p.y, .y = p.x, .P = PATCH, .channel_last = 1};
}
CASE(timestep_embed) { *a = (struct fd_timestep_embed_args){.t = ones(B), .freqs = ones(128), .y = empty(BF16, B, 256)}; }
CASE(posterior_fwd) {
  *a = (struct fd_posterior_fwd_args){.moments = latents(normal(BF16, B, 2 * LATENTS)), .noise = latents(normal(FD_F32, B, LATENTS)),
                                      .mean = latents(empty(FD_F32, B, LATENTS)), .logvar = latents(empty(FD_F32, B, LATENTS)),
                                      .latent = latents(empty(FD_F32, B, LATENTS))};
}
CASE(posterior_bwd) {
  *a = (struct fd_posterior_bwd_args){.dlatent = latents(normal(FD_F32, B, LATENTS)), .moments = latents(normal(BF16, B, 2 * LATENTS)),
                                      .noise = latents(normal(FD_F32, B, LATENTS)), .dmoments = latents(empty(BF16, B, 2 * LATENTS))};
}
CASE(flow_noise) {
  *a = (struct fd_flow_noise_args){.x = latents(normal(FD_F32, B, LATENTS)), .noise = latents(normal(FD_F32, B, LATENTS)), .sigma = ones(B),
                                   .x_t = latents(empty(BF16, B, LATENTS))};
}
CASE(flow_loss_fwd) {
  *a = (struct fd_flow_loss_fwd_args){.out = latents(normal(BF16, B, LATENTS)), .x = latents(normal(FD_F32, B, LATENTS)),
                                      .noise = latents(normal(FD_F32, B, LATENTS)), .sigma = ones(B), .weight = ones(B), .loss = ones(B)};
}
CASE(flow_loss_bwd) {
  struct fd_flow_loss_fwd_args f;
  flow_loss_fwd_case(&f);
  *a = (struct fd_flow_loss_bwd_args){.dloss = ones(B), .out = f.out, .x = f.x, .noise = f.noise, .sigma = f.sigma, .weight = f.weight,
                                      .dout = latents(empty(BF16, B, LATENTS))};
}
CASE(cfg_euler) {
  *a = (struct fd_cfg_euler_args){.model_out = normal(BF16, 2 * B, LATENTS), .step = ones(2), .sample = normal(FD_F32, B, LATENTS)};
}

/* the optimiser, and numbers */
static const float control[FD_CONTROL_COUNT] = {[FD_CONTROL_LR] = 1e-4f,         [FD_CONTROL_BIAS1] = 0.5f,     [FD_CONTROL_BIAS2] = 0.5f,
                                                [FD_CONTROL_EMA_DECAY] = 0.999f, [FD_CONTROL_GRAD_SCALE] = 1, [FD_CONTROL_CLIP] = 1};
static fd_tensor *controls(void) {
  fd_tensor *t = ones(FD_CONTROL_COUNT);
  must(ctx->backend->to_device(ctx, t->data, control, sizeof control));
  return t;
}
CASE(sumsq) { *a = (struct fd_sumsq_args){.x = normal(FD_F32, 1, PARAMS), .y = vector(empty(FD_F64, 1, 1))}; }
CASE(clip) { *a = (struct fd_clip_args){.sumsq = vector(empty(FD_F64, 1, 1)), .control = controls(), .max_norm = 1}; }
CASE(adamw) {
  *a = (struct fd_adamw_args){.p = vector(normal(FD_F32, 1, PARAMS)), .g = vector(normal(FD_F32, 1, PARAMS)), .m = vector(normal(FD_F32, 1, PARAMS)),
                              .v = ones(PARAMS), .ema = vector(normal(FD_F32, 1, PARAMS)), .compute = vector(empty(BF16, 1, PARAMS)),
                              .control = controls(), .beta1 = 0.9, .beta2 = 0.999, .eps = 1e-8f, .weight_decay = 1e-4f};
}
CASE(randn) { *a = (struct fd_randn_args){.keys = &keys, .y = empty(FD_F32, 1, PARAMS / 16), .purpose = 1}; }

static const struct {
  enum fd_op op;
  const char *name;
  void (*make)(void *args);
  double passes; /* bytes over fd_op_cost's */
  int promised;  /* percent of the copy's rate; of the file in cuda/. 0: bound by something else, as that file says */
} cases[] = {
#define CALLED(op, name, make, passes, promised) {FD_OP_##op, name, (void (*)(void *))make, passes, promised}
#define C(op, passes, promised) CALLED(op, #op, op##_case, passes, promised)
    C(rmsnorm_fwd, 1, 85),     C(rmsnorm_bwd, 1.06, 70), C(gate_residual_fwd, 1, 85), C(gate_residual_bwd, 1, 85), C(heads_fwd, 1, 75),
    C(heads_bwd, 1, 75),       C(geglu_fwd, 1, 85),      C(geglu_bwd, 1, 85),         C(act_fwd, 1, 75),           C(act_bwd, 1, 85),
    C(add_fwd, 1, 85),         C(colsum, 1, 85),         C(embed_fwd, 1, 80),         C(groupnorm_fwd, 1.5, 80),   C(groupnorm_bwd, 5.0 / 3, 70),
    C(upsample2x_fwd, 1, 85),  C(upsample2x_bwd, 1, 85), C(pixels_fwd, 1, 80),        C(channel_affine, 1, 80),    C(cast, 1, 85),
    C(fill, 1, 85),            C(sumsq, 1, 90),          C(adamw, 1, 90),             C(randn, 1, 25),             C(embed_bwd, 1, 0),
    C(clip, 1, 0),             C(patchify, 1, 0),        C(unpatchify, 1, 0),         C(timestep_embed, 1, 0),     C(posterior_fwd, 1, 0),
    C(posterior_bwd, 1, 0),    C(flow_noise, 1, 0),      C(flow_loss_fwd, 1, 0),      C(flow_loss_bwd, 1, 0),      C(cfg_euler, 1, 0),
    C(matmul, 1, 0),           C(conv2d_fwd, 1, 0),      C(conv2d_bwd_data, 1, 0),    C(conv2d_bwd_weights, 1, 0), C(attention_fwd, 1, 0),
    C(attention_bwd, 1, 0),    CALLED(attention_fwd, "attention_fwd, text", attention_text_case, 1, 0),
    CALLED(attention_fwd, "attention_fwd, VAE", attention_wide_case, 1, 0),
};
enum { CASES = sizeof cases / sizeof cases[0] };

/* An op without a row, or NULL. Sums between ranks need several GPUs. */
static const char *missing(void) {
  for (int op = 0; op < FD_OP_COUNT; op++) {
    bool found = op == FD_OP_reduce_start || op == FD_OP_reduce_wait || op == FD_OP_reduce_scatter_start || op == FD_OP_all_gather_start;
    for (int c = 0; c < CASES; c++) found |= (int)cases[c].op == op;
    if (!found) return fd_op_info((enum fd_op)op)->name;
  }
  return NULL;
}

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

enum { COPIED = 4 * PARAMS }; /* bytes */
static void copy(int i, void *user) {
  char *half = user;
  (void)i;
  must_cuda(cudaMemcpyAsync(half, half + COPIED, COPIED, cudaMemcpyDeviceToDevice, fd_cuda_stream(ctx)));
}

struct sets {
  enum fd_op op;
  _Alignas(16) char args[SETS][FD_OP_ARGS_MAX];
};
static void run_set(int i, void *user) {
  struct sets *s = user;
  must(fd_op_run(ctx, s->op, s->args[i % SETS]));
}

/* One row of the table; returns whether the promise is kept. */
static bool measure(int c, double copy_rate) {
  static struct sets sets;
  size_t scratch_bytes = 0;
  double bytes = 0, flop = 0;
  sets.op = cases[c].op;
  for (int i = 0; i < SETS; i++) {
    memset(sets.args[i], 0, sizeof sets.args[i]);
    cases[c].make(sets.args[i]);
  }
  must(ctx->backend->prepare(ctx, cases[c].op, sets.args[0], &scratch_bytes));
  if (scratch_bytes) must(ctx->backend->alloc(ctx, scratch_bytes, &ctx->scratch));
  ctx->scratch_bytes = scratch_bytes;
  fd_op_cost(cases[c].op, sets.args[0], &flop, &bytes);
  bytes *= cases[c].passes;
  const double s = seconds(run_set, &sets, RUNS), share = 100 * bytes / s / copy_rate;
  const bool kept = share >= cases[c].promised;
  char promised[32] = "", rate[32] = "";
  if (cases[c].promised) snprintf(promised, sizeof promised, "%d %%%s", cases[c].promised, kept ? "" : " missed");
  if (flop > 0) snprintf(rate, sizeof rate, "%.1f", flop / s * 1e-12);
  printf("%-20s %10.1f %10.0f %6.0f %% %9s  %s\n", cases[c].name, s * 1e6, bytes / s * 1e-9, share, rate, promised);
  if (scratch_bytes) ctx->backend->free(ctx, ctx->scratch);
  ctx->scratch = NULL;
  for (int i = 0; i < n_tensors; i++) ctx->backend->free(ctx, tensors[i].data);
  n_tensors = 0;
  return kept;
}

int main(int argc, char **argv) {
  const char *part = argc > 1 ? argv[1] : "";
  char why[256];
  if (missing()) {
    printf("op %s has no row in %s\n", missing(), __FILE__);
    return 1;
  }
  if (!fd_cuda_backend.usable(why, sizeof why)) {
    printf("%s: nothing to measure\n", why);
    return 77;
  }
  must(fd_ctx_create(&fd_cuda_backend, 1, NULL, &ctx));
  struct cudaDeviceProp device;
  must_cuda(cudaGetDeviceProperties(&device, fd_cuda_of(ctx)->device));
  const uint32_t key[4] = {1, 2, 3, 4};
  keys = (fd_tensor){.dtype = FD_U32, .ndim = 2, .shape = {1, 4}};
  must(ctx->backend->alloc(ctx, sizeof key, &keys.data));
  must(ctx->backend->to_device(ctx, keys.data, key, sizeof key));
  char *memory = normal(FD_F32, 2, PARAMS)->data;
  const double rate = 2.0 * COPIED / seconds(copy, memory, 10);
  ctx->backend->free(ctx, memory);
  n_tensors = 0;
  int promises = 0, kept = 0;
  printf("%s: a copy on the device moves %.0f GB/s\n%-20s %10s %10s %8s %9s  %s\n", device.name, rate * 1e-9, "op", "us", "GB/s", "share", "TFLOP/s", "promised");
  for (int c = 0; c < CASES; c++) {
    if (!strstr(cases[c].name, part)) continue;
    const bool good = measure(c, rate);
    promises += cases[c].promised > 0, kept += cases[c].promised > 0 && good;
  }
  printf("%d of %d kernels reach the share that is promised\n", kept, promises);
  ctx->backend->free(ctx, keys.data);
  fd_ctx_destroy(&ctx);
  return 0;
}
