// SPDX-License-Identifier: Apache-2.0
// One builder per op: infers the output's shape and type, appends the op, remembers how to differentiate it.
// Outputs have the type of their first input unless said. Contracts of the mathematics: op/ops.h.
#ifndef FD_GRAPH_BUILD_H
#define FD_GRAPH_BUILD_H

#include "graph/graph.h"

/** y = x w^T + b.  x [.., in], w [out, in], b [out] or 0, count of rows or 0 -> [.., out] */
fd_var fd_linear(fd_graph *g, fd_var x, fd_var w, fd_var b, fd_var count);

/** RMSNorm, optionally modulated: mod [R / rows_per_mod, S] or 0. */
struct fd_mod {
  fd_var mod;
  int64_t rows_per_mod;
  int64_t shift_col, scale_col; /* rmsnorm; -1: none */
  int64_t gate_col;             /* gate_residual */
};
fd_var fd_rmsnorm(fd_graph *g, fd_var x, fd_var w, float eps, const struct fd_mod *mod, fd_var count);
/** The same in the type of x, or rounded to bf16. */
fd_var fd_rmsnorm_as(fd_graph *g, fd_var x, fd_var w, float eps, const struct fd_mod *mod, fd_var count, fd_dtype dtype);

/** x + gate a; mod NULL or mod->mod 0: x + a, where a may be bf16 and x f32. */
fd_var fd_residual(fd_graph *g, fd_var x, fd_var a, const struct fd_mod *mod, fd_var count);
/** x + y, y repeated along leading dimensions. */
fd_var fd_add(fd_graph *g, fd_var x, fd_var y, fd_var count);
fd_var fd_activate(fd_graph *g, fd_var x, enum fd_act act, fd_var count);
fd_var fd_geglu(fd_graph *g, fd_var gate_up, enum fd_act act, fd_var count);

struct fd_heads {
  fd_var qkv, text_kv, q_norm, k_norm, rope, pos, text, count;
  int64_t B, N, L;
  int A, K, E;
  float eps;
};
/** Outputs q [B N, A, E], k, v [B (N + L), K, E]. */
void fd_heads(fd_graph *g, const struct fd_heads *h, fd_var *q, fd_var *k, fd_var *v);

struct fd_attention {
  fd_var q, k, v, ranges;
  int A, K, E;
  float scale;
  int causal;
  int64_t window;
  float softcap;
  int64_t max_q, max_k;
  int64_t q_stride, k_stride; /* op/ops.h */
};
/** [Tq, A * E] (two dimensions, ready for o_proj). */
fd_var fd_attention(fd_graph *g, const struct fd_attention *a);

fd_var fd_embed(fd_graph *g, fd_var ids, fd_var table, float scale, int64_t padding_idx, fd_dtype dtype, fd_var count);

struct fd_conv {
  int stride, pad_top, pad_left, pad_bottom, pad_right;
};
fd_var fd_conv2d(fd_graph *g, fd_var x, fd_var w, fd_var b, fd_var residual, const struct fd_conv *c);
fd_var fd_groupnorm(fd_graph *g, fd_var x, fd_var w, fd_var b, int groups, float eps, enum fd_act act);
fd_var fd_upsample2x(fd_graph *g, fd_var x);
fd_var fd_patchify(fd_graph *g, fd_var x, int P, int channel_last);
/** tokens [B, N, C P P] or [B N, C P P] -> [B, H, W, C] */
fd_var fd_unpatchify(fd_graph *g, fd_var x, int P, int channel_last, int64_t B, int64_t H, int64_t W);
/** -> [B, 2n] of `dtype` */
fd_var fd_timestep_embed(fd_graph *g, fd_var t, fd_var freqs, fd_dtype dtype);

/** Any of the outputs may be NULL. noise 0: latent is the mean. The outputs are f32. */
void fd_posterior(fd_graph *g, fd_var moments, fd_var noise, fd_var *mean, fd_var *logvar, fd_var *latent);
fd_var fd_channel_affine(fd_graph *g, fd_var x, fd_var sub, fd_var mul, int inverse, fd_dtype dtype);
fd_var fd_pixels(fd_graph *g, fd_var bytes, fd_dtype dtype);
fd_var fd_randn(fd_graph *g, fd_var keys, uint32_t purpose, int ndim, const int64_t *shape);
fd_var fd_flow_noise(fd_graph *g, fd_var x, fd_var noise, fd_var sigma, fd_dtype dtype);
/** -> loss [B] f32 */
fd_var fd_flow_loss(fd_graph *g, fd_var out, fd_var x, fd_var noise, fd_var x_t, fd_var sigma, fd_var weight, int precondition);
void fd_cfg_euler(fd_graph *g, fd_var model_out, fd_var step, fd_var sample);
/** Convert, or with `repeat` > 1 put that many copies behind each other along the first dimension. Differentiable if repeat is 1. */
fd_var fd_cast(fd_graph *g, fd_var x, fd_dtype dtype, int64_t repeat);

#endif
