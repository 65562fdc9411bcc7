// SPDX-License-Identifier: Apache-2.0
// Convolutions by cuDNN, bf16 in channel-last memory. 2 B Ho Wo O I kh kw FLOP each; at least 60 % of the matrix peak expected from 128 channels
// on. cuDNN names dimensions [B, C, H, W] and [O, I, kh, kw]; strides say what memory is.
#include <stdio.h>

#include "cuda/cudnn_graph.h"
#include "cuda/library.h"

enum { X = 1, WEIGHTS, Y, BIAS, RESIDUAL };

/* Channels last. uid 0: inside the graph. */
static fd_dnn_tensor nhwc(struct fd_dnn_graph *g, int64_t uid, cudnnDataType_t type, int64_t n, int64_t c, int64_t h, int64_t w) {
  const int64_t dim[4] = {n, c, h, w}, stride[4] = {h * w * c, 1, w * c, c};
  return uid ? fd_dnn_bound(g, uid, type, dim, stride) : fd_dnn_inner(g, type, dim, stride);
}

static void build(struct fd_dnn_graph *g, const void *shape) {
  const struct fd_cuda_conv *c = shape;
  const cudnnDataType_t f32 = CUDNN_DATA_FLOAT, bf16 = CUDNN_DATA_BFLOAT16;
  const struct fd_dnn_conv how = {{c->top, c->left}, {c->bottom, c->right}, {c->stride, c->stride}};
  const bool pointwise = c->op == FD_CUDA_CONV_FORWARD && (c->has_bias || c->has_residual);
  const enum fd_dnn_conv_op op = c->op == FD_CUDA_CONV_FORWARD ? FD_DNN_CONV_FORWARD
                                 : c->op == FD_CUDA_CONV_DATA  ? FD_DNN_CONV_DATA
                                                               : FD_DNN_CONV_WEIGHTS;
  fd_dnn_tensor x = nhwc(g, X, c->f32_data ? f32 : bf16, c->B, c->I, c->H, c->W), y = nhwc(g, Y, bf16, c->B, c->O, c->Ho, c->Wo), sum = y;
  fd_dnn_tensor w = nhwc(g, WEIGHTS, c->op == FD_CUDA_CONV_WEIGHTS ? f32 : bf16, c->O, c->I, c->kh, c->kw);
  /* plans that write f32 exist only with an operation behind the convolution */
  if (c->op == FD_CUDA_CONV_WEIGHTS) {
    fd_dnn_tensor dw = nhwc(g, 0, f32, c->O, c->I, c->kh, c->kw);
    fd_dnn_convolution(g, op, &how, x, dw, y);
    fd_dnn_pointwise(g, CUDNN_POINTWISE_IDENTITY, f32, 0, dw, NULL, NULL, w);
    return;
  }
  if (c->f32_data) {
    fd_dnn_tensor dx = nhwc(g, 0, f32, c->B, c->I, c->H, c->W);
    fd_dnn_convolution(g, op, &how, dx, w, y);
    fd_dnn_pointwise(g, CUDNN_POINTWISE_IDENTITY, f32, 0, dx, NULL, NULL, x);
    return;
  }
  if (pointwise) sum = nhwc(g, 0, f32, c->B, c->O, c->Ho, c->Wo);
  fd_dnn_convolution(g, op, &how, x, w, sum);
  if (!pointwise) return;
  if (c->has_residual) { /* before the bias: this order (and a bias in bf16) has a kernel of the device's own generation, others only an older one */
    fd_dnn_tensor to = c->has_bias ? nhwc(g, 0, f32, c->B, c->O, c->Ho, c->Wo) : y;
    fd_dnn_pointwise(g, CUDNN_POINTWISE_ADD, f32, 0, sum, nhwc(g, RESIDUAL, bf16, c->B, c->O, c->Ho, c->Wo), NULL, to);
    sum = to;
  }
  if (c->has_bias) fd_dnn_pointwise(g, CUDNN_POINTWISE_ADD, f32, 0, sum, nhwc(g, BIAS, bf16, 1, c->O, 1, 1), NULL, y);
}

static fd_status find(fd_ctx *ctx, const struct fd_cuda_conv *c, const struct fd_dnn_plan **plan) {
  static const char *const what[] = {"", " backward to data", " backward to weights"};
  char key[FD_DNN_KEY];
  snprintf(key, sizeof key, "convolution%s bf16, x [%lld, %lld, %lld, %lld], w [%lld, %lld, %lld, %lld], stride %d, padding %d %d %d %d%s%s%s",
           what[c->op], (long long)c->B, (long long)c->H, (long long)c->W, (long long)c->I, (long long)c->O, (long long)c->kh, (long long)c->kw, (long long)c->I,
           c->stride, c->top, c->left, c->bottom, c->right, c->has_bias ? ", bias" : "",
           c->has_residual ? ", residual" : "", c->f32_data ? ", to f32" : "");
  return fd_dnn_plan_find(ctx, key, build, c, plan);
}

fd_status fd_cuda_conv_prepare(fd_ctx *ctx, const struct fd_cuda_conv *c, int *found, size_t *scratch_bytes) {
  const struct fd_dnn_plan *p = NULL;
  fd_status st = find(ctx, c, &p);
  *found = p != NULL;
  *scratch_bytes = p ? (size_t)p->workspace : 0;
  return st;
}

fd_status fd_cuda_conv(fd_ctx *ctx, const struct fd_cuda_conv *c, void *scratch) {
  const struct fd_dnn_plan *p = NULL;
  fd_status st = find(ctx, c, &p);
  if (st != FD_OK) return st;
  if (!p) return FD_FAIL(FD_ERR_UNSUPPORTED, "cuDNN has no plan for a convolution of %lld to %lld channels", (long long)c->I, (long long)c->O);
  int64_t uid[5] = {X, WEIGHTS, Y};
  void *data[5] = {c->x, c->w, c->y};
  int n = 3;
  if (c->has_bias) uid[n] = BIAS, data[n++] = (void *)c->bias;
  if (c->has_residual) uid[n] = RESIDUAL, data[n++] = (void *)c->residual;
  return fd_dnn_run(ctx, p, n, uid, data, scratch);
}
