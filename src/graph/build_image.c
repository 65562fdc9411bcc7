// SPDX-License-Identifier: Apache-2.0
// Builders of the ops on images, NHWC.
#include "graph/build_internal.h"

static bool image(fd_graph *g, const char *op, fd_var x) {
  if (!fd_build_float(g, op, "x", x)) return false;
  FD_WANT_OR(false, fd_graph_get(g, x)->ndim == 4, "%s: x is %s, wanted [B, H, W, C]", op, fd_graph_text(g, x));
  return true;
}

fd_var fd_conv2d(fd_graph *g, fd_var x, fd_var w, fd_var b, fd_var residual, const struct fd_conv *c) {
  if (!fd_graph_ok(g)) return 0;
  if (!image(g, "conv2d", x) || !fd_build_float(g, "conv2d", "w", w)) return 0;
  const fd_tensor *t = fd_graph_get(g, x), *k = fd_graph_get(g, w);
  FD_WANT(k->ndim == 4 && k->shape[1] == t->shape[3], "conv2d: w is %s, wanted [out, %lld, kh, kw] for x %s", fd_graph_text(g, w),
          (long long)t->shape[3], fd_graph_text(g, x));
  if (b && !fd_build_vector(g, "conv2d", "bias", b, k->shape[0])) return 0;
  FD_WANT(c->stride >= 1 && c->pad_top >= 0 && c->pad_left >= 0 && c->pad_bottom >= 0 && c->pad_right >= 0, "conv2d: stride %d, padding %d %d %d %d",
          c->stride, c->pad_top, c->pad_left, c->pad_bottom, c->pad_right);
  int64_t h = t->shape[1] + c->pad_top + c->pad_bottom - k->shape[2], wd = t->shape[2] + c->pad_left + c->pad_right - k->shape[3];
  FD_WANT(h >= 0 && wd >= 0, "conv2d: x %s is smaller than the kernel %s", fd_graph_text(g, x), fd_graph_text(g, w));
  int64_t shape[4] = {t->shape[0], h / c->stride + 1, wd / c->stride + 1, k->shape[0]};
  if (residual && !fd_build_shape(g, "conv2d", "residual", residual, t->dtype, 4, shape)) return 0;
  fd_var y = fd_graph_tensor(g, t->dtype, 4, shape);
  struct fd_conv2d_fwd_args args = {.stride = c->stride, .pad_top = c->pad_top, .pad_left = c->pad_left, .pad_bottom = c->pad_bottom,
                                    .pad_right = c->pad_right};
  fd_graph_emit(g, FD_OP_conv2d_fwd, &args, (fd_var[]){x, w, b, residual, y});
  return y;
}

fd_var fd_groupnorm(fd_graph *g, fd_var x, fd_var w, fd_var b, int groups, float eps, enum fd_act act) {
  if (!fd_graph_ok(g)) return 0;
  if (!fd_build_float(g, "groupnorm", "x", x)) return 0;
  const fd_tensor *t = fd_graph_get(g, x);
  FD_WANT(t->ndim == 4 || t->ndim == 3, "groupnorm: x is %s, wanted [B, H, W, C] or [B, HW, C]", fd_graph_text(g, x));
  FD_WANT(groups >= 1 && fd_tensor_cols(t) % groups == 0, "groupnorm: %d groups do not divide the channels of x %s", groups, fd_graph_text(g, x));
  FD_WANT(act == FD_ACT_NONE || act == FD_ACT_SILU, "groupnorm: activation %d, wanted none or silu", (int)act);
  if (!fd_build_vector(g, "groupnorm", "w", w, fd_tensor_cols(t)) || !fd_build_vector(g, "groupnorm", "b", b, fd_tensor_cols(t))) return 0;
  fd_var y = fd_build_like(g, x), stats = fd_graph_tensor(g, FD_F32, 3, (int64_t[]){t->shape[0], groups, 2});
  struct fd_groupnorm_fwd_args args = {.groups = groups, .eps = eps, .act = act};
  fd_graph_emit(g, FD_OP_groupnorm_fwd, &args, (fd_var[]){x, w, b, y, stats});
  return y;
}

fd_var fd_upsample2x(fd_graph *g, fd_var x) {
  if (!fd_graph_ok(g) || !image(g, "upsample2x", x)) return 0;
  const fd_tensor *t = fd_graph_get(g, x);
  fd_var y = fd_graph_tensor(g, t->dtype, 4, (int64_t[]){t->shape[0], 2 * t->shape[1], 2 * t->shape[2], t->shape[3]});
  struct fd_upsample2x_fwd_args args = {0};
  fd_graph_emit(g, FD_OP_upsample2x_fwd, &args, (fd_var[]){x, y});
  return y;
}

fd_var fd_patchify(fd_graph *g, fd_var x, int P, int channel_last) {
  if (!fd_graph_ok(g) || !image(g, "patchify", x)) return 0;
  const fd_tensor *t = fd_graph_get(g, x);
  FD_WANT(P >= 1 && t->shape[1] % P == 0 && t->shape[2] % P == 0, "patchify: height and width of x %s are no multiples of the patch %d",
          fd_graph_text(g, x), P);
  fd_var y = fd_graph_tensor(g, t->dtype, 3, (int64_t[]){t->shape[0], (t->shape[1] / P) * (t->shape[2] / P), t->shape[3] * P * P});
  struct fd_patchify_args args = {.P = P, .channel_last = channel_last};
  fd_graph_emit(g, FD_OP_patchify, &args, (fd_var[]){x, y});
  return y;
}

fd_var fd_unpatchify(fd_graph *g, fd_var x, int P, int channel_last, int64_t B, int64_t H, int64_t W) {
  if (!fd_graph_ok(g) || !fd_build_float(g, "unpatchify", "x", x)) return 0;
  const fd_tensor *t = fd_graph_get(g, x);
  FD_WANT(P >= 1 && B >= 0 && H >= 0 && W >= 0 && H % P == 0 && W % P == 0, "unpatchify: %lld images of %lld x %lld, patch %d: no whole number of patches",
          (long long)B, (long long)H, (long long)W, P);
  int64_t N = (H / P) * (W / P), cols = fd_tensor_cols(t);
  FD_WANT(cols % (P * P) == 0 && fd_tensor_numel(t) == B * N * cols, "unpatchify: x is %s, wanted [%lld, %lld, C * %d]", fd_graph_text(g, x),
          (long long)B, (long long)N, P * P);
  fd_var tokens = fd_graph_view(g, x, 3, (int64_t[]){B, N, cols});
  fd_var y = fd_graph_tensor(g, t->dtype, 4, (int64_t[]){B, H, W, cols / (P * P)});
  struct fd_unpatchify_args args = {.P = P, .channel_last = channel_last};
  fd_graph_emit(g, FD_OP_unpatchify, &args, (fd_var[]){tokens, y});
  return y;
}

fd_var fd_pixels(fd_graph *g, fd_var bytes, fd_dtype dtype) {
  if (!fd_graph_ok(g)) return 0;
  const fd_tensor *t = fd_graph_get(g, bytes);
  FD_WANT(bytes && t->dtype == FD_U8, "pixels: bytes are %s, wanted u8", fd_graph_text(g, bytes));
  FD_WANT(dtype == FD_F32 || dtype == FD_BF16, "pixels: asked for %s, wanted f32 or bf16", fd_dtype_name(dtype));
  fd_var y = fd_graph_tensor(g, dtype, t->ndim, t->shape);
  struct fd_pixels_fwd_args args = {0};
  fd_graph_emit(g, FD_OP_pixels_fwd, &args, (fd_var[]){bytes, y});
  return y;
}
