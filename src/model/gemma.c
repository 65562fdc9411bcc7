// SPDX-License-Identifier: Apache-2.0
// Gemma and Gemma 2 as text encoders, on packed text. Invariant: no row of a sequence ever sees another sequence.
#include <math.h>
#include <stdlib.h>

#include "graph/build.h"
#include "model/classes.h"

static fd_status read_config(const json_t *json, bool gemma2, struct fd_gemma_config *c, struct fd_model_dims *dims) {
  struct fd_json j = {.json = json, .where = ""};
  c->gemma2 = gemma2;
  c->D = fd_json_int(&j, "hidden_size", FD_JSON_REQUIRED, 1, 1 << 20);
  c->F = fd_json_int(&j, "intermediate_size", FD_JSON_REQUIRED, 1, 1 << 24);
  c->layers = fd_json_int(&j, "num_hidden_layers", FD_JSON_REQUIRED, 1, 4096);
  c->vocab = fd_json_int(&j, "vocab_size", gemma2 ? 256000 : FD_JSON_REQUIRED, 1, INT32_MAX);
  c->A = (int)fd_json_int(&j, "num_attention_heads", FD_JSON_REQUIRED, 1, 4096);
  c->K = (int)fd_json_int(&j, "num_key_value_heads", gemma2 ? 4 : 16, 1, 4096);
  c->E = (int)fd_json_int(&j, "head_dim", 256, 2, 4096);
  c->max_positions = fd_json_int(&j, "max_position_embeddings", 8192, 1, 1 << 24);
  c->pad_id = fd_json_int(&j, "pad_token_id", 0, -1, INT32_MAX);
  c->theta = fd_json_num(&j, "rope_theta", 10000.0);
  c->eps = (float)fd_json_num(&j, "rms_norm_eps", 1e-6);
  c->std = (float)fd_json_num(&j, "initializer_range", 0.02);
  c->act = fd_json_activation(&j);
  c->bias = fd_json_bool(&j, "attention_bias", false);
  c->scale = (float)(1 / sqrt((double)c->E));
  if (gemma2) {
    double scalar = fd_json_num(&j, "query_pre_attn_scalar", 224);
    c->scale = (float)(1 / sqrt(scalar));
    c->window = fd_json_int(&j, "sliding_window", 4096, 1, INT32_MAX);
    /* scores are capped by the eager implementation only; what the original runs (sdpa) ignores attn_logit_softcapping */
    const char *how = fd_json_text(&j, "attn_implementation", "sdpa");
    if (strcmp(how, "eager") == 0 && !fd_json_is_null(&j, "attn_logit_softcapping"))
      c->softcap = (float)fd_json_num(&j, "attn_logit_softcapping", 50.0);
  }
  if (j.st == FD_OK && fd_json_has(&j, "rope_scaling")) j.st = FD_FAIL(FD_ERR_UNSUPPORTED, "config.json: rope_scaling is not built");
  if (j.st == FD_OK && c->A % c->K)
    j.st = FD_FAIL(FD_ERR_FORMAT, "config.json: num_key_value_heads %d does not divide num_attention_heads %d", c->K, c->A);
  if (j.st == FD_OK && c->E % 2) j.st = FD_FAIL(FD_ERR_FORMAT, "config.json: head_dim %d is odd, positions rotate pairs", c->E);
  *dims = (struct fd_model_dims){.width = c->D, .layers = c->layers, .vocab = c->vocab, .pad_id = c->pad_id};
  return j.st;
}

fd_status fd_gemma_read(const json_t *json, void *config, struct fd_model_dims *dims) { return read_config(json, false, config, dims); }
fd_status fd_gemma2_read(const json_t *json, void *config, struct fd_model_dims *dims) { return read_config(json, true, config, dims); }

/* Row "model.<rest>", called "<rest>" in files that were saved from the inner model. */
static void add(fd_params *p, struct fd_param row, const char *layer, const char *name, const char *group) {
  char full[256], label[256];
  snprintf(full, sizeof full, "model.%s%s", layer, name);
  snprintf(label, sizeof label, "model.%s%s", layer, group ? group : "");
  row.name = full;
  row.alias = full + sizeof "model." - 1;
  row.group = group ? label : NULL;
  fd_params_add(p, &row);
}

void fd_gemma_declare(const void *config, fd_params *p) {
  const struct fd_gemma_config *c = config;
  const int64_t q = (int64_t)c->A * c->E, kv = (int64_t)c->K * c->E;
  const struct {
    const char *name, *group;
    int64_t out, in;
  } proj[] = {{"self_attn.q_proj", "self_attn.qkv", q, c->D}, {"self_attn.k_proj", "self_attn.qkv", kv, c->D},
              {"self_attn.v_proj", "self_attn.qkv", kv, c->D}, {"self_attn.o_proj", NULL, c->D, q},
              {"mlp.gate_proj", "mlp.gate_up", c->F, c->D},    {"mlp.up_proj", "mlp.gate_up", c->F, c->D},
              {"mlp.down_proj", NULL, c->D, c->F}};
  static const char *const norms[] = {"input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm"};
  const struct fd_param norm = {.ndim = 1, .shape = {c->D}, .init = FD_INIT_ZERO};
  add(p, (struct fd_param){.ndim = 2, .shape = {c->vocab, c->D}, .init = FD_INIT_NORMAL, .std = c->std}, "", "embed_tokens.weight", NULL);
  for (int l = 0; l < c->layers; l++) {
    char layer[32], name[64], group[64];
    snprintf(layer, sizeof layer, "layers.%d.", l);
    for (size_t i = 0; i < sizeof proj / sizeof *proj; i++)
      for (int bias = 0; bias < (c->bias && i < 4 ? 2 : 1); bias++) {
        struct fd_param row = {.ndim = bias ? 1 : 2, .shape = {proj[i].out, bias ? 0 : proj[i].in},
                               .init = bias ? FD_INIT_ZERO : FD_INIT_NORMAL, .std = c->std};
        snprintf(name, sizeof name, "%s.%s", proj[i].name, bias ? "bias" : "weight");
        snprintf(group, sizeof group, "%s.%s", proj[i].group ? proj[i].group : "", bias ? "bias" : "weight");
        add(p, row, layer, name, proj[i].group ? group : NULL);
      }
    for (int i = 0; i < (c->gemma2 ? 4 : 2); i++) {
      snprintf(name, sizeof name, "%s.weight", norms[i]);
      add(p, norm, layer, name, NULL);
    }
  }
  add(p, norm, "", "norm.weight", NULL);
}

/* Rotation of positions 0 .. positions-1; frequencies and angles in f32, as transformers computes them. */
static fd_var rope(fd_model *m, fd_graph *g, int64_t positions) {
  const struct fd_gemma_config *c = m->config;
  const int64_t half = c->E / 2;
  float *angles = malloc((size_t)(positions * half) * sizeof *angles);
  if (!angles) {
    fd_graph_fail(g, FD_ERR_NOMEM, "%s: no memory for rotations", m->name);
    return 0;
  }
  for (int64_t k = 0; k < half; k++) {
    float f = (float)pow(c->theta, -2.0 * (double)k / c->E);
    for (int64_t r = 0; r < positions; r++) angles[r * half + k] = (float)r * f;
  }
  char name[64];
  snprintf(name, sizeof name, "text.rope.%lld", (long long)positions);
  fd_var v = fd_rope_table(m->params, g, name, positions, c->E, angles);
  free(angles);
  return v;
}

fd_var fd_gemma_states(fd_model *m, fd_graph *g, const struct fd_text_vars *text, int index, fd_dtype dtype) {
  const struct fd_gemma_config *c = m->config;
  fd_params *p = m->params;
  const fd_var count = text->count;
  const int64_t entries = c->layers + 1, at = index < 0 ? entries + index : index;
  if (at < 0 || at >= entries) {
    fd_graph_fail(g, FD_ERR_CONFIG, "%s: text_hidden_states_index %d, the model has hidden states %lld to %lld", m->name, index,
                  (long long)-entries, (long long)entries - 1);
    return 0;
  }
  const fd_var table = rope(m, g, text->L);
  /* In bf16 the stream and the norms stay in f32, as the original's do: its values are large and many layers add to them. */
  fd_var x = fd_embed(g, text->ids, fd_params_var(p, g, "model.embed_tokens.weight"), sqrtf((float)c->D), c->pad_id, FD_F32, count);
  for (int l = 0; l < at; l++) {
    struct fd_heads h = {.rope = table, .pos = text->pos, .count = count, .B = 1, .N = text->T, .A = c->A, .K = c->K, .E = c->E, .eps = c->eps};
    struct fd_attention a = {.ranges = text->ranges, .A = c->A, .K = c->K, .E = c->E, .scale = c->scale, .causal = 1, .softcap = c->softcap,
                             .max_q = text->L, .max_k = text->L};
    if (c->gemma2 && l % 2 == 0) a.window = c->window;
    fd_var y = fd_rmsnorm_as(g, x, fd_params_varf(p, g, "model.layers.%d.input_layernorm.weight", l), c->eps, NULL, count, dtype);
    h.qkv = fd_linear(g, y, fd_params_varf(p, g, "model.layers.%d.self_attn.qkv.weight", l),
                      c->bias ? fd_params_varf(p, g, "model.layers.%d.self_attn.qkv.bias", l) : 0, count);
    fd_heads(g, &h, &a.q, &a.k, &a.v);
    y = fd_attention(g, &a);
    y = fd_linear(g, y, fd_params_varf(p, g, "model.layers.%d.self_attn.o_proj.weight", l),
                  c->bias ? fd_params_varf(p, g, "model.layers.%d.self_attn.o_proj.bias", l) : 0, count);
    if (c->gemma2) y = fd_rmsnorm(g, fd_cast(g, y, FD_F32, 1), fd_params_varf(p, g, "model.layers.%d.post_attention_layernorm.weight", l), c->eps, NULL, count);
    x = fd_residual(g, x, y, NULL, count);
    y = fd_rmsnorm_as(g, x, fd_params_varf(p, g, "model.layers.%d.%s.weight", l, c->gemma2 ? "pre_feedforward_layernorm" : "post_attention_layernorm"),
                      c->eps, NULL, count, dtype);
    y = fd_linear(g, y, fd_params_varf(p, g, "model.layers.%d.mlp.gate_up.weight", l), 0, count);
    y = fd_geglu(g, y, c->act, count);
    y = fd_linear(g, y, fd_params_varf(p, g, "model.layers.%d.mlp.down_proj.weight", l), 0, count);
    if (c->gemma2) y = fd_rmsnorm(g, fd_cast(g, y, FD_F32, 1), fd_params_varf(p, g, "model.layers.%d.post_feedforward_layernorm.weight", l), c->eps, NULL, count);
    x = fd_residual(g, x, y, NULL, count);
  }
  /* the last entry is after the final norm; the last layer's raw output is nowhere in hidden_states */
  return at == c->layers ? fd_rmsnorm_as(g, x, fd_params_var(p, g, "model.norm.weight"), c->eps, NULL, count, dtype) : fd_cast(g, x, dtype, 1);
}
