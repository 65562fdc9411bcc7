// SPDX-License-Identifier: Apache-2.0
// conv2d forward and both gradients against double loops: strides, asymmetric padding, few channels, residual, constant
// weights; with and without AVX-512. The loops of the gradients are those of the forward turned round, so they are checked
// against finite differences here too.
#include "cpu/conv2d.h"
#include "cpu/dnnl.h"
#include "isa.h"

struct one {
  int64_t B, H, W, I, O;
  int k, stride, top, left, bottom, right;
};

/* visit(o, x, w) for each product of the convolution: flat indices of y, x, w */
#define EACH_PRODUCT(c, Ho, Wo, BODY)                                                             \
  for (int64_t b = 0; b < (c).B; b++)                                                             \
    for (int64_t oh = 0; oh < (Ho); oh++)                                                         \
      for (int64_t ow = 0; ow < (Wo); ow++)                                                       \
        for (int64_t kh = 0; kh < (c).k; kh++)                                                    \
          for (int64_t kw = 0; kw < (c).k; kw++) {                                                \
            int64_t ih = oh * (c).stride + kh - (c).top, iw = ow * (c).stride + kw - (c).left;    \
            if (ih < 0 || ih >= (c).H || iw < 0 || iw >= (c).W) continue;                         \
            for (int64_t o = 0; o < (c).O; o++)                                                   \
              for (int64_t i = 0; i < (c).I; i++) {                                               \
                int64_t yy = ((b * (Ho) + oh) * (Wo) + ow) * (c).O + o;                           \
                int64_t xx = ((b * (c).H + ih) * (c).W + iw) * (c).I + i;                         \
                int64_t ww = ((o * (c).I + i) * (c).k + kh) * (c).k + kw;                         \
                BODY;                                                                             \
              }                                                                                   \
          }

static void check(struct ot *t, struct one c, fd_dtype type, fd_dtype w_type, int bias_type, bool residual, bool constant, bool acc) {
  int64_t Ho = (c.H + c.top + c.bottom - c.k) / c.stride + 1, Wo = (c.W + c.left + c.right - c.k) / c.stride + 1;
  ot_reset(t);
  ot_what(t, "%lldx%lldx%lldx%lld>%lld k%d s%d pad %d %d %d %d %s w %s bias%d residual%d const%d acc%d", (long long)c.B, (long long)c.H,
          (long long)c.W, (long long)c.I, (long long)c.O, c.k, c.stride, c.top, c.left, c.bottom, c.right, fd_dtype_name(type),
          fd_dtype_name(w_type), bias_type, residual, constant, acc);
  fd_tensor *x = OT_RAND(t, type, c.B, c.H, c.W, c.I), *w = OT_NEW(t, w_type, c.O, c.I, c.k, c.k);
  fd_tensor *y = OT_NEW(t, type, c.B, Ho, Wo, c.O), *dy = OT_RAND(t, type, c.B, Ho, Wo, c.O);
  fd_tensor *bias = bias_type >= 0 ? OT_RAND(t, (fd_dtype)bias_type, c.O) : NULL;
  fd_tensor *r = residual ? OT_RAND(t, type, c.B, Ho, Wo, c.O) : NULL;
  fd_tensor *dx = acc ? OT_RAND(t, type, c.B, c.H, c.W, c.I) : OT_NEW(t, type, c.B, c.H, c.W, c.I);
  fd_tensor *dw = acc ? OT_RAND(t, FD_F32, c.O, c.I, c.k, c.k) : OT_NEW(t, FD_F32, c.O, c.I, c.k, c.k);
  fd_tensor *db = !bias ? NULL : acc ? OT_RAND(t, FD_F32, c.O) : OT_NEW(t, FD_F32, c.O);
  ot_normal(t, w, 0, 0.5);
  /* weights and biases of another type than the activations are rounded to theirs */
  for (int64_t i = 0; i < fd_tensor_numel(w); i++) ot_set(w, i, fd_bf16_to_f32(fd_f32_to_bf16((float)ot_get(w, i))));
  for (int64_t i = 0; bias && i < c.O; i++) ot_set(bias, i, fd_bf16_to_f32(fd_f32_to_bf16((float)ot_get(bias, i))));
  if (constant) w->flags = FD_T_CONST;
  double *dX = ot_doubles(x), *dW = ot_doubles(w), *dY = ot_doubles(dy);
  double *ry = ot_doubles(y), *rdx = ot_doubles(dx), *rdw = ot_doubles(dw), *rdb = ot_doubles(db);
  int64_t n_y = fd_tensor_numel(y);
  for (int64_t i = 0; i < n_y; i++) ry[i] = (bias ? ot_get(bias, i % c.O) : 0) + (r ? ot_get(r, i) : 0);
  if (!acc) {
    memset(rdx, 0, sizeof(double) * (size_t)fd_tensor_numel(x));
    memset(rdw, 0, sizeof(double) * (size_t)fd_tensor_numel(w));
    if (db) memset(rdb, 0, sizeof(double) * (size_t)c.O);
  }
  EACH_PRODUCT(c, Ho, Wo, ry[yy] += dX[xx] * dW[ww]; rdx[xx] += dY[yy] * dW[ww]; rdw[ww] += dY[yy] * dX[xx]);
  for (int64_t i = 0; db && i < n_y; i++) rdb[i % c.O] += dY[i];

#define GEOMETRY .stride = c.stride, .pad_top = c.top, .pad_left = c.left, .pad_bottom = c.bottom, .pad_right = c.right
  struct fd_conv2d_fwd_args fwd = {.x = x, .w = w, .bias = bias, .residual = r, .y = y, GEOMETRY};
  ot_run(t, FD_OP_conv2d_fwd, &fwd);
  OT_COMPARE(t, y, ry, (double)(c.I * c.k * c.k));
  if (constant) { /* the copy is used, and found again */
    size_t kept = OT_ON_DEVICE ? 0 : cpu_dnnl_kept_bytes(t->ctx);
    if (c.k > 1 && !OT_ON_DEVICE) OT_CHECK(t, kept > 0 && cpu_conv2d_kept_bytes(t->ctx, FD_OP_conv2d_fwd, &fwd) > 0);
    ot_run(t, FD_OP_conv2d_fwd, &fwd);
    OT_COMPARE(t, y, ry, (double)(c.I * c.k * c.k));
    OT_CHECK(t, OT_ON_DEVICE || cpu_dnnl_kept_bytes(t->ctx) == kept);
    for (int64_t i = 0; i < fd_tensor_numel(w); i++) ot_set(w, i, 2 * ot_get(w, i)); /* other weights in the same memory */
    for (int64_t i = 0; i < n_y; i++) ry[i] = 2 * ry[i] - (bias ? ot_get(bias, i % c.O) : 0) - (r ? ot_get(r, i) : 0);
    ot_run(t, FD_OP_conv2d_fwd, &fwd);
    OT_COMPARE(t, y, ry, (double)(c.I * c.k * c.k));
    for (int64_t i = 0; i < fd_tensor_numel(w); i++) ot_set(w, i, 0.5 * ot_get(w, i));
  }
  OT_RUN(t, conv2d_bwd_data, .dy = dy, .w = w, .dx = dx, .acc = acc ? 1u << 2 : 0, GEOMETRY);
  OT_COMPARE(t, dx, rdx, (double)(c.O * c.k * c.k));
  OT_RUN(t, conv2d_bwd_weights, .dy = dy, .x = x, .dw = dw, .dbias = db, .acc = acc ? (1u << 2 | (db ? 1u << 3 : 0)) : 0, GEOMETRY);
  OT_COMPARE(t, dw, rdw, (double)(c.B * Ho * Wo));
  if (db) OT_COMPARE(t, db, rdb, (double)(c.B * Ho * Wo));
  if (type == FD_F32 && w_type == FD_F32 && !acc && c.B * c.H * c.W < 200)
    ot_finite_difference(t, FD_OP_conv2d_fwd, &fwd, 1, OT_LIST(y), OT_LIST(dy), 3, OT_LIST(x, w, bias), OT_LIST(dx, dw, db), __LINE__);
  free(dX), free(dW), free(dY), free(ry), free(rdx), free(rdw), free(rdb);
}

/* Convolutions as the models have them, of which only the primitives are made. */
static void list(struct ot *t) {
  static const struct one at[] = {
      /* demo VAE */
      {32, 64, 64, 3, 32, 3, 1, 1, 1, 1, 1}, {32, 64, 64, 32, 32, 3, 1, 1, 1, 1, 1}, {32, 64, 64, 32, 32, 3, 2, 0, 0, 1, 1},
      {32, 16, 16, 64, 32, 1, 1, 0, 0, 0, 0}, {32, 8, 8, 64, 32, 3, 1, 1, 1, 1, 1}, {32, 64, 64, 32, 3, 3, 1, 1, 1, 1, 1},
      /* bench-mid, FLUX */
      {4, 256, 256, 3, 64, 3, 1, 1, 1, 1, 1}, {4, 256, 256, 64, 64, 3, 1, 1, 1, 1, 1}, {4, 256, 256, 64, 64, 3, 2, 0, 0, 1, 1},
      {4, 64, 64, 128, 256, 1, 1, 0, 0, 0, 0}, {4, 32, 32, 256, 32, 3, 1, 1, 1, 1, 1}, {4, 32, 32, 16, 512, 3, 1, 1, 1, 1, 1},
      {2, 32, 32, 512, 512, 3, 1, 1, 1, 1, 1}, {2, 256, 256, 128, 3, 3, 1, 1, 1, 1, 1}, {4, 32, 32, 32, 32, 1, 1, 0, 0, 0, 0},
      /* golden-like */
      {2, 16, 16, 3, 8, 3, 1, 1, 1, 1, 1}, {2, 16, 16, 8, 8, 3, 2, 0, 0, 1, 1}, {2, 4, 4, 4, 24, 3, 1, 1, 1, 1, 1},
      {2, 16, 16, 8, 3, 3, 1, 1, 1, 1, 1}, {2, 4, 4, 8, 8, 1, 1, 0, 0, 0, 0},
  };
  size_t bytes;
  ot_reset(t);
  for (size_t k = 0; k < sizeof at / sizeof at[0]; k++)
    for (int type = FD_F32; type <= FD_BF16; type++) {
      struct one c = at[k];
      int64_t Ho = (c.H + c.top + c.bottom - c.k) / c.stride + 1, Wo = (c.W + c.left + c.right - c.k) / c.stride + 1;
      ot_what(t, "primitives of %lldx%lldx%lldx%lld>%lld, %s", (long long)c.B, (long long)c.H, (long long)c.W, (long long)c.I,
              (long long)c.O, fd_dtype_name(type));
      fd_tensor x = {NULL, {c.B, c.H, c.W, c.I}, 4, type, 0}, y = {NULL, {c.B, Ho, Wo, c.O}, 4, type, 0};
      fd_tensor w = {NULL, {c.O, c.I, c.k, c.k}, 4, type, FD_T_CONST}, dw = w, bias = {NULL, {c.O}, 1, FD_F32, 0};
      dw.dtype = FD_F32;
      for (int residual = 0; residual < 2; residual++)
        OT_CHECK(t, t->ctx->backend->prepare(t->ctx, FD_OP_conv2d_fwd, &(struct fd_conv2d_fwd_args){.x = &x, .w = &w, .bias = &bias,
                    .residual = residual ? &y : NULL, .y = &y, GEOMETRY}, &bytes) == FD_OK);
      for (unsigned acc = 0; acc < 2; acc++)
        OT_CHECK(t, t->ctx->backend->prepare(t->ctx, FD_OP_conv2d_bwd_data, &(struct fd_conv2d_bwd_data_args){.dy = &y, .w = &w,
                    .dx = &x, .acc = acc << 2, GEOMETRY}, &bytes) == FD_OK);
      OT_CHECK(t, t->ctx->backend->prepare(t->ctx, FD_OP_conv2d_bwd_weights, &(struct fd_conv2d_bwd_weights_args){.dy = &y, .x = &x,
                  .dw = &dw, .dbias = &bias, GEOMETRY}, &bytes) == FD_OK);
    }
  isa_no_reference(t);
}

static void body(struct ot *t) {
  static const struct one at[] = {
      {1, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0},  {2, 5, 7, 3, 16, 3, 1, 1, 1, 1, 1},  {1, 6, 6, 16, 16, 3, 1, 1, 1, 1, 1},
      {2, 8, 8, 16, 16, 3, 2, 0, 0, 1, 1}, {3, 7, 9, 5, 3, 3, 2, 0, 0, 1, 1}, {2, 6, 5, 8, 13, 1, 1, 0, 0, 0, 0},
      {1, 4, 4, 32, 48, 3, 1, 1, 1, 1, 1}, {1, 9, 8, 16, 3, 3, 1, 1, 1, 1, 1}, {1, 6, 7, 4, 4, 3, 2, 1, 1, 1, 1},
      {2, 5, 4, 7, 9, 3, 1, 0, 2, 1, 0},   {2, 6, 5, 8, 13, 3, 1, 1, 1, 1, 1}, {2, 6, 5, 13, 8, 3, 2, 0, 0, 1, 1},
      {2, 6, 5, 13, 7, 1, 2, 0, 0, 0, 0},  {2, 3, 3, 13, 7, 1, 1, 1, 0, 0, 1},  {1, 3, 8, 130, 70, 3, 1, 1, 1, 1, 1},
  };
  for (size_t i = 0; i < sizeof at / sizeof at[0]; i++) {
    for (int acc = 0; acc < 2; acc++) {
      check(t, at[i], FD_F32, FD_F32, FD_F32, false, false, acc);
      check(t, at[i], FD_BF16, FD_BF16, FD_F32, true, false, acc);
      check(t, at[i], FD_F32, FD_BF16, FD_BF16, true, true, acc);
      check(t, at[i], FD_BF16, FD_F32, FD_BF16, false, true, acc);
    }
    check(t, at[i], FD_F32, FD_F32, -1, false, true, false);
    check(t, at[i], FD_BF16, FD_BF16, -1, true, true, true);
  }
  check(t, (struct one){3, 256, 256, 3, 24, 1, 2, 0, 0, 0, 0}, FD_BF16, FD_BF16, FD_F32, true, false, true); /* several blocks to widen */
  isa_no_reference(t);
  list(t);

  ot_reset(t);
  ot_what(t, "misuse and nothing to do");
  fd_tensor *x = OT_RAND(t, FD_F32, 1, 4, 4, 3), *w = OT_RAND(t, FD_F32, 5, 3, 3, 3), *y = OT_NEW(t, FD_F32, 1, 4, 4, 5);
  fd_tensor *w2 = OT_RAND(t, FD_F32, 5, 4, 3, 3), *bias = OT_RAND(t, FD_F32, 4), *y2 = OT_NEW(t, FD_F32, 1, 4, 3, 5);
#define PAD1 .stride = 1, .pad_top = 1, .pad_left = 1, .pad_bottom = 1, .pad_right = 1
  OT_MISUSE(t, "w", conv2d_fwd, .x = x, .w = w2, .y = y, PAD1);
  OT_MISUSE(t, "bias", conv2d_fwd, .x = x, .w = w, .bias = bias, .y = y, PAD1);
  OT_MISUSE(t, "residual", conv2d_fwd, .x = x, .w = w, .residual = y2, .y = y, PAD1);
  OT_MISUSE(t, "y", conv2d_fwd, .x = x, .w = w, .y = y2, PAD1);
  OT_MISUSE(t, "stride", conv2d_fwd, .x = x, .w = w, .y = y);
  OT_MISUSE(t, "padding", conv2d_fwd, .x = x, .w = w, .y = y, .stride = 1, .pad_top = -1);
  OT_MISUSE(t, "dy", conv2d_bwd_data, .dy = y2, .w = w, .dx = x, PAD1);
  OT_MISUSE(t, "dw", conv2d_bwd_weights, .dy = y, .x = x, .dw = w2, PAD1);
  fd_tensor *x0 = OT_RAND(t, FD_F32, 0, 4, 4, 3), *y0 = OT_NEW(t, FD_F32, 0, 4, 4, 5), *dw = OT_NEW(t, FD_F32, 5, 3, 3, 3);
  OT_RUN(t, conv2d_fwd, .x = x0, .w = w, .y = y0, PAD1);
  OT_RUN(t, conv2d_bwd_data, .dy = y0, .w = w, .dx = x0, PAD1);
  OT_RUN(t, conv2d_bwd_weights, .dy = y0, .x = x0, .dw = dw, PAD1);
  for (int64_t i = 0; i < fd_tensor_numel(dw); i++) OT_CHECK(t, ot_get(dw, i) == 0);
}

int main(void) { return isa_main(body); }
