// SPDX-License-Identifier: Apache-2.0
// Builders of diffusion: posterior, latents, noise, loss, sampling step.
#include <string.h>

#include "graph/build_internal.h"

void fd_posterior(fd_graph *g, fd_var moments, fd_var noise, fd_var *mean, fd_var *logvar, fd_var *latent) {
  fd_var none[3];
  if (!mean) mean = &none[0];
  if (!logvar) logvar = &none[1];
  if (!latent) latent = &none[2];
  *mean = *logvar = *latent = 0;
  if (!fd_graph_ok(g) || !fd_build_float(g, "posterior", "moments", moments)) return;
  const fd_tensor *t = fd_graph_get(g, moments);
  int64_t shape[FD_MAX_NDIM];
  FD_WANT_OR(, t->ndim >= 1 && fd_tensor_cols(t) % 2 == 0, "posterior: moments is %s, wanted an even number of channels", fd_graph_text(g, moments));
  memcpy(shape, t->shape, sizeof shape);
  shape[t->ndim - 1] /= 2;
  if (noise && !fd_build_shape(g, "posterior", "noise", noise, FD_F32, t->ndim, shape)) return;
  /* the plan drops what nobody reads, but the op's slots are required */
  *mean = fd_graph_tensor(g, FD_F32, t->ndim, shape);
  *logvar = fd_graph_tensor(g, FD_F32, t->ndim, shape);
  *latent = fd_graph_tensor(g, FD_F32, t->ndim, shape);
  struct fd_posterior_fwd_args args = {0};
  fd_graph_emit(g, FD_OP_posterior_fwd, &args, (fd_var[]){moments, noise, *mean, *logvar, *latent});
}

fd_var fd_channel_affine(fd_graph *g, fd_var x, fd_var sub, fd_var mul, int inverse, fd_dtype dtype) {
  if (!fd_graph_ok(g) || !fd_build_float(g, "channel_affine", "x", x)) return 0;
  const fd_tensor *t = fd_graph_get(g, x);
  const int64_t C = fd_tensor_cols(t);
  if (!fd_build_shape(g, "channel_affine", "sub", sub, FD_F32, 1, &C) || !fd_build_shape(g, "channel_affine", "mul", mul, FD_F32, 1, &C)) return 0;
  FD_WANT(dtype == FD_F32 || dtype == FD_BF16, "channel_affine: asked for %s, wanted f32 or bf16", fd_dtype_name(dtype));
  fd_var y = fd_graph_tensor(g, dtype, t->ndim, t->shape);
  struct fd_channel_affine_args args = {.inverse = inverse};
  fd_graph_emit(g, FD_OP_channel_affine, &args, (fd_var[]){x, sub, mul, y});
  return y;
}

fd_var fd_randn(fd_graph *g, fd_var keys, uint32_t purpose, int ndim, const int64_t *shape) {
  if (!fd_graph_ok(g)) return 0;
  FD_WANT(keys && ndim >= 1, "randn: keys are missing or the shape is empty");
  if (!fd_build_shape(g, "randn", "keys", keys, FD_U32, 2, (int64_t[]){shape[0], 4})) return 0;
  fd_var y = fd_graph_tensor(g, FD_F32, ndim, shape);
  struct fd_randn_args args = {.purpose = purpose};
  fd_graph_emit(g, FD_OP_randn, &args, (fd_var[]){keys, y});
  return y;
}

static bool per_sample(fd_graph *g, const char *op, const char *slot, fd_var v, fd_var x) {
  const fd_tensor *t = fd_graph_get(g, x);
  FD_WANT_OR(false, v, "%s: %s is missing", op, slot);
  return fd_build_shape(g, op, slot, v, FD_F32, 1, &t->shape[0]);
}

fd_var fd_flow_noise(fd_graph *g, fd_var x, fd_var noise, fd_var sigma, fd_dtype dtype) {
  if (!fd_graph_ok(g)) return 0;
  const fd_tensor *t = fd_graph_get(g, x);
  FD_WANT(x && t->dtype == FD_F32 && t->ndim >= 1, "flow_noise: x is %s, wanted [B, ..] f32", fd_graph_text(g, x));
  if (!fd_build_shape(g, "flow_noise", "noise", noise, FD_F32, t->ndim, t->shape) || !per_sample(g, "flow_noise", "sigma", sigma, x)) return 0;
  FD_WANT(dtype == FD_F32 || dtype == FD_BF16, "flow_noise: asked for %s, wanted f32 or bf16", fd_dtype_name(dtype));
  fd_var y = fd_graph_tensor(g, dtype, t->ndim, t->shape);
  struct fd_flow_noise_args args = {0};
  fd_graph_emit(g, FD_OP_flow_noise, &args, (fd_var[]){x, noise, sigma, y});
  return y;
}

fd_var fd_flow_loss(fd_graph *g, fd_var out, fd_var x, fd_var noise, fd_var x_t, fd_var sigma, fd_var weight, int precondition) {
  const char *op = "flow_loss";
  if (!fd_graph_ok(g) || !fd_build_float(g, op, "out", out)) return 0;
  const fd_tensor *t = fd_graph_get(g, out);
  FD_WANT(t->ndim >= 1, "flow_loss: out is %s, wanted [B, ..]", fd_graph_text(g, out));
  if (!fd_build_shape(g, op, "x", x, FD_F32, t->ndim, t->shape) || !fd_build_shape(g, op, "noise", noise, FD_F32, t->ndim, t->shape)) return 0;
  if (!per_sample(g, op, "sigma", sigma, out) || !per_sample(g, op, "weight", weight, out)) return 0;
  FD_WANT(!precondition || x_t, "flow_loss: precondition needs x_t");
  if (x_t && (!fd_build_float(g, op, "x_t", x_t) || !fd_build_shape(g, op, "x_t", x_t, fd_graph_get(g, x_t)->dtype, t->ndim, t->shape))) return 0;
  fd_var loss = fd_graph_tensor(g, FD_F32, 1, &t->shape[0]);
  struct fd_flow_loss_fwd_args args = {.precondition = precondition};
  fd_graph_emit(g, FD_OP_flow_loss_fwd, &args, (fd_var[]){out, x, noise, x_t, sigma, weight, loss});
  return loss;
}

void fd_cfg_euler(fd_graph *g, fd_var model_out, fd_var step, fd_var sample) {
  if (!fd_graph_ok(g) || !fd_build_float(g, "cfg_euler", "model_out", model_out)) return;
  int64_t n = fd_tensor_numel(fd_graph_get(g, model_out)), m = fd_tensor_numel(fd_graph_get(g, sample));
  FD_WANT_OR(, sample && fd_graph_get(g, sample)->dtype == FD_F32, "cfg_euler: sample is %s, wanted f32", fd_graph_text(g, sample));
  FD_WANT_OR(, n == m || n == 2 * m, "cfg_euler: model_out is %s, wanted once or twice sample %s", fd_graph_text(g, model_out), fd_graph_text(g, sample));
  if (!fd_build_shape(g, "cfg_euler", "step", step, FD_F32, 1, (int64_t[]){2})) return;
  struct fd_cfg_euler_args args = {0};
  fd_graph_emit(g, FD_OP_cfg_euler, &args, (fd_var[]){model_out, step, sample});
}
