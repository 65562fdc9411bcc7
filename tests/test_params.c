// SPDX-License-Identifier: Apache-2.0
// Parameter tables: alignment, groups, padding; the 3B's numbers; statistics of first weights; what a load refuses.
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "base/config.h"
#include "cpu/cpu.h"
#include "model/model.h"

static int failed;
#define CHECK(c)                                                                            \
  do {                                                                                      \
    if (!(c)) failed = 1, printf("%s:%d: %s (%s)\n", __FILE__, __LINE__, #c, fd_status_message()); \
  } while (0)

static const char *const dit_json =
    "{\"architectures\":[\"DiT\"],\"attention\":\"%s\",\"dit_hidden_size\":%d,\"dit_num_hidden_layers\":%d,\"in_channels\":16,"
    "\"out_channels\":16,\"patch_size\":2,\"pos_embed\":\"%s\",\"pos_embed_max_size\":64,\"qk_norm\":true,\"sample_size\":32,"
    "\"text_hidden_size\":%d,\"timestep_conditioning\":\"%s\",\"base_config\":{\"hidden_size\":2048,\"intermediate_size\":%d,"
    "\"num_attention_heads\":%d,\"num_key_value_heads\":%d,\"head_dim\":%d,\"hidden_activation\":null,\"initializer_range\":0.02,"
    "\"attention_bias\":%s}}";

static fd_status make(fd_model **m, const char *attention, int D, int layers, const char *pos, int text, const char *time, int F, int A, int K,
                      int E, const char *bias) {
  char text_json[2000];
  snprintf(text_json, sizeof text_json, dit_json, attention, D, layers, pos, text, time, F, A, K, E, bias);
  json_t *json = json_loads(text_json, 0, NULL);
  fd_status st = fd_model_create("test", json, m);
  json_decref(json);
  return st;
}

/* Rows do not overlap, starts are aligned, groups are back to back, everything lies below the padded end. */
static void check_layout(const fd_params *p, bool trainable, int ranks) {
  const int n = fd_params_count(p);
  int64_t end = 0;
  for (int i = 0; i < n; i++) {
    const struct fd_param *r = fd_params_row(p, i);
    bool first_of_group = true;
    for (int k = 0; k < i && r->group; k++) {
      const struct fd_param *q = fd_params_row(p, k);
      if (q->group && strcmp(q->group, r->group) == 0) first_of_group = false;
    }
    if (first_of_group) CHECK(r->offset % 64 == 0);
    if (trainable && !r->buffer && r->offset + r->numel > end) end = r->offset + r->numel;
    for (int k = 0; k < i; k++) {
      const struct fd_param *q = fd_params_row(p, k);
      const bool same_space = trainable ? q->buffer == r->buffer : fd_params_frozen_f32(p, i) == fd_params_frozen_f32(p, k);
      if (same_space && q->offset < r->offset + r->numel && r->offset < q->offset + q->numel) {
        failed = 1;
        printf("%s overlaps %s\n", r->name, q->name);
      }
    }
  }
  if (trainable) {
    CHECK(fd_params_flat_numel(p) % (64 * ranks) == 0);
    CHECK(fd_params_flat_numel(p) >= end && fd_params_flat_numel(p) < end + 64 * ranks);
  } else {
    CHECK(fd_params_flat_numel(p) == 0);
  }
}

static int64_t offset(const fd_params *p, const char *name) {
  int i = fd_params_find(p, name);
  CHECK(i >= 0);
  return i < 0 ? -1 : fd_params_row(p, i)->offset;
}

static void test_layout(void) {
  static const char *const attention[] = {"self", "cross"}, *const pos[] = {"ape", "1d-rope", "2d-rope", "m-rope"},
                    *const time[] = {"adaln-zero", "adaln-single", "addition"}, *const bias[] = {"false", "true"};
  for (int i = 0; i < 48; i++) {
    fd_model *m = NULL;
    CHECK(make(&m, attention[i % 2], 36, 2, pos[i / 2 % 4], 36, time[i / 8 % 3], 52, 6, 3, 12, bias[i / 24]) == FD_OK);
    if (!m) continue;
    const int ranks = 1 + i % 5;
    CHECK(fd_params_layout(m->params, i % 7 != 0, ranks) == FD_OK);
    check_layout(m->params, i % 7 != 0, ranks);
    const int64_t q = offset(m->params, "layers.1.self_attn.q_proj.weight");
    CHECK(offset(m->params, "layers.1.self_attn.k_proj.weight") == q + 72 * 36);
    CHECK(offset(m->params, "layers.1.self_attn.v_proj.weight") == q + 108 * 36);
    CHECK(offset(m->params, "layers.1.mlp.up_proj.weight") == offset(m->params, "layers.1.mlp.gate_proj.weight") + 52 * 36);
    CHECK(fd_params_layout(m->params, true, 1) == FD_ERR_ARG);
    fd_model_destroy(&m);
  }
}

static void test_production(void) {
  fd_model *m = NULL;
  CHECK(make(&m, "self", 2048, 30, "ape", 2048, "adaln-zero", 8192, 16, 4, 128, "false") == FD_OK);
  if (!m) return;
  CHECK(fd_params_total(m->params) == 2660490816LL);
  CHECK(fd_params_layout(m->params, true, 32) == FD_OK);
  check_layout(m->params, true, 32);
  int64_t layers = 0;
  for (int i = 0; i < fd_params_count(m->params); i++) {
    const struct fd_param *r = fd_params_row(m->params, i);
    if (strncmp(r->name, "layers.", 7) == 0) layers += r->numel;
  }
  CHECK(layers == 2642910720LL);
  CHECK(fd_params_frozen_numel(m->params) == 4096LL * 2048 && fd_params_frozen_bytes(m->params, FD_BF16) == 4096ULL * 2048 * 4);
  fd_model_destroy(&m);
}

/* Moments of one row against those of its distribution, to five standard errors. */
static void check_moments(const fd_params *p, const char *name, double std, double bound) {
  const int i = fd_params_find(p, name);
  const struct fd_param *r = fd_params_row(p, i);
  float *x = malloc((size_t)r->numel * sizeof *x), *again = malloc((size_t)r->numel * sizeof *x);
  double sum = 0, squares = 0, fourth = 0, n = (double)r->numel;
  CHECK(fd_params_init_row(p, i, 7, x) == FD_OK);
  for (int64_t k = 0; k < r->numel; k++) {
    const double v = x[k] / std;
    sum += v;
    squares += v * v;
    fourth += v * v * v * v;
    if (bound > 0) CHECK(fabs((double)x[k]) <= bound);
  }
  const double kurtosis = bound > 0 ? 1.8 : 3, spread = bound > 0 ? 3.6 : 96; /* fourth moment and its variance */
  CHECK(fabs(sum / n) < 5 / sqrt(n));
  CHECK(fabs(squares / n - 1) < 5 * sqrt((kurtosis - 1) / n));
  CHECK(fabs(fourth / n - kurtosis) < 5 * sqrt(spread / n));
  CHECK(fd_params_init_row(p, i, 7, again) == FD_OK && memcmp(x, again, (size_t)r->numel * sizeof *x) == 0);
  CHECK(fd_params_init_row(p, i, 8, again) == FD_OK && memcmp(x, again, (size_t)r->numel * sizeof *x) != 0);
  free(x);
  free(again);
}

static void test_init(void) {
  fd_model *m = NULL;
  CHECK(make(&m, "self", 96, 2, "ape", 80, "adaln-single", 160, 4, 2, 24, "true") == FD_OK);
  if (!m) return;
  const fd_params *p = m->params;
  CHECK(fd_params_layout(m->params, true, 1) == FD_OK);
  check_moments(p, "layers.1.mlp.gate_proj.weight", sqrt(2.0 / (160 + 96)), sqrt(6.0 / (160 + 96)));
  check_moments(p, "patch_embed.proj.weight", sqrt(2.0 / (96 + 64)), sqrt(6.0 / (96 + 64)));
  check_moments(p, "context_embedder.1.weight", 0.02, 0);
  check_moments(p, "layers.0.scale_shift_table", 1 / sqrt(96.0), 0);
  float x[96 * 64], zero[96 * 64] = {0};
  CHECK(fd_params_init_row(p, fd_params_find(p, "proj_out.weight"), 1, x) == FD_OK && memcmp(x, zero, 64 * 96 * sizeof *x) == 0);
  fd_model_destroy(&m);
}

static void test_values(void) {
  fd_model *m = NULL;
  fd_ctx *ctx = NULL;
  fd_graph *g = NULL;
  CHECK(fd_ctx_create(&fd_cpu_backend, 1, NULL, &ctx) == FD_OK);
  CHECK(make(&m, "self", 36, 1, "ape", 36, "adaln-zero", 52, 6, 3, 12, "true") == FD_OK);
  if (!m || !ctx) return;
  fd_params *p = m->params;
  CHECK(fd_params_layout(p, true, 1) == FD_OK && fd_params_alloc(p, ctx, FD_BF16, true) == FD_OK);
  CHECK(fd_params_alloc(p, ctx, FD_BF16, true) == FD_ERR_ARG);
  const int row = fd_params_find(p, "layers.0.self_attn.k_proj.weight");
  float in[36 * 36], out[36 * 36];
  for (int i = 0; i < 36 * 36; i++) in[i] = (float)(i % 256);
  CHECK(fd_params_set(p, row, in) == FD_OK && fd_params_get(p, row, out) == FD_OK && memcmp(in, out, sizeof in) == 0);
  CHECK(fd_params_dtype(p, row) == FD_BF16 && fd_params_dtype(p, fd_params_find(p, "patch_embed.pos_embed")) == FD_F32);
  CHECK(fd_graph_create(ctx, "test", &g) == FD_OK);
  fd_params_grads(p, g);
  fd_var qkv = fd_params_var(p, g, "layers.0.self_attn.qkv.weight"), bias = fd_params_var(p, g, "layers.0.self_attn.qkv.bias");
  CHECK(fd_graph_get(g, qkv)->shape[0] == 144 && fd_graph_get(g, qkv)->shape[1] == 36 && fd_graph_get(g, bias)->shape[0] == 144);
  CHECK(fd_params_var(p, g, "layers.0.self_attn.qkv.weight") == qkv);
  int64_t first = 0, n = 0;
  bool found = false;
  for (fd_var v = 1; v < 10 && !found; v++) found = fd_params_grad_range(p, g, v, &first, &n);
  CHECK(found && n == 144 * 36 && first == offset(p, "layers.0.self_attn.q_proj.weight"));
  CHECK(fd_params_bind(p, g) == FD_OK);
  CHECK((char *)fd_graph_get(g, qkv)->data == (char *)fd_params_flat(p) + first * 2);
  CHECK(fd_params_var(p, g, "layers.9.none") == 0 && fd_graph_status(g) == FD_ERR_ARG);
  fd_params_forget(p, g);
  fd_graph_destroy(&g);
  fd_model_destroy(&m);
  fd_ctx_destroy(&ctx);
}

static void wrong(const char *text, fd_status want, const char *message) {
  fd_model *m = NULL;
  json_t *json = json_loads(text, 0, NULL);
  fd_status st = fd_model_create("folder", json, &m);
  json_decref(json);
  if (st != want || m || !strstr(fd_status_message(), message)) {
    failed = 1;
    printf("%s\n  %s: %s\n  expected: %s\n", text, fd_status_name(st), fd_status_message(), message);
  }
  fd_model_destroy(&m);
}

static void test_wrong(void) {
  wrong("{\"model_type\":\"llama\"}", FD_ERR_UNSUPPORTED, "class llama");
  wrong("{}", FD_ERR_UNSUPPORTED, "(none named)");
  wrong("{\"_class_name\":\"AutoencoderKLQwenImage\"}", FD_ERR_UNSUPPORTED, "not built");
  wrong("{\"model_type\":\"gemma\",\"hidden_size\":\"x\"}", FD_ERR_FORMAT, "hidden_size is no integer");
  wrong("{\"model_type\":\"gemma\"}", FD_ERR_FORMAT, "hidden_size is missing");
  wrong("{\"_class_name\":\"AutoencoderKL\",\"block_out_channels\":[8,20],\"norm_num_groups\":8}", FD_ERR_FORMAT,
        "norm_num_groups 8 does not divide block_out_channels 20");
  wrong("{\"_class_name\":\"AutoencoderKL\",\"block_out_channels\":[8],\"norm_num_groups\":8,\"latents_mean\":[1],\"latents_std\":[1]}",
        FD_ERR_FORMAT, "latents_mean is no list of 4 numbers");
  wrong("{\"_class_name\":\"AutoencoderKL\",\"block_out_channels\":[8],\"norm_num_groups\":8,\"act_fn\":\"relu\"}", FD_ERR_UNSUPPORTED, "act_fn");
  fd_model *m = NULL;
  CHECK(make(&m, "self", 36, 1, "ape", 36, "adaln-zero", 52, 5, 3, 12, "false") == FD_ERR_FORMAT && strstr(fd_status_message(), "does not divide"));
  CHECK(make(&m, "none", 36, 1, "ape", 36, "adaln-zero", 52, 6, 3, 12, "false") == FD_ERR_FORMAT && strstr(fd_status_message(), "known are: self, cross"));
  CHECK(make(&m, "self", 36, 1, "2d-rope", 36, "adaln-zero", 52, 6, 3, 6, "false") == FD_ERR_FORMAT && strstr(fd_status_message(), "head_dim 6"));
  CHECK(make(&m, "cross", 36, 1, "ape", 40, "adaln-zero", 52, 6, 3, 12, "false") == FD_ERR_FORMAT);
  CHECK(fd_model_open("/nonexistent/model", &m) == FD_ERR_IO && strstr(fd_status_message(), "/nonexistent/model/config.json"));
}

/* One error that lists missing, unknown and misshapen tensors together. */
static void test_load(void) {
  char folder[] = "/tmp/fdhpc-params-XXXXXX", file[128];
  fd_model *m = NULL;
  fd_ctx *ctx = NULL;
  if (!mkdtemp(folder)) return;
  snprintf(file, sizeof file, "%s/model.safetensors", folder);
  const char *header = "{\"model.norm.weight\":{\"dtype\":\"F32\",\"shape\":[3],\"data_offsets\":[0,12]},"
                       "\"extra\":{\"dtype\":\"F32\",\"shape\":[],\"data_offsets\":[12,16]},"
                       "\"lm_head.weight\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[16,20]}}";
  FILE *f = fopen(file, "wb");
  const uint64_t n = strlen(header);
  const float x[5] = {0};
  for (int i = 0; i < 8; i++) fputc((int)(n >> (8 * i) & 255), f);
  fwrite(header, 1, n, f);
  fwrite(x, sizeof x, 1, f);
  fclose(f);
  json_t *json = json_loads("{\"model_type\":\"gemma\",\"hidden_size\":4,\"intermediate_size\":4,\"num_hidden_layers\":1,\"vocab_size\":4,"
                            "\"num_attention_heads\":1,\"num_key_value_heads\":1,\"head_dim\":4}", 0, NULL);
  CHECK(fd_ctx_create(&fd_cpu_backend, 1, NULL, &ctx) == FD_OK && fd_model_create(folder, json, &m) == FD_OK);
  CHECK(fd_params_layout(m->params, false, 1) == FD_OK && fd_params_alloc(m->params, ctx, FD_F32, false) == FD_OK);
  CHECK(fd_model_load(m, folder, NULL, NULL) == FD_ERR_FORMAT);
  const char *said = fd_status_message();
  CHECK(strstr(said, "10 missing: model.embed_tokens.weight, model.layers.0.self_attn.q_proj.weight"));
  CHECK(strstr(said, "1 unknown: extra") && !strstr(said, "lm_head"));
  CHECK(strstr(said, "1 of another shape: model.norm.weight is [3], config.json means [4]"));
  fd_model_destroy(&m);
  fd_ctx_destroy(&ctx);
  json_decref(json);
  remove(file);
  rmdir(folder);
}

/* The DiT that options ask for, over the text encoder's config.json. */
static fd_status from_options(const char *options, int64_t text_width, fd_model **m) {
  fd_config *config = NULL;
  json_t *json = NULL, *base = json_pack("{s:s,s:I,s:i,s:i,s:i,s:i,s:s,s:n}", "model_type", "gemma", "hidden_size", (json_int_t)text_width,
                                         "intermediate_size", 16384, "num_attention_heads", 8, "num_key_value_heads", 1, "head_dim", 256,
                                         "hidden_act", "gelu", "hidden_activation");
  fd_status st = fd_config_create(&config);
  if (st == FD_OK) st = fd_config_read_text(config, options, "test");
  if (st == FD_OK) st = fd_dit_config(fd_config_options(config), base, &json);
  if (st == FD_OK) st = fd_model_create("DiT", json, m);
  json_decref(json);
  json_decref(base);
  fd_config_destroy(&config);
  return st;
}

static void test_options(void) {
  fd_model *m = NULL;
  CHECK(from_options("model = { base_config_override = { hidden_size = 2048; head_dim = 128; intermediate_size = 8192;"
                     " num_attention_heads = 16; num_key_value_heads = 4; }; };", 2048, &m) == FD_OK);
  if (m) CHECK(fd_params_total(m->params) == 2660490816LL && m->dims.max_side == 64 && m->dims.layers == 30);
  fd_model_destroy(&m);
  CHECK(from_options("model = { dit_hidden_size = 40; dit_num_hidden_layers = 2; text_hidden_size = 0; pos_embed = \"2d-rope\";"
                     " timestep_conditioning = \"\"; patch_size = 1; };", 72, &m) == FD_OK);
  if (m) {
    CHECK(m->dims.width == 40 && m->dims.text_width == 72 && m->dims.patch == 1 && m->dims.max_side == 0);
    CHECK(fd_params_find(m->params, "timestep_embedder.0.weight") < 0); /* "" is null: no time */
    CHECK(fd_params_row(m->params, fd_params_find(m->params, "layers.1.mlp.up_proj.weight"))->shape[0] == 16384); /* as in model.base */
  }
  fd_model_destroy(&m);
  CHECK(from_options("model = { text_hidden_size = 99; };", 72, &m) == FD_ERR_CONFIG && strstr(fd_status_message(), "model.text_hidden_size is 99"));
}

int main(void) {
  test_options();
  test_layout();
  test_production();
  test_init();
  test_values();
  test_wrong();
  test_load();
  return failed;
}
