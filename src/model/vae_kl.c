// SPDX-License-Identifier: Apache-2.0
// AutoencoderKL of diffusers (Stable Diffusion, FLUX.1, SD 3.5 and the end-to-end tuned ones). Invariant: images are NHWC inside,
// weights as published; names of before 2023 are aliases.
#include <math.h>
#include <stdlib.h>

#include "graph/build.h"
#include "model/classes.h"

#define GROUPNORM_EPS 1e-6f

fd_status fd_vae_kl_read(const json_t *json, void *config, struct fd_model_dims *dims) {
  struct fd_vae_kl_config *c = config;
  struct fd_json j = {.json = json, .where = ""};
  int64_t channels[FD_VAE_MAX_BLOCKS] = {64}; /* of the diffusers class, as the other defaults */
  c->n_blocks = fd_json_ints(&j, "block_out_channels", FD_VAE_MAX_BLOCKS, 1, 1 << 16, channels);
  if (j.st == FD_OK && c->n_blocks == 0) c->n_blocks = 1;
  for (int i = 0; i < c->n_blocks; i++) c->channels[i] = (int)channels[i];
  c->layers_per_block = (int)fd_json_int(&j, "layers_per_block", 1, 1, 64);
  c->groups = (int)fd_json_int(&j, "norm_num_groups", 32, 1, 1 << 16);
  c->in_channels = (int)fd_json_int(&j, "in_channels", 3, 1, 64);
  c->out_channels = (int)fd_json_int(&j, "out_channels", 3, 1, 64);
  c->Z = (int)fd_json_int(&j, "latent_channels", 4, 1, FD_VAE_MAX_LATENT);
  c->quant = fd_json_bool(&j, "use_quant_conv", true);
  c->post_quant = fd_json_bool(&j, "use_post_quant_conv", true);
  c->attention = fd_json_bool(&j, "mid_block_add_attention", true);
  if (j.st == FD_OK && strcmp(fd_json_text(&j, "act_fn", "silu"), "silu") != 0)
    j.st = FD_FAIL(FD_ERR_UNSUPPORTED, "config.json: act_fn \"%s\", only silu is built", fd_json_text(&j, "act_fn", "silu"));
  for (int i = 0; i < c->n_blocks && j.st == FD_OK; i++)
    if (c->channels[i] % c->groups)
      j.st = FD_FAIL(FD_ERR_FORMAT, "config.json: norm_num_groups %d does not divide block_out_channels %d", c->groups, c->channels[i]);
  /* statistics per channel win over the two factors, though the end-to-end tuned files carry both */
  float mean[FD_VAE_MAX_LATENT], std[FD_VAE_MAX_LATENT];
  const double shift = fd_json_num(&j, "shift_factor", 0), scale = fd_json_num(&j, "scaling_factor", 0.18215);
  const bool both = fd_json_has(&j, "latents_mean") && fd_json_has(&j, "latents_std");
  const bool have = both && fd_json_nums(&j, "latents_mean", c->Z, mean) && fd_json_nums(&j, "latents_std", c->Z, std);
  for (int i = 0; i < c->Z; i++) {
    if (j.st == FD_OK && (have ? !(std[i] > 0) : !(scale != 0)))
      j.st = FD_FAIL(FD_ERR_FORMAT, "config.json: %s must not be 0", have ? "latents_std" : "scaling_factor");
    c->sub[i] = have ? mean[i] : (float)shift;
    c->mul[i] = have ? 1.0f / std[i] : (float)scale;
  }
  *dims = (struct fd_model_dims){.in_channels = c->in_channels, .out_channels = c->out_channels, .latent_channels = c->Z,
                                 .factor = (int64_t)1 << (c->n_blocks > 0 ? c->n_blocks - 1 : 0)};
  return j.st;
}

void fd_vae_kl_statistics(const void *config, const float **sub, const float **mul) {
  const struct fd_vae_kl_config *c = config;
  *sub = c->sub;
  *mul = c->mul;
}

/* ---- parameters ------------------------------------------------------------------------------------------------------ */

static void add_conv(fd_params *p, const char *prefix, const char *name, int out, int in, int side) {
  const struct fd_param w = {.ndim = 4, .shape = {out, in, side, side}, .init = FD_INIT_XAVIER};
  const struct fd_param b = {.ndim = 1, .shape = {out}, .init = FD_INIT_ZERO};
  fd_params_addf(p, &w, "%s%s.weight", prefix, name);
  fd_params_addf(p, &b, "%s%s.bias", prefix, name);
}

static void fill_ones(const struct fd_param *row, float *out) {
  for (int64_t i = 0; i < row->numel; i++) out[i] = 1;
}

static void add_norm(fd_params *p, const char *prefix, const char *name, int channels) {
  const struct fd_param w = {.ndim = 1, .shape = {channels}, .init = FD_INIT_TABLE, .fill = fill_ones};
  const struct fd_param b = {.ndim = 1, .shape = {channels}, .init = FD_INIT_ZERO};
  fd_params_addf(p, &w, "%s%s.weight", prefix, name);
  fd_params_addf(p, &b, "%s%s.bias", prefix, name);
}

static void add_resnet(fd_params *p, const char *prefix, int in, int out) {
  add_norm(p, prefix, "norm1", in);
  add_conv(p, prefix, "conv1", out, in, 3);
  add_norm(p, prefix, "norm2", out);
  add_conv(p, prefix, "conv2", out, out, 3);
  if (in != out) add_conv(p, prefix, "conv_shortcut", out, in, 1);
}

static void add_middle(fd_params *p, const struct fd_vae_kl_config *c, const char *side) {
  static const char *const names[][2] = {{"to_q", "query"}, {"to_k", "key"}, {"to_v", "value"}, {"to_out.0", "proj_attn"}};
  const int C = c->channels[c->n_blocks - 1];
  char at[96], row[128], alias[128];
  if (c->attention) {
    snprintf(at, sizeof at, "%s.mid_block.attentions.0.", side);
    add_norm(p, at, "group_norm", C);
    for (int i = 0; i < 4; i++)
      for (int bias = 0; bias < 2; bias++) {
        snprintf(row, sizeof row, "%s%s.%s", at, names[i][0], bias ? "bias" : "weight");
        snprintf(alias, sizeof alias, "%s%s.%s", at, names[i][1], bias ? "bias" : "weight");
        fd_params_add(p, &(struct fd_param){.name = row, .alias = alias, .ndim = bias ? 1 : 2, .shape = {C, bias ? 0 : C},
                                            .init = bias ? FD_INIT_ZERO : FD_INIT_XAVIER});
      }
  }
  for (int i = 0; i < 2; i++) {
    snprintf(at, sizeof at, "%s.mid_block.resnets.%d.", side, i);
    add_resnet(p, at, C, C);
  }
}

void fd_vae_kl_declare(const void *config, fd_params *p) {
  const struct fd_vae_kl_config *c = config;
  const int n = c->n_blocks, last = c->channels[n - 1];
  char at[96];
  add_conv(p, "encoder.", "conv_in", c->channels[0], c->in_channels, 3);
  for (int i = 0; i < n; i++) {
    for (int k = 0; k < c->layers_per_block; k++) {
      snprintf(at, sizeof at, "encoder.down_blocks.%d.resnets.%d.", i, k);
      add_resnet(p, at, c->channels[k == 0 && i > 0 ? i - 1 : i], c->channels[i]);
    }
    snprintf(at, sizeof at, "encoder.down_blocks.%d.downsamplers.0.", i);
    if (i < n - 1) add_conv(p, at, "conv", c->channels[i], c->channels[i], 3);
  }
  add_middle(p, c, "encoder");
  add_norm(p, "encoder.", "conv_norm_out", last);
  add_conv(p, "encoder.", "conv_out", 2 * c->Z, last, 3);
  add_conv(p, "decoder.", "conv_in", last, c->Z, 3);
  for (int i = 0; i < n; i++) {
    const int C = c->channels[n - 1 - i], before = c->channels[i ? n - i : n - 1];
    for (int k = 0; k <= c->layers_per_block; k++) {
      snprintf(at, sizeof at, "decoder.up_blocks.%d.resnets.%d.", i, k);
      add_resnet(p, at, k == 0 ? before : C, C);
    }
    snprintf(at, sizeof at, "decoder.up_blocks.%d.upsamplers.0.", i);
    if (i < n - 1) add_conv(p, at, "conv", C, C, 3);
  }
  add_middle(p, c, "decoder");
  add_norm(p, "decoder.", "conv_norm_out", c->channels[0]);
  add_conv(p, "decoder.", "conv_out", c->out_channels, c->channels[0], 3);
  if (c->quant) add_conv(p, "", "quant_conv", 2 * c->Z, 2 * c->Z, 1);
  if (c->post_quant) add_conv(p, "", "post_quant_conv", c->Z, c->Z, 1);
}

/* ---- graph ----------------------------------------------------------------------------------------------------------- */

static const struct fd_conv same3 = {.stride = 1, .pad_top = 1, .pad_left = 1, .pad_bottom = 1, .pad_right = 1};
static const struct fd_conv down3 = {.stride = 2, .pad_bottom = 1, .pad_right = 1}; /* zeros below and at the right only */
static const struct fd_conv same1 = {.stride = 1};

static fd_var conv(fd_model *m, fd_graph *g, fd_var x, const char *prefix, const char *name, const struct fd_conv *how, fd_var residual) {
  fd_var w = fd_params_varf(m->params, g, "%s%s.weight", prefix, name), b = fd_params_varf(m->params, g, "%s%s.bias", prefix, name);
  return fd_conv2d(g, x, w, b, residual, how);
}

static fd_var norm(fd_model *m, fd_graph *g, fd_var x, const char *prefix, const char *name, enum fd_act act) {
  const struct fd_vae_kl_config *c = m->config;
  fd_var w = fd_params_varf(m->params, g, "%s%s.weight", prefix, name), b = fd_params_varf(m->params, g, "%s%s.bias", prefix, name);
  return fd_groupnorm(g, x, w, b, c->groups, GROUPNORM_EPS, act);
}

static fd_var resnet(fd_model *m, fd_graph *g, fd_var x, const char *prefix, int in, int out) {
  fd_var y = norm(m, g, x, prefix, "norm1", FD_ACT_SILU);
  y = conv(m, g, y, prefix, "conv1", &same3, 0);
  y = norm(m, g, y, prefix, "norm2", FD_ACT_SILU);
  fd_var around = in == out ? x : conv(m, g, x, prefix, "conv_shortcut", &same1, 0);
  return conv(m, g, y, prefix, "conv2", &same3, around);
}

static fd_var linear(fd_model *m, fd_graph *g, fd_var x, const char *prefix, const char *name) {
  fd_var w = fd_params_varf(m->params, g, "%s%s.weight", prefix, name), b = fd_params_varf(m->params, g, "%s%s.bias", prefix, name);
  return fd_linear(g, x, w, b, 0);
}

/* One head as wide as the image has channels, over all pixels of a picture. */
static fd_var attention(fd_model *m, fd_graph *g, fd_var x, const char *prefix) {
  const fd_tensor *t = fd_graph_get(g, x);
  const int64_t B = t->shape[0], H = t->shape[1], W = t->shape[2], C = t->shape[3], n = H * W;
  if (fd_graph_status(g) != FD_OK) return 0;
  int32_t *rows = malloc((size_t)B * 4 * sizeof *rows);
  if (!rows) {
    fd_graph_fail(g, FD_ERR_NOMEM, "no memory for attention ranges");
    return 0;
  }
  for (int64_t b = 0; b < B; b++)
    for (int i = 0; i < 4; i++) rows[4 * b + i] = (int32_t)(i % 2 ? n : b * n);
  char name[64];
  snprintf(name, sizeof name, "attention.ranges.%lldx%lld", (long long)B, (long long)n);
  fd_var ranges = fd_params_const(m->params, g, name, FD_I32, 2, (int64_t[]){B, 4}, rows);
  free(rows);
  fd_var y = fd_graph_view(g, norm(m, g, x, prefix, "group_norm", FD_ACT_NONE), 2, (int64_t[]){B * n, C});
  const int64_t heads[] = {B * n, 1, C};
  const struct fd_attention a = {.q = fd_graph_view(g, linear(m, g, y, prefix, "to_q"), 3, heads),
                                 .k = fd_graph_view(g, linear(m, g, y, prefix, "to_k"), 3, heads),
                                 .v = fd_graph_view(g, linear(m, g, y, prefix, "to_v"), 3, heads),
                                 .ranges = ranges, .A = 1, .K = 1, .E = (int)C, .scale = (float)(1 / sqrt((double)C)), .max_q = n, .max_k = n,
                                 .q_stride = n, .k_stride = n};
  y = linear(m, g, fd_attention(g, &a), prefix, "to_out.0");
  return fd_residual(g, x, fd_graph_view(g, y, 4, (int64_t[]){B, H, W, C}), NULL, 0);
}

static fd_var middle(fd_model *m, fd_graph *g, fd_var x, const char *side) {
  const struct fd_vae_kl_config *c = m->config;
  const int C = c->channels[c->n_blocks - 1];
  char at[96];
  snprintf(at, sizeof at, "%s.mid_block.resnets.0.", side);
  x = resnet(m, g, x, at, C, C);
  snprintf(at, sizeof at, "%s.mid_block.attentions.0.", side);
  if (c->attention) x = attention(m, g, x, at);
  snprintf(at, sizeof at, "%s.mid_block.resnets.1.", side);
  return resnet(m, g, x, at, C, C);
}

void fd_vae_kl_encode(fd_model *m, fd_graph *g, fd_var pixels, fd_var noise, fd_var *mean, fd_var *logvar, fd_var *latent) {
  const struct fd_vae_kl_config *c = m->config;
  const fd_tensor *t = fd_graph_get(g, pixels);
  char at[96];
  if (fd_graph_status(g) != FD_OK) return;
  if (t->ndim != 4 || t->shape[3] != c->in_channels || t->shape[1] % m->dims.factor || t->shape[2] % m->dims.factor)
    return fd_graph_fail(g, FD_ERR_CONFIG, "%s: pictures of %lld x %lld with %lld channels, multiples of %lld with %d are wanted", m->name,
                         (long long)t->shape[1], (long long)t->shape[2], (long long)t->shape[3], (long long)m->dims.factor, c->in_channels);
  fd_var x = conv(m, g, pixels, "encoder.", "conv_in", &same3, 0);
  for (int i = 0; i < c->n_blocks; i++) {
    for (int k = 0; k < c->layers_per_block; k++) {
      snprintf(at, sizeof at, "encoder.down_blocks.%d.resnets.%d.", i, k);
      x = resnet(m, g, x, at, c->channels[k == 0 && i > 0 ? i - 1 : i], c->channels[i]);
    }
    snprintf(at, sizeof at, "encoder.down_blocks.%d.downsamplers.0.", i);
    if (i < c->n_blocks - 1) x = conv(m, g, x, at, "conv", &down3, 0);
  }
  x = middle(m, g, x, "encoder");
  x = norm(m, g, x, "encoder.", "conv_norm_out", FD_ACT_SILU);
  x = conv(m, g, x, "encoder.", "conv_out", &same3, 0);
  if (c->quant) x = conv(m, g, x, "", "quant_conv", &same1, 0);
  fd_posterior(g, x, noise, mean, logvar, latent);
}

fd_var fd_vae_kl_decode(fd_model *m, fd_graph *g, fd_var x) {
  const struct fd_vae_kl_config *c = m->config;
  const int n = c->n_blocks;
  char at[96];
  if (c->post_quant) x = conv(m, g, x, "", "post_quant_conv", &same1, 0);
  x = conv(m, g, x, "decoder.", "conv_in", &same3, 0);
  x = middle(m, g, x, "decoder");
  for (int i = 0; i < n; i++) {
    const int C = c->channels[n - 1 - i], before = c->channels[i ? n - i : n - 1];
    for (int k = 0; k <= c->layers_per_block; k++) {
      snprintf(at, sizeof at, "decoder.up_blocks.%d.resnets.%d.", i, k);
      x = resnet(m, g, x, at, k == 0 ? before : C, C);
    }
    snprintf(at, sizeof at, "decoder.up_blocks.%d.upsamplers.0.", i);
    if (i < n - 1) x = conv(m, g, fd_upsample2x(g, x), at, "conv", &same3, 0);
  }
  x = norm(m, g, x, "decoder.", "conv_norm_out", FD_ACT_SILU);
  return conv(m, g, x, "decoder.", "conv_out", &same3, 0);
}
