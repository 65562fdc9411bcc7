// SPDX-License-Identifier: Apache-2.0
// The diffusion transformer (Peebles & Xie 2023, with text in the same attention). Invariant: the rows of the table are the
// original's state dict, in its order; the graph is its forward pass on packed text.
#include <math.h>
#include <stdlib.h>

#include "base/options.h"
#include "graph/build.h"
#include "model/classes.h"

#define TIME_WIDTH 256 /* sinusoids of the timestep, whatever the width */

/* ---- configuration --------------------------------------------------------------------------------------------------- */

fd_status fd_dit_read(const json_t *json, void *config, struct fd_model_dims *dims) {
  static const char *const attention[] = {"self", "cross", NULL};
  static const char *const pos[] = {"ape", "1d-rope", "2d-rope", "m-rope", NULL};
  static const char *const time[] = {"adaln-zero", "adaln-single", "addition", NULL};
  struct fd_dit_config *c = config;
  struct fd_json j = {.json = json, .where = ""};
  const json_t *base_json = json_object_get(json, "base_config");
  if (!json_is_object(base_json)) return FD_FAIL(FD_ERR_FORMAT, "config.json: base_config is missing");
  struct fd_json b = {.json = base_json, .where = "base_config."};
  c->A = (int)fd_json_int(&b, "num_attention_heads", FD_JSON_REQUIRED, 1, 4096);
  c->K = (int)fd_json_int(&b, "num_key_value_heads", FD_JSON_REQUIRED, 1, 4096);
  c->E = (int)fd_json_int(&b, "head_dim", FD_JSON_REQUIRED, 2, 4096);
  c->F = fd_json_int(&b, "intermediate_size", FD_JSON_REQUIRED, 1, 1 << 24);
  c->eps = (float)fd_json_num(&b, "rms_norm_eps", 1e-6);
  c->std = (float)fd_json_num(&b, "initializer_range", 0.02);
  c->theta = fd_json_num(&b, "rope_theta", 10000);
  c->act = fd_json_activation(&b);
  c->bias = fd_json_bool(&b, "attention_bias", false);
  /* What is missing takes the defaults of the original's DiTConfig; null: as the language model that base_config describes. */
  c->D = fd_json_has(&j, "dit_hidden_size") ? fd_json_int(&j, "dit_hidden_size", 0, 1, 1 << 20)
                                            : fd_json_int(&b, "hidden_size", FD_JSON_REQUIRED, 1, 1 << 20);
  c->layers = fd_json_is_null(&j, "dit_num_hidden_layers") ? fd_json_int(&b, "num_hidden_layers", FD_JSON_REQUIRED, 1, 10000)
                                                           : fd_json_int(&j, "dit_num_hidden_layers", 18, 1, 10000);
  c->text_width = fd_json_int(&j, "text_hidden_size", FD_JSON_REQUIRED, 1, 1 << 20);
  c->P = (int)fd_json_int(&j, "patch_size", 2, 1, 64);
  c->in_channels = (int)fd_json_int(&j, "in_channels", 16, 1, 4096);
  c->out_channels = (int)fd_json_int(&j, "out_channels", 16, 1, 4096);
  c->G = fd_json_int(&j, "pos_embed_max_size", 64, 1, 10000);
  c->base = (double)(fd_json_int(&j, "sample_size", 32, 1, 65536) / c->P); /* whole patches */
  c->qk_norm = fd_json_bool(&j, "qk_norm", false);
  c->sandwich = fd_json_bool(&j, "sandwich_norm", false);
  c->cross = fd_json_choice(&j, "attention", attention, 0) == 1;
  c->pos = (enum fd_dit_pos)fd_json_choice(&j, "pos_embed", pos, FD_DIT_ROPE_1D);
  c->time = (enum fd_dit_time)fd_json_choice(&j, "timestep_conditioning", time,
                                             fd_json_is_null(&j, "timestep_conditioning") ? FD_DIT_NO_TIME : FD_DIT_ADALN_ZERO);
  if (b.st != FD_OK) return b.st;
  if (j.st != FD_OK) return j.st;
  if (c->A % c->K)
    return FD_FAIL(FD_ERR_FORMAT, "config.json: base_config.num_key_value_heads %d does not divide num_attention_heads %d", c->K, c->A);
  if (c->pos == FD_DIT_APE && c->D % 4) return FD_FAIL(FD_ERR_FORMAT, "config.json: dit_hidden_size %lld is no multiple of 4", (long long)c->D);
  if (c->pos != FD_DIT_APE && c->E % (c->pos == FD_DIT_ROPE_1D ? 2 : 4))
    return FD_FAIL(FD_ERR_FORMAT, "config.json: base_config.head_dim %d does not suit pos_embed %s", c->E, pos[c->pos]);
  if (c->pos == FD_DIT_APE && c->base < 1)
    return FD_FAIL(FD_ERR_FORMAT, "config.json: sample_size is smaller than patch_size %d", c->P);
  if (c->cross && c->text_width != c->D)
    return FD_FAIL(FD_ERR_FORMAT, "config.json: attention \"cross\" needs text_hidden_size %lld to equal dit_hidden_size %lld",
                   (long long)c->text_width, (long long)c->D);
  *dims = (struct fd_model_dims){.width = c->D, .layers = c->layers, .text_width = c->text_width, .in_channels = c->in_channels,
                                 .out_channels = c->out_channels, .patch = c->P, .max_side = c->pos == FD_DIT_APE ? c->G : 0};
  return FD_OK;
}

static void set_int(json_t *to, const char *key, int64_t value) {
  if (value > 0) json_object_set_new(to, key, json_integer(value));
}

fd_status fd_dit_config(const struct fd_options *opt, const json_t *text_config, json_t **out) {
  fd_status st = FD_OK;
  json_t *json = json_object(), *base = json_deep_copy(text_config);
  if (!json || !base) FD_TRY(FD_FAIL(FD_ERR_NOMEM, "no memory for the DiT's configuration"));
  const int64_t text_width = json_integer_value(json_object_get(text_config, "hidden_size"));
  set_int(base, "hidden_size", opt->model.base_config_override.hidden_size);
  set_int(base, "intermediate_size", opt->model.base_config_override.intermediate_size);
  set_int(base, "num_attention_heads", opt->model.base_config_override.num_attention_heads);
  set_int(base, "num_key_value_heads", opt->model.base_config_override.num_key_value_heads);
  set_int(base, "head_dim", opt->model.base_config_override.head_dim);
  if (opt->model.base_config_override.hidden_activation[0])
    json_object_set_new(base, "hidden_activation", json_string(opt->model.base_config_override.hidden_activation));
  if (opt->model.base_config_override.initializer_range > 0)
    json_object_set_new(base, "initializer_range", json_real(opt->model.base_config_override.initializer_range));
  if (opt->model.base_config_override.rms_norm_eps > 0)
    json_object_set_new(base, "rms_norm_eps", json_real(opt->model.base_config_override.rms_norm_eps));
  if (opt->model.text_hidden_size && opt->model.text_hidden_size != text_width)
    FD_TRY(FD_FAIL(FD_ERR_CONFIG, "model.text_hidden_size is %lld, but the text states of model.base are %lld wide",
                   (long long)opt->model.text_hidden_size, (long long)text_width));
  json_object_set_new(json, "architectures", json_pack("[s]", "DiT"));
  json_object_set_new(json, "model_type", json_string("DiT"));
  json_object_set(json, "base_config", base);
  json_object_set_new(json, "attention", json_string(opt->model.attention));
  json_object_set_new(json, "pos_embed", json_string(opt->model.pos_embed));
  json_object_set_new(json, "timestep_conditioning",
                      opt->model.timestep_conditioning[0] ? json_string(opt->model.timestep_conditioning) : json_null());
  json_object_set_new(json, "qk_norm", json_boolean(opt->model.qk_norm));
  json_object_set_new(json, "sandwich_norm", json_boolean(opt->model.sandwich_norm));
  json_object_set_new(json, "text_hidden_states_index", json_integer(opt->model.text_hidden_states_index));
  set_int(json, "dit_hidden_size",
          opt->model.dit_hidden_size ? opt->model.dit_hidden_size : json_integer_value(json_object_get(base, "hidden_size")));
  set_int(json, "dit_num_hidden_layers", opt->model.dit_num_hidden_layers);
  set_int(json, "text_hidden_size", text_width);
  set_int(json, "patch_size", opt->model.patch_size);
  set_int(json, "in_channels", opt->model.in_channels);
  set_int(json, "out_channels", opt->model.out_channels);
  set_int(json, "sample_size", opt->model.sample_size);
  set_int(json, "pos_embed_max_size", opt->model.pos_embed_max_size);
  *out = json;
  json = NULL;
done:
  json_decref(base);
  json_decref(json);
  return st;
}

/* ---- parameters ------------------------------------------------------------------------------------------------------ */

/* Row (r, c) of the G x G table: [sin(x w), cos(x w), sin(y w), cos(y w)], x from the column. arg: G, base. Bit-equal to the
 * original: positions in f32, the rest in double. */
static void fill_positions(const struct fd_param *row, float *out) {
  const int64_t G = (int64_t)row->arg[0], D = row->shape[2], q = D / 4;
  const float stretch = (float)(row->arg[0] / row->arg[1]);
  double *w = malloc((size_t)q * sizeof *w), *s = malloc((size_t)(G * q) * 2 * sizeof *s);
  if (w && s) {
    for (int64_t k = 0; k < q; k++) w[k] = 1 / pow(10000, (double)k / (double)q);
    for (int64_t i = 0; i < G; i++) /* the same numbers serve columns and rows */
      for (int64_t k = 0; k < q; k++) {
        double angle = (double)((float)i / stretch) * w[k];
        s[(2 * i) * q + k] = sin(angle);
        s[(2 * i + 1) * q + k] = cos(angle);
      }
    for (int64_t r = 0; r < G; r++)
      for (int64_t c = 0; c < G; c++, out += D)
        for (int64_t k = 0; k < 2 * q; k++) {
          out[k] = (float)s[2 * c * q + k];
          out[2 * q + k] = (float)s[2 * r * q + k];
        }
  } else { /* no status here: NaN is found at the first loss */
    for (int64_t i = 0; i < row->numel; i++) out[i] = NAN;
  }
  free(w);
  free(s);
}

static void add(fd_params *p, const char *prefix, const char *name, int64_t out, int64_t in, enum fd_init init, float std, const char *group) {
  char full[256], label[256];
  struct fd_param row = {.ndim = in ? 2 : 1, .shape = {out, in}, .init = init, .std = std};
  snprintf(full, sizeof full, "%s%s", prefix, name);
  snprintf(label, sizeof label, "%s%s", prefix, group ? group : "");
  row.name = full;
  if (group) row.group = label;
  fd_params_add(p, &row);
}

/* A linear layer in attention: its bias exists with attention_bias only. `group` is what its weight belongs to, or NULL. */
static void add_proj(fd_params *p, const struct fd_dit_config *c, const char *prefix, const char *name, int64_t out, int64_t in,
                     const char *group) {
  char row[64], label[64];
  for (int bias = 0; bias < (c->bias ? 2 : 1); bias++) {
    const char *kind = bias ? "bias" : "weight";
    snprintf(row, sizeof row, "%s.%s", name, kind);
    snprintf(label, sizeof label, "%s.%s", group ? group : "", kind);
    add(p, prefix, row, out, bias ? 0 : in, bias ? FD_INIT_ZERO : FD_INIT_XAVIER, 0, group ? label : NULL);
  }
}

void fd_dit_declare(const void *config, fd_params *p) {
  const struct fd_dit_config *c = config;
  const int64_t D = c->D, q = (int64_t)c->A * c->E, kv = (int64_t)c->K * c->E;
  const enum fd_init zero = FD_INIT_ZERO, normal = FD_INIT_NORMAL, xavier = FD_INIT_XAVIER;
  const bool single = c->time == FD_DIT_ADALN_SINGLE, adaln = c->time == FD_DIT_ADALN_ZERO;
  const float table_std = (float)(1 / sqrt((double)D));
  char at[64];
  if (single) add(p, "", "scale_shift_table", 2 * D, 0, normal, table_std, NULL);
  for (int l = 0; l < c->layers; l++) {
    snprintf(at, sizeof at, "layers.%d.", l);
    if (single) add(p, at, "scale_shift_table", 6 * D, 0, normal, table_std, NULL);
    if (adaln) {
      add(p, at, "input_layernorm.linear.weight", 6 * D, D, zero, 0, NULL);
      add(p, at, "input_layernorm.linear.bias", 6 * D, 0, zero, 0, NULL);
      add(p, at, "input_layernorm.norm.weight", D, 0, zero, 0, NULL);
    } else {
      add(p, at, "input_layernorm.weight", D, 0, zero, 0, NULL);
    }
    snprintf(at, sizeof at, "layers.%d.self_attn.", l);
    if (c->qk_norm) {
      add(p, at, "q_norm.weight", c->E, 0, zero, 0, NULL);
      add(p, at, "k_norm.weight", c->E, 0, zero, 0, NULL);
    }
    add_proj(p, c, at, "q_proj", q, D, "qkv");
    add_proj(p, c, at, "k_proj", kv, D, "qkv");
    add_proj(p, c, at, "v_proj", kv, D, "qkv");
    if (!c->cross) {
      add_proj(p, c, at, "text_k_proj", kv, D, "text_kv");
      add_proj(p, c, at, "text_v_proj", kv, D, "text_kv");
    }
    add_proj(p, c, at, "o_proj", D, q, NULL);
    if (c->cross) {
      snprintf(at, sizeof at, "layers.%d.cross_attn.", l);
      if (c->qk_norm) {
        add(p, at, "q_norm.weight", c->E, 0, zero, 0, NULL);
        add(p, at, "k_norm.weight", c->E, 0, zero, 0, NULL);
      }
      add_proj(p, c, at, "q_proj", q, D, NULL);
      add_proj(p, c, at, "o_proj", D, q, NULL);
      add_proj(p, c, at, "text_k_proj", kv, D, NULL);
      add_proj(p, c, at, "text_v_proj", kv, D, NULL);
    }
    snprintf(at, sizeof at, "layers.%d.", l);
    add(p, at, "post_attention_layernorm.weight", D, 0, zero, 0, NULL);
    if (c->sandwich) {
      add(p, at, "pre_feedforward_layernorm.weight", D, 0, zero, 0, NULL);
      add(p, at, "post_feedforward_layernorm.weight", D, 0, zero, 0, NULL);
      if (c->cross) add(p, at, "post_cross_attention_layernorm.weight", D, 0, zero, 0, NULL);
    }
    add(p, at, "mlp.gate_proj.weight", c->F, D, xavier, 0, "mlp.gate_up.weight");
    add(p, at, "mlp.up_proj.weight", c->F, D, xavier, 0, "mlp.gate_up.weight");
    add(p, at, "mlp.down_proj.weight", D, c->F, xavier, 0, NULL);
  }
  if (c->pos == FD_DIT_APE)
    fd_params_add(p, &(struct fd_param){.name = "patch_embed.pos_embed", .ndim = 3, .shape = {1, c->G * c->G, D}, .init = FD_INIT_TABLE,
                                        .fill = fill_positions, .arg = {(double)c->G, c->base}, .buffer = true});
  fd_params_add(p, &(struct fd_param){.name = "patch_embed.proj.weight", .ndim = 4, .shape = {D, c->in_channels, c->P, c->P}, .init = xavier});
  add(p, "", "patch_embed.proj.bias", D, 0, zero, 0, NULL);
  if (c->time != FD_DIT_NO_TIME) {
    add(p, "timestep_embedder.", "0.weight", D, TIME_WIDTH, normal, c->std, NULL);
    add(p, "timestep_embedder.", "0.bias", D, 0, zero, 0, NULL);
    add(p, "timestep_embedder.", "2.weight", D, D, normal, c->std, NULL);
    add(p, "timestep_embedder.", "2.bias", D, 0, zero, 0, NULL);
  }
  if (single) {
    add(p, "t_block.", "1.weight", 6 * D, D, normal, c->std, NULL);
    add(p, "t_block.", "1.bias", 6 * D, 0, zero, 0, NULL);
  }
  add(p, "context_embedder.", "0.weight", c->text_width, 0, zero, 0, NULL);
  add(p, "context_embedder.", "1.weight", D, c->text_width, normal, c->std, NULL);
  add(p, "context_embedder.", "1.bias", D, 0, zero, 0, NULL);
  if (adaln) {
    add(p, "norm_out.", "linear.weight", 2 * D, D, zero, 0, NULL);
    add(p, "norm_out.", "linear.bias", 2 * D, 0, zero, 0, NULL);
    add(p, "norm_out.", "norm.weight", D, 0, zero, 0, NULL);
  } else {
    add(p, "norm_out.", "weight", D, 0, zero, 0, NULL);
  }
  add(p, "", "proj_out.weight", (int64_t)c->P * c->P * c->out_channels, D, zero, 0, NULL);
  add(p, "", "proj_out.bias", (int64_t)c->P * c->P * c->out_channels, 0, zero, 0, NULL);
}

/* ---- graph ----------------------------------------------------------------------------------------------------------- */

struct build {
  fd_model *m;
  fd_graph *g;
  const struct fd_dit_config *c;
  const struct fd_dit_inputs *in;
  fd_dtype dtype;
  int64_t B, N, h, w;
  fd_var e, e_silu, t_all; /* time; 0 if there is none */
  fd_var text;             /* T [rows, D] */
  fd_var rope;
};

static fd_var weight(const struct build *b, const char *format, ...) __attribute__((format(printf, 2, 3)));
static fd_var weight(const struct build *b, const char *format, ...) {
  char name[256];
  va_list args;
  va_start(args, format);
  vsnprintf(name, sizeof name, format, args);
  va_end(args);
  return fd_params_var(b->m->params, b->g, name);
}

/* A linear layer of attention, by its prefix and the name of the weight or group. */
static fd_var project(const struct build *b, fd_var x, const char *prefix, const char *name, fd_var count) {
  return fd_linear(b->g, x, weight(b, "%s%s.weight", prefix, name), b->c->bias ? weight(b, "%s%s.bias", prefix, name) : 0, count);
}

/* The crop of the position table that this latent reads, [N, D] f32. */
static fd_var positions(const struct build *b) {
  const struct fd_dit_config *c = b->c;
  fd_graph *g = b->g;
  if (b->h > c->G || b->w > c->G) {
    fd_graph_fail(g, FD_ERR_CONFIG, "%lld x %lld patches, the position table has %lld x %lld (model.pos_embed_max_size)", (long long)b->h,
                  (long long)b->w, (long long)c->G, (long long)c->G);
    return 0;
  }
  int32_t *ids = malloc((size_t)b->N * sizeof *ids);
  if (!ids) {
    fd_graph_fail(g, FD_ERR_NOMEM, "no memory for positions");
    return 0;
  }
  const int64_t top = (c->G - b->h) / 2, left = (c->G - b->w) / 2;
  for (int64_t t = 0; t < b->N; t++) ids[t] = (int32_t)((top + t / b->w) * c->G + left + t % b->w);
  char name[64];
  snprintf(name, sizeof name, "patch_embed.crop.%lldx%lld", (long long)b->h, (long long)b->w);
  fd_var crop = fd_params_const(b->m->params, g, name, FD_I32, 1, &b->N, ids);
  free(ids);
  fd_var table = fd_graph_view(g, weight(b, "patch_embed.pos_embed"), 2, (int64_t[]){c->G * c->G, c->D});
  return fd_embed(g, crop, table, 1, -1, FD_F32, 0);
}

static fd_var rotations(const struct build *b) {
  const struct fd_dit_config *c = b->c;
  const int64_t half = c->E / 2, quarter = c->E / 4;
  float *angle = malloc((size_t)(b->N * half) * sizeof *angle);
  if (!angle) {
    fd_graph_fail(b->g, FD_ERR_NOMEM, "no memory for rotations");
    return 0;
  }
  for (int64_t t = 0; t < b->N; t++)
    for (int64_t k = 0; k < half; k++) {
      const int64_t row = t / b->w, col = t % b->w;
      const bool by_row = k < quarter;
      const float f = (float)pow(c->theta, -2.0 * (double)k / c->E);
      const float f2 = (float)pow(c->theta, -2.0 * (double)(by_row ? k : k - quarter) / (double)half);
      angle[t * half + k] = c->pos == FD_DIT_ROPE_1D ? (float)t * f : (float)(by_row ? row : col) * (c->pos == FD_DIT_ROPE_2D ? f2 : f);
    }
  char name[64];
  snprintf(name, sizeof name, "rope.%lldx%lld", (long long)b->h, (long long)b->w);
  fd_var v = fd_rope_table(b->m->params, b->g, name, b->N, c->E, angle);
  free(angle);
  return v;
}

static void embed_time(struct build *b) {
  const struct fd_dit_config *c = b->c;
  fd_graph *g = b->g;
  if (c->time == FD_DIT_NO_TIME) return;
  float freqs[TIME_WIDTH / 2];
  const int64_t n = TIME_WIDTH / 2;
  for (int64_t k = 0; k < n; k++) freqs[k] = (float)exp(-log(10000.0) * (double)k / (double)n);
  fd_var e = fd_timestep_embed(g, b->in->t, fd_params_const(b->m->params, g, "timestep_embedder.freqs", FD_F32, 1, &n, freqs), b->dtype);
  e = fd_linear(g, e, weight(b, "timestep_embedder.0.weight"), weight(b, "timestep_embedder.0.bias"), 0);
  e = fd_activate(g, e, FD_ACT_SILU, 0);
  b->e = fd_linear(g, e, weight(b, "timestep_embedder.2.weight"), weight(b, "timestep_embedder.2.bias"), 0);
  if (c->time == FD_DIT_ADDITION) return;
  b->e_silu = fd_activate(g, b->e, FD_ACT_SILU, 0);
  if (c->time == FD_DIT_ADALN_SINGLE) b->t_all = fd_linear(g, b->e_silu, weight(b, "t_block.1.weight"), weight(b, "t_block.1.bias"), 0);
}

/* Every token of sample s gets e[s]: a gated residual whose gate is e and whose branch is 1. */
static fd_var add_time(const struct build *b, fd_var x) {
  const int64_t shape[] = {b->B * b->N, b->c->D}, n = shape[0] * shape[1];
  void *one = malloc((size_t)n * fd_dtype_bytes(b->dtype));
  if (!one) {
    fd_graph_fail(b->g, FD_ERR_NOMEM, "no memory for the timestep's rows");
    return 0;
  }
  for (int64_t i = 0; i < n; i++) {
    if (b->dtype == FD_BF16) ((fd_bf16 *)one)[i] = fd_f32_to_bf16(1);
    else ((float *)one)[i] = 1;
  }
  char name[64];
  snprintf(name, sizeof name, "ones.%lldx%lld.%s", (long long)shape[0], (long long)shape[1], fd_dtype_name(b->dtype));
  fd_var ones = fd_params_const(b->m->params, b->g, name, b->dtype, 2, shape, one);
  free(one);
  const struct fd_mod by = {.mod = b->e, .rows_per_mod = b->N, .shift_col = -1, .scale_col = -1, .gate_col = 0};
  return fd_residual(b->g, x, ones, &by, 0);
}

/* The vectors of one layer, columns of one value: shift_a, scale_a, gate_a, shift_m, scale_m, gate_m. */
static void modulation(const struct build *b, int l, struct fd_mod *attn, struct fd_mod *mlp) {
  const int64_t D = b->c->D;
  fd_var mod = 0;
  if (b->c->time == FD_DIT_ADALN_ZERO)
    mod = fd_linear(b->g, b->e_silu, weight(b, "layers.%d.input_layernorm.linear.weight", l), weight(b, "layers.%d.input_layernorm.linear.bias", l), 0);
  if (b->c->time == FD_DIT_ADALN_SINGLE) mod = fd_add(b->g, b->t_all, weight(b, "layers.%d.scale_shift_table", l), 0);
  *attn = (struct fd_mod){.mod = mod, .rows_per_mod = b->N, .shift_col = 0, .scale_col = D, .gate_col = 2 * D};
  *mlp = (struct fd_mod){.mod = mod, .rows_per_mod = b->N, .shift_col = 3 * D, .scale_col = 4 * D, .gate_col = 5 * D};
}

static fd_var norm(const struct build *b, fd_var x, int l, const char *name, const struct fd_mod *mod) {
  return fd_rmsnorm(b->g, x, weight(b, "layers.%d.%s.weight", l, name), b->c->eps, mod && mod->mod ? mod : NULL, 0);
}

/* Attention of image tokens to text alone, on the raw stream: no modulation, no gate, no rotation. */
static fd_var cross_attention(const struct build *b, fd_var x, int l) {
  const struct fd_dit_config *c = b->c;
  const struct fd_text_vars *text = b->in->text;
  fd_graph *g = b->g;
  char at[64];
  snprintf(at, sizeof at, "layers.%d.cross_attn.", l);
  fd_var q = project(b, x, at, "q_proj", 0);
  fd_var k = project(b, b->text, at, "text_k_proj", text->count), v = project(b, b->text, at, "text_v_proj", text->count);
  if (c->qk_norm) { /* one row per head */
    q = fd_graph_view(g, q, 2, (int64_t[]){b->B * b->N * c->A, c->E});
    k = fd_graph_view(g, k, 2, (int64_t[]){text->T * c->K, c->E});
    q = fd_rmsnorm(g, q, weight(b, "%sq_norm.weight", at), c->eps, NULL, 0);
    k = fd_rmsnorm(g, k, weight(b, "%sk_norm.weight", at), c->eps, NULL, text->head_count);
  }
  const struct fd_attention a = {
      .q = fd_graph_view(g, q, 3, (int64_t[]){b->B * b->N, c->A, c->E}),
      .k = fd_graph_view(g, k, 3, (int64_t[]){text->T, c->K, c->E}),
      .v = fd_graph_view(g, v, 3, (int64_t[]){text->T, c->K, c->E}),
      .ranges = text->cross_ranges, .A = c->A, .K = c->K, .E = c->E, .scale = (float)(1 / sqrt((double)c->E)), .max_q = b->N,
      .max_k = text->L};
  fd_var o = project(b, fd_attention(g, &a), at, "o_proj", 0);
  if (c->sandwich) o = norm(b, o, l, "post_cross_attention_layernorm", NULL);
  return fd_residual(g, x, o, NULL, 0);
}

static fd_var layer(const struct build *b, fd_var x, int l) {
  const struct fd_dit_config *c = b->c;
  const struct fd_text_vars *text = b->in->text;
  fd_graph *g = b->g;
  struct fd_mod attn, mlp;
  char at[64];
  snprintf(at, sizeof at, "layers.%d.self_attn.", l);
  modulation(b, l, &attn, &mlp);

  fd_var y = norm(b, x, l, c->time == FD_DIT_ADALN_ZERO ? "input_layernorm.norm" : "input_layernorm", &attn);
  struct fd_heads h = {.qkv = project(b, y, at, "qkv", 0), .rope = b->rope, .B = b->B, .N = b->N, .A = c->A, .K = c->K, .E = c->E, .eps = c->eps};
  if (!c->cross) {
    h.text_kv = project(b, b->text, at, "text_kv", text->count);
    h.text = text->first;
    h.L = text->L;
  }
  if (c->qk_norm) {
    h.q_norm = weight(b, "%sq_norm.weight", at);
    h.k_norm = weight(b, "%sk_norm.weight", at);
  }
  struct fd_attention a = {.ranges = c->cross ? text->self_ranges : text->image_ranges, .A = c->A, .K = c->K, .E = c->E,
                           .scale = (float)(1 / sqrt((double)c->E)), .max_q = b->N, .max_k = b->N + h.L,
                           .q_stride = b->N, .k_stride = b->N + h.L};
  fd_heads(g, &h, &a.q, &a.k, &a.v);
  fd_var o = project(b, fd_attention(g, &a), at, "o_proj", 0);
  if (c->sandwich) o = norm(b, o, l, "post_attention_layernorm", NULL);
  x = fd_residual(g, x, o, attn.mod ? &attn : NULL, 0);
  if (c->cross) x = cross_attention(b, x, l);

  y = norm(b, x, l, c->sandwich ? "pre_feedforward_layernorm" : "post_attention_layernorm", &mlp);
  y = fd_linear(g, y, weight(b, "layers.%d.mlp.gate_up.weight", l), 0, 0);
  y = fd_geglu(g, y, c->act, 0);
  y = fd_linear(g, y, weight(b, "layers.%d.mlp.down_proj.weight", l), 0, 0);
  if (c->sandwich) y = norm(b, y, l, "post_feedforward_layernorm", NULL);
  return fd_residual(g, x, y, mlp.mod ? &mlp : NULL, 0);
}

/* [e, e] exactly: a linear layer whose weight is two identities. */
static fd_var twice(const struct build *b, fd_var e) {
  const int64_t D = b->c->D, shape[] = {2 * D, D};
  size_t bytes = fd_dtype_bytes(b->dtype);
  char *two = calloc((size_t)(2 * D * D), bytes);
  if (!two) {
    fd_graph_fail(b->g, FD_ERR_NOMEM, "no memory for the output's modulation");
    return 0;
  }
  for (int64_t r = 0; r < 2 * D; r++) {
    if (b->dtype == FD_BF16) ((fd_bf16 *)two)[r * D + r % D] = fd_f32_to_bf16(1);
    else ((float *)two)[r * D + r % D] = 1;
  }
  fd_var w = fd_params_const(b->m->params, b->g, b->dtype == FD_BF16 ? "two identities bf16" : "two identities", b->dtype, 2, shape, two);
  free(two);
  return fd_linear(b->g, e, w, 0, 0);
}

static fd_var output(const struct build *b, fd_var x) {
  const struct fd_dit_config *c = b->c;
  const int64_t D = c->D;
  fd_graph *g = b->g;
  struct fd_mod mod = {.rows_per_mod = b->N, .gate_col = -1};
  if (c->time == FD_DIT_ADALN_ZERO) { /* scale first here */
    mod.mod = fd_linear(g, b->e_silu, weight(b, "norm_out.linear.weight"), weight(b, "norm_out.linear.bias"), 0);
    mod.scale_col = 0;
    mod.shift_col = D;
  } else if (c->time == FD_DIT_ADALN_SINGLE) { /* shift first, and e, not silu(e) */
    mod.mod = fd_add(g, twice(b, b->e), weight(b, "scale_shift_table"), 0);
    mod.shift_col = 0;
    mod.scale_col = D;
  }
  x = fd_rmsnorm(g, x, weight(b, c->time == FD_DIT_ADALN_ZERO ? "norm_out.norm.weight" : "norm_out.weight"), c->eps, mod.mod ? &mod : NULL, 0);
  x = fd_linear(g, x, weight(b, "proj_out.weight"), weight(b, "proj_out.bias"), 0); /* [B N, P P C_out] */
  return fd_unpatchify(g, x, c->P, 1, b->B, b->h * c->P, b->w * c->P);
}

fd_var fd_dit(fd_model *m, fd_graph *g, const struct fd_dit_inputs *in) {
  if (m->cls->family != FD_FAMILY_DIT) {
    fd_graph_fail(g, FD_ERR_CONFIG, "%s: a %s is no DiT", m->name, m->cls->name);
    return 0;
  }
  const struct fd_dit_config *c = m->config;
  const fd_tensor *x = fd_graph_get(g, in->x);
  if (fd_graph_status(g) != FD_OK) return 0;
  struct build b = {.m = m, .g = g, .c = c, .in = in, .dtype = x->dtype, .B = x->shape[0], .h = x->shape[1] / c->P, .w = x->shape[2] / c->P};
  b.N = b.h * b.w;
  if (x->ndim != 4 || x->shape[1] % c->P || x->shape[2] % c->P || x->shape[3] != c->in_channels || b.N < 1) {
    fd_graph_fail(g, FD_ERR_CONFIG, "latents of %lld x %lld with %lld channels; the DiT wants multiples of %d and %d channels",
                  (long long)x->shape[1], (long long)x->shape[2], (long long)x->shape[3], c->P, c->in_channels);
    return 0;
  }
  if (in->text->N != b.N) {
    fd_graph_fail(g, FD_ERR_ARG, "the text was laid out for %lld image tokens, there are %lld", (long long)in->text->N, (long long)b.N);
    return 0;
  }
  if (c->cross) in->text->heads = c->K;
  const int64_t D = c->D, patch = (int64_t)c->in_channels * c->P * c->P;
  /* [B, H, W, C] -> [B N, C P P] -> [B N, D] */
  fd_var tokens = fd_graph_view(g, fd_patchify(g, in->x, c->P, 0), 2, (int64_t[]){b.B * b.N, patch});
  fd_var stream = fd_linear(g, tokens, fd_graph_view(g, weight(&b, "patch_embed.proj.weight"), 2, (int64_t[]){D, patch}),
                            weight(&b, "patch_embed.proj.bias"), 0);
  if (c->pos == FD_DIT_APE) stream = fd_add(g, stream, positions(&b), 0);
  else b.rope = rotations(&b);
  embed_time(&b);
  if (c->time == FD_DIT_ADDITION) stream = add_time(&b, stream);
  b.text = fd_rmsnorm(g, in->states, weight(&b, "context_embedder.0.weight"), c->eps, NULL, in->text->count);
  b.text = fd_linear(g, b.text, weight(&b, "context_embedder.1.weight"), weight(&b, "context_embedder.1.bias"), in->text->count);
  for (int l = 0; l < c->layers; l++) {
    if (in->checkpoint) fd_graph_segment_begin(g);
    stream = layer(&b, stream, l);
    if (in->checkpoint) fd_graph_segment_end(g);
  }
  return output(&b, stream);
}
