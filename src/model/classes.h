// SPDX-License-Identifier: Apache-2.0
// What model.c and the files of the model classes share: configurations, and one declaration per builder.
#ifndef FD_MODEL_CLASSES_H
#define FD_MODEL_CLASSES_H

#include "model/json.h"
#include "model/model.h"

#define FD_VAE_MAX_BLOCKS 8
#define FD_VAE_MAX_LATENT 64

struct fd_gemma_config {
  int64_t D, F, layers, vocab, max_positions, pad_id;
  int A, K, E;
  double theta;
  float eps, std, scale; /* scale of scores */
  enum fd_act act;
  bool bias;
  bool gemma2;      /* four norms per layer, windows */
  int64_t window;   /* gemma2, even layers */
  float softcap;    /* gemma2 "eager" only; 0: none */
};

struct fd_vae_kl_config {
  int n_blocks, layers_per_block, groups, in_channels, out_channels, Z;
  int channels[FD_VAE_MAX_BLOCKS];
  bool quant, post_quant, attention;
  float sub[FD_VAE_MAX_LATENT], mul[FD_VAE_MAX_LATENT]; /* model_latent = (latent - sub) * mul */
};

enum fd_dit_pos { FD_DIT_APE, FD_DIT_ROPE_1D, FD_DIT_ROPE_2D, FD_DIT_ROPE_M };
enum fd_dit_time { FD_DIT_ADALN_ZERO, FD_DIT_ADALN_SINGLE, FD_DIT_ADDITION, FD_DIT_NO_TIME };

struct fd_dit_config {
  int64_t D, F, layers, text_width;
  int A, K, E, P, in_channels, out_channels;
  int64_t G;           /* side of the position table, in patches */
  double base;         /* sample_size / P */
  double theta;
  float eps, std;
  enum fd_act act;
  enum fd_dit_pos pos;
  enum fd_dit_time time;
  bool bias, qk_norm, sandwich, cross;
};

fd_status fd_gemma_read(const json_t *json, void *config, struct fd_model_dims *dims);
fd_status fd_gemma2_read(const json_t *json, void *config, struct fd_model_dims *dims);
void fd_gemma_declare(const void *config, fd_params *p);
fd_var fd_gemma_states(fd_model *m, fd_graph *g, const struct fd_text_vars *text, int index, fd_dtype dtype);

fd_status fd_vae_kl_read(const json_t *json, void *config, struct fd_model_dims *dims);
void fd_vae_kl_declare(const void *config, fd_params *p);
void fd_vae_kl_encode(fd_model *m, fd_graph *g, fd_var pixels, fd_var noise, fd_var *mean, fd_var *logvar, fd_var *latent);
fd_var fd_vae_kl_decode(fd_model *m, fd_graph *g, fd_var latent);
/** shift and scale of its latents, Z values each. */
void fd_vae_kl_statistics(const void *config, const float **sub, const float **mul);

fd_status fd_dit_read(const json_t *json, void *config, struct fd_model_dims *dims);
void fd_dit_declare(const void *config, fd_params *p);

/** Rotation table [positions, E] f32 (cos of E/2 angles, then sin) for angles(position, k), computed in f32 as the original does. */
fd_var fd_rope_table(fd_params *p, fd_graph *g, const char *name, int64_t positions, int E, const float *angles);

#endif
