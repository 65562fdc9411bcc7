// SPDX-License-Identifier: Apache-2.0
// Models as graphs: no op reads what nobody wrote, recomputation and capacities change nothing, bf16 stays near f32. That the
// mathematics is right is shown by the golden records.
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/rng.h"
#include "cpu/cpu.h"
#include "graph/build.h"
#include "model/classes.h"
#include "model/model.h"

static int failed;
#define CHECK(c)                                                                            \
  do {                                                                                      \
    if (!(c)) failed = 1, printf("%s:%d: %s\n", __FILE__, __LINE__, #c);                     \
  } while (0)
#define OK(call)                                                                                             \
  do {                                                                                                       \
    if ((call) != FD_OK) failed = 1, printf("%s:%d: %s: %s\n", __FILE__, __LINE__, #call, fd_status_message()); \
  } while (0)

static fd_ctx *ctx;

/* How a graph is built and run; results must not depend on any of it (but dtype). */
struct how {
  fd_dtype dtype;
  int64_t room, tile; /* packed rows beyond what is needed; tile of the count */
  bool checkpoint, poison;
};

static void noise(float *x, int64_t n, float scale, uint64_t stream) {
  for (int64_t i = 0; i < n; i += 4) {
    float z[4];
    fd_rng_normal4(11, FD_RNG_SYNTHETIC, stream, (uint32_t)(i / 4), z);
    for (int64_t k = 0; k < 4 && i + k < n; k++) x[i + k] = z[k] * scale;
  }
}

/* Random weights everywhere: a zero gate or norm would hide what is behind it. */
static fd_status random_set(void *user, fd_params *p, int row, const float *values) {
  const struct fd_param *r = fd_params_row(p, row);
  float *x = malloc((size_t)r->numel * sizeof *x);
  (void)user;
  noise(x, r->numel, r->ndim == 1 ? 0.1f : (float)(1.5 / sqrt((double)(r->numel / r->shape[0]))), (uint64_t)row + 1000);
  if (strstr(r->name, "norm") && strstr(r->name, "weight") && values[0] == 1)
    for (int64_t i = 0; i < r->numel; i++) x[i] += 1;
  fd_status st = fd_params_set(p, row, r->buffer ? values : x);
  free(x);
  return st;
}

static fd_model *make(const char *text, fd_dtype dtype) {
  fd_model *m = NULL;
  json_error_t error;
  json_t *json = json_loads(text, 0, &error);
  if (!json) failed = 1, printf("%s\n%s\n", text, error.text);
  OK(fd_model_create("test", json, &m));
  json_decref(json);
  if (!m) exit(1);
  OK(fd_params_layout(m->params, true, 1));
  OK(fd_params_alloc(m->params, ctx, dtype, true));
  OK(fd_model_init(m, 5, random_set, NULL));
  return m;
}

static void set(fd_graph *g, fd_var v, float scale, uint64_t stream, int64_t rows, int64_t cols) {
  const fd_tensor *t = fd_graph_get(g, v);
  const int64_t n = fd_tensor_numel(t), used = rows ? rows * cols : n;
  float *x = calloc((size_t)n, sizeof *x);
  void *y = malloc(fd_tensor_bytes(t));
  noise(x, used, scale, stream);
  fd_convert(y, t->dtype, x, FD_F32, n);
  if (t->data) OK(fd_graph_set(g, v, y, fd_tensor_bytes(t)));
  free(x);
  free(y);
}

/* Results in one array: outputs (rows that mean something), then the flat gradient. */
struct result {
  float *x;
  int64_t n_out, n;
};

static struct result collect(fd_graph *g, fd_var out, int64_t used, const fd_params *p) {
  struct result r = {.n_out = used, .n = used + fd_params_flat_numel(p)};
  const fd_tensor *t = fd_graph_get(g, out);
  void *raw = malloc(fd_tensor_bytes(t));
  r.x = malloc((size_t)r.n * sizeof *r.x);
  OK(fd_graph_read(g, out, raw, fd_tensor_bytes(t)));
  fd_convert(r.x, FD_F32, raw, t->dtype, used);
  OK(ctx->backend->from_device(ctx, r.x + used, fd_params_flat_grad(p), (size_t)(r.n - used) * sizeof(float)));
  free(raw);
  return r;
}

static void ready(fd_graph *g, fd_model *m, void **arena, const struct how *how) {
  size_t bytes = 0;
  OK(fd_graph_plan(g, &bytes));
  OK(ctx->backend->alloc(ctx, bytes + 64, arena));
  memset(*arena, 0xff, bytes); /* NaN wherever nobody writes */
  OK(fd_graph_attach(g, *arena, bytes));
  OK(fd_params_bind(m->params, g));
  fd_graph_set_poison(g, how->poison);

}

static const int32_t lengths[3] = {5, 1, 9};

static struct result run_dit(const char *json, const struct how *how) {
  fd_model *m = make(json, how->dtype);
  fd_graph *g = NULL;
  void *arena = NULL;
  struct fd_text *text = NULL;
  struct fd_text_vars tv;
  const int64_t B = 3, H = 6, W = 8, C = m->dims.in_channels;
  OK(fd_text_create(B, 15 + how->room, 9 + how->room, how->tile, &text));
  OK(fd_text_pack(text, B, NULL, 0, lengths));
  OK(fd_graph_create(ctx, "dit", &g));
  fd_params_grads(m->params, g);
  fd_text_inputs(g, "text", text, H * W / 4, &tv);
  struct fd_dit_inputs in = {.text = &tv, .checkpoint = how->checkpoint};
  in.x = fd_graph_input(g, "x", how->dtype, 4, (int64_t[]){B, H, W, C});
  in.t = fd_graph_input(g, "t", FD_F32, 1, &B);
  in.states = fd_graph_input(g, "states", how->dtype, 2, (int64_t[]){text->T, m->dims.text_width});
  fd_var out = fd_dit(m, g, &in);
  fd_graph_keep(g, out);
  fd_var dout = fd_graph_input(g, "dout", how->dtype, 4, fd_graph_get(g, out)->shape);
  fd_graph_backward(g, 1, &out, &dout);
  ready(g, m, &arena, how);
  const float t[3] = {3.5f, 500, 1000};
  OK(fd_text_set(g, &tv, text));
  set(g, in.x, 1, 1, 0, 0);
  if (fd_graph_get(g, in.t)->data) OK(fd_graph_set(g, in.t, t, sizeof t));
  set(g, in.states, 1, 2, 15, m->dims.text_width);
  set(g, dout, 1, 3, 0, 0);
  OK(fd_graph_run(g));
  struct result r = collect(g, out, B * H * W * m->dims.out_channels, m->params);
  fd_graph_destroy(&g);
  ctx->backend->free(ctx, arena);
  fd_text_destroy(&text);
  fd_model_destroy(&m);
  return r;
}

static struct result run_text(const char *json, const struct how *how) {
  fd_model *m = make(json, how->dtype);
  fd_graph *g = NULL;
  void *arena = NULL;
  struct fd_text *text = NULL;
  struct fd_text_vars tv;
  int32_t ids[3 * 9];
  for (int i = 0; i < 27; i++) ids[i] = 1 + i * 7 % 30;
  OK(fd_text_create(3, 15 + how->room, 9 + how->room, how->tile, &text));
  OK(fd_text_pack(text, 3, ids, 9, lengths));
  OK(fd_graph_create(ctx, "text", &g));
  fd_params_grads(m->params, g);
  fd_text_inputs(g, "text", text, 0, &tv);
  fd_var out = fd_text_states(m, g, &tv, -1, how->dtype);
  fd_graph_keep(g, out);
  fd_var dout = fd_graph_input(g, "dout", how->dtype, 2, fd_graph_get(g, out)->shape);
  fd_graph_backward(g, 1, &out, &dout);
  ready(g, m, &arena, how);
  OK(fd_text_set(g, &tv, text));
  set(g, dout, 1, 3, 15, m->dims.width);
  OK(fd_graph_run(g));
  struct result r = collect(g, out, 15 * m->dims.width, m->params);
  fd_graph_destroy(&g);
  ctx->backend->free(ctx, arena);
  fd_text_destroy(&text);
  fd_model_destroy(&m);
  return r;
}

static struct result run_vae(const char *json, const struct how *how) {
  fd_model *m = make(json, how->dtype);
  fd_graph *g = NULL;
  void *arena = NULL;
  const int64_t B = 2, f = m->dims.factor, h = 3, w = 5, Z = m->dims.latent_channels;
  OK(fd_graph_create(ctx, "vae", &g));
  fd_params_grads(m->params, g);
  fd_var pixels = fd_graph_input(g, "pixels", how->dtype, 4, (int64_t[]){B, h * f, w * f, 3});
  fd_var z = fd_graph_input(g, "noise", FD_F32, 4, (int64_t[]){B, h, w, Z}), latent;
  fd_vae_encode(m, g, pixels, z, NULL, NULL, &latent);
  latent = fd_vae_unnormalise(m, g, fd_vae_normalise(m, g, latent, FD_F32), how->dtype);
  fd_var out = fd_vae_decode(m, g, latent);
  CHECK(fd_graph_get(g, out)->shape[1] == h * f && fd_graph_get(g, out)->shape[2] == w * f);
  fd_graph_keep(g, out);
  fd_var dout = fd_graph_input(g, "dout", how->dtype, 4, fd_graph_get(g, out)->shape);
  fd_graph_backward(g, 1, &out, &dout);
  ready(g, m, &arena, how);
  set(g, pixels, 0.5f, 1, 0, 0);
  set(g, z, 1, 2, 0, 0);
  set(g, dout, 1, 3, 0, 0);
  OK(fd_graph_run(g));
  struct result r = collect(g, out, B * h * w * f * f * 3, m->params);
  fd_graph_destroy(&g);
  ctx->backend->free(ctx, arena);
  fd_model_destroy(&m);
  return r;
}

/* Largest difference over largest value; NaN gives infinity. */
static double difference(const float *a, const float *b, int64_t n) {
  double worst = 0, largest = 0;
  for (int64_t i = 0; i < n; i++) {
    const double d = fabs((double)a[i] - b[i]);
    if (!(d <= worst)) worst = isnan(d) ? INFINITY : d;
    if (fabs((double)b[i]) > largest) largest = fabs((double)b[i]);
  }
  return largest > 0 ? worst / largest : INFINITY;
}

typedef struct result run_fn(const char *json, const struct how *how);

static void check_model(run_fn *f, const char *json) {
  const struct how plain = {.dtype = FD_F32, .tile = 1}, others[] = {
      {.dtype = FD_F32, .tile = 1, .poison = true},
      {.dtype = FD_F32, .tile = 1, .checkpoint = true, .poison = true},
      {.dtype = FD_F32, .tile = 16, .poison = true}, /* a rounding tail */
      {.dtype = FD_F32, .tile = 8, .room = 40},
      {.dtype = FD_BF16, .tile = 16, .checkpoint = true, .poison = true}};
  struct result ref = f(json, &plain);
  for (size_t i = 0; i < sizeof others / sizeof *others; i++) {
    struct result r = f(json, &others[i]);
    const bool bf16 = others[i].dtype == FD_BF16;
    const double out = difference(r.x, ref.x, ref.n_out), grad = difference(r.x + ref.n_out, ref.x + ref.n_out, ref.n - ref.n_out);
    /* the same ops on the same numbers: to the bit; other capacities may cut sums in other places; bf16 as for records (twice that for gradients) */
    const double tolerance = bf16 ? 16.0 / 256 : i < 2 ? 0 : 2e-5;
    if (!(out <= tolerance) || !(grad <= tolerance * (bf16 ? 2 : 1))) {
      failed = 1;
      printf("%s\n  way %zu: outputs differ by %.2e, gradients by %.2e, %.2e is allowed\n", json, i, out, grad, tolerance);
    }
    free(r.x);
  }
  free(ref.x);
}

static void test_dit(void) {
  static const char *const attention[] = {"self", "cross"}, *const pos[] = {"ape", "1d-rope", "2d-rope", "m-rope"},
                    *const time[] = {"\"adaln-zero\"", "\"adaln-single\"", "\"addition\"", "null"}, *const flag[] = {"false", "true"};
  char json[1000];
  for (int i = 0; i < 12; i++) { /* every value of every key, not every combination */
    snprintf(json, sizeof json,
             "{\"model_type\":\"DiT\",\"attention\":\"%s\",\"dit_hidden_size\":36,\"dit_num_hidden_layers\":2,\"in_channels\":4,"
             "\"out_channels\":4,\"pos_embed\":\"%s\",\"pos_embed_max_size\":9,\"qk_norm\":%s,\"sandwich_norm\":%s,\"sample_size\":8,"
             "\"text_hidden_size\":%d,\"timestep_conditioning\":%s,\"base_config\":{\"intermediate_size\":52,\"num_attention_heads\":6,"
             "\"num_key_value_heads\":%d,\"head_dim\":12,\"attention_bias\":%s,\"hidden_activation\":\"%s\"}}",
             attention[i % 5 == 1 || i == 11], pos[i % 4], flag[i % 3 != 0], flag[i / 2 % 2], i % 5 == 1 || i == 11 ? 36 : 20, time[(i / 4 + i) % 4],
             (int[]){1, 3, 6, 2}[i % 4], flag[i / 3 % 2], i % 2 ? "silu" : "gelu");
    check_model(run_dit, json);
  }
}

static void test_text(void) {
  check_model(run_text, "{\"model_type\":\"gemma\",\"hidden_size\":40,\"intermediate_size\":72,\"num_hidden_layers\":2,\"vocab_size\":31,"
                        "\"num_attention_heads\":4,\"num_key_value_heads\":2,\"head_dim\":16,\"attention_bias\":true,\"pad_token_id\":0}");
  check_model(run_text, "{\"model_type\":\"gemma2\",\"hidden_size\":40,\"intermediate_size\":72,\"num_hidden_layers\":3,\"vocab_size\":31,"
                        "\"num_attention_heads\":4,\"num_key_value_heads\":2,\"head_dim\":16,\"sliding_window\":4,\"query_pre_attn_scalar\":20}");
}

static void test_vae(void) {
  check_model(run_vae, "{\"_class_name\":\"AutoencoderKL\",\"block_out_channels\":[8,12,16],\"norm_num_groups\":4,\"layers_per_block\":1}");
  check_model(run_vae, "{\"_class_name\":\"AutoencoderKL\",\"block_out_channels\":[12],\"norm_num_groups\":3,\"mid_block_add_attention\":false,"
                       "\"use_quant_conv\":false,\"latent_channels\":5,\"layers_per_block\":3,\"shift_factor\":0.3,\"scaling_factor\":0.7}");
}

static void test_packing(void) {
  struct fd_text *t = NULL;
  const int32_t ids[] = {5, 6, 7, 8, 9, 0}, len[] = {3, 2}, long_len[] = {4, 1};
  int32_t ranges[12];
  OK(fd_text_create(3, 7, 3, 4, &t));
  if (!t) return;
  CHECK(t->T == 8);
  OK(fd_text_pack(t, 2, ids, 3, len));
  CHECK(t->count == 8 && t->ids[2] == 7 && t->ids[3] == 8 && t->ids[5] == 0 && t->pos[4] == 1 && t->pos[7] == 2);
  CHECK(t->tails == 1);
  CHECK(t->first[2] == 3 && t->first[3] == 2 && t->first[5] == 0);
  CHECK(t->ranges[12] == 5 && t->ranges[13] == 3); /* the tail */
  fd_text_image_ranges(t, 10, ranges);
  CHECK(ranges[4] == 10 && ranges[5] == 10 && ranges[6] == 13 && ranges[7] == 12 && ranges[11] == 10);
  OK(fd_text_pack(t, 0, ids, 3, len));
  CHECK(t->count == 0 && t->ranges[13] == 0 && t->ids[0] == 0);
  CHECK(fd_text_pack(t, 2, ids, 3, long_len) == FD_ERR_DATA && strstr(fd_status_message(), "4 tokens"));
  CHECK(fd_text_pack(t, 4, ids, 3, len) == FD_ERR_ARG);
  CHECK(fd_text_pack(t, 3, ids, 1, (int32_t[]){3, 3, 3}) == FD_ERR_DATA && strstr(fd_status_message(), "room for 8"));
  fd_text_destroy(&t);
  OK(fd_text_create(3, 9, 3, 9, &t)); /* a tail longer than a sample may be: sequences of at most 3 */
  CHECK(t->tails == 3);
  OK(fd_text_pack(t, 1, ids, 3, (int32_t[]){1}));
  const int32_t tail[] = {1, 3, 1, 3, 4, 3, 4, 3, 7, 2, 7, 2};
  CHECK(t->count == 9 && !memcmp(t->ranges + 12, tail, sizeof tail) && t->pos[4] == 0 && t->pos[8] == 1);
  OK(fd_text_pack(t, 3, ids, 1, (int32_t[]){3, 3, 2}));
  CHECK(t->count == 9 && t->ranges[12] == 8 && t->ranges[13] == 1 && t->ranges[17] == 0 && t->ranges[21] == 0);
  fd_text_destroy(&t);
  CHECK(fd_text_create(1, 0, 1, 1, &t) == FD_ERR_ARG);
}

/* The defaults of the original's DiTConfig; null is another thing than a missing key. */
static void test_missing_keys(void) {
  static const char *const more[] = {"", ",\"timestep_conditioning\":null,\"dit_num_hidden_layers\":null,\"pos_embed\":\"ape\",\"qk_norm\":true"};
  struct fd_dit_config c;
  struct fd_model_dims dims;
  char text[500];
  for (int i = 0; i < 2; i++) {
    snprintf(text, sizeof text,
             "{\"model_type\":\"DiT\",\"text_hidden_size\":8%s,\"base_config\":{\"hidden_size\":16,\"intermediate_size\":8,\"num_hidden_layers\":3,"
             "\"num_attention_heads\":2,\"num_key_value_heads\":1,\"head_dim\":8}}", more[i]);
    json_t *json = json_loads(text, 0, NULL);
    memset(&c, 0, sizeof c);
    OK(fd_dit_read(json, &c, &dims));
    json_decref(json);
    CHECK(c.D == 16 && !c.cross && !c.sandwich && c.P == 2);
    if (i == 0) CHECK(c.layers == 18 && c.pos == FD_DIT_ROPE_1D && !c.qk_norm && c.time == FD_DIT_ADALN_ZERO);
    else CHECK(c.layers == 3 && c.pos == FD_DIT_APE && c.qk_norm && c.time == FD_DIT_NO_TIME);
  }
}

static void test_misuse(void) {
  fd_model *m = make("{\"_class_name\":\"AutoencoderKL\",\"block_out_channels\":[8,8],\"norm_num_groups\":4}", FD_F32);
  fd_graph *g = NULL;
  OK(fd_graph_create(ctx, "test", &g));
  fd_var odd = fd_graph_input(g, "x", FD_F32, 4, (int64_t[]){1, 3, 4, 3});
  fd_vae_encode(m, g, odd, 0, NULL, NULL, NULL);
  CHECK(fd_graph_status(g) == FD_ERR_CONFIG && strstr(fd_status_message(), "pictures of 3 x 4"));
  fd_params_forget(m->params, g);
  fd_graph_destroy(&g);
  OK(fd_graph_create(ctx, "test", &g));
  CHECK(fd_dit(m, g, &(struct fd_dit_inputs){0}) == 0 && fd_graph_status(g) == FD_ERR_CONFIG);
  fd_graph_destroy(&g);
  fd_model_destroy(&m);
  m = make("{\"model_type\":\"gemma\",\"hidden_size\":8,\"intermediate_size\":8,\"num_hidden_layers\":2,\"vocab_size\":4,\"num_attention_heads\":1,"
           "\"num_key_value_heads\":1,\"head_dim\":8}", FD_F32);
  OK(fd_graph_create(ctx, "test", &g));
  CHECK(fd_text_states(m, g, &(struct fd_text_vars){0}, 3, FD_F32) == 0 && fd_graph_status(g) == FD_ERR_CONFIG);
  CHECK(strstr(fd_status_message(), "text_hidden_states_index 3"));
  fd_graph_destroy(&g);
  fd_model_destroy(&m);
}

int main(void) {
  OK(fd_ctx_create(&fd_cpu_backend, 1, NULL, &ctx));
  if (!ctx) return 1;
  test_packing();
  test_dit();
  test_text();
  test_vae();
  test_missing_keys();
  test_misuse();
  fd_ctx_destroy(&ctx);
  return failed;
}
