// SPDX-License-Identifier: Apache-2.0
// Ops that move elements of pictures: patchify, unpatchify, upsample2x. Memory bound; small beside the rest of a step.
#include "cuda/device.cuh"

namespace {

enum { BLOCK = 256 };

struct patches {
  int64_t H, W, C, P;
  int channel_last;
};

/* Index in the image [B, H, W, C] of element i of the tokens [B, N, C P P]. */
__device__ __forceinline__ int64_t image_index(const patches &g, int64_t i) {
  const int64_t width = g.C * g.P * g.P, e = i % width, token = i / width, w = g.W / g.P, N = g.H / g.P * w;
  int64_t c, p, q;
  if (g.channel_last)
    c = e % g.C, q = e / g.C % g.P, p = e / (g.C * g.P);
  else
    q = e % g.P, p = e / g.P % g.P, c = e / (g.P * g.P);
  const int64_t b = token / N, t = token % N, y = t / w * g.P + p, x = t % w * g.P + q;
  return ((b * g.H + y) * g.W + x) * g.C + c;
}

template <class T> __global__ void patch_kernel(const T *x, T *y, patches g, bool to_tokens, bool acc, int64_t n) {
  for (int64_t i = (int64_t)blockIdx.x * BLOCK + threadIdx.x; i < n; i += (int64_t)BLOCK * gridDim.x) {
    const int64_t image = image_index(g, i), from = to_tokens ? image : i, to = to_tokens ? i : image;
    if (acc)
      fd::store(y + to, fd::load(y + to) + fd::load(x + from));
    else
      y[to] = x[from];
  }
}

template <class T> __global__ void upsample_forward(const T *x, T *y, int64_t H, int64_t W, int64_t C, int64_t n) {
  for (int64_t i = (int64_t)blockIdx.x * BLOCK + threadIdx.x; i < n; i += (int64_t)BLOCK * gridDim.x) {
    const int64_t c = i % C, w = i / C % (2 * W), h = i / (C * 2 * W) % (2 * H), b = i / (C * 4 * W * H);
    y[i] = x[((b * H + h / 2) * W + w / 2) * C + c];
  }
}

template <class T> __global__ void upsample_backward(const T *dy, T *dx, bool acc, int64_t H, int64_t W, int64_t C, int64_t n) {
  for (int64_t i = (int64_t)blockIdx.x * BLOCK + threadIdx.x; i < n; i += (int64_t)BLOCK * gridDim.x) {
    const int64_t c = i % C, w = i / C % W, h = i / (C * W) % H, b = i / (C * W * H);
    float sum = acc ? fd::load(dx + i) : 0.0f;
    for (int k = 0; k < 4; k++) sum += fd::load(dy + ((b * 2 * H + 2 * h + k / 2) * 2 * W + 2 * w + k % 2) * C + c);
    fd::store(dx + i, sum);
  }
}

template <class T>
fd_status patch(fd_ctx *ctx, const fd_tensor *image, const fd_tensor *x, const fd_tensor *y, int P, int channel_last, bool to_tokens, bool acc) {
  const int64_t n = fd_tensor_numel(x);
  const patches g = {image->shape[1], image->shape[2], image->shape[3], P, channel_last};
  if (n == 0) return FD_OK;
  return FD_CUDA(FD_LAUNCH(patch_kernel<T>, fd::stride_blocks(ctx, n, BLOCK), BLOCK, 0, fd_cuda_stream(ctx), (const T *)x->data, (T *)y->data, g,
                           to_tokens, acc, n));
}

}  // namespace

extern "C" fd_status cuda_patchify(fd_ctx *ctx, const struct fd_patchify_args *a) {
  const bool acc = (a->acc >> 1 & 1) != 0;
  return a->x->dtype == FD_BF16 ? patch<fd::bf16>(ctx, a->x, a->x, a->y, a->P, a->channel_last, true, acc)
                                : patch<float>(ctx, a->x, a->x, a->y, a->P, a->channel_last, true, acc);
}

extern "C" fd_status cuda_unpatchify(fd_ctx *ctx, const struct fd_unpatchify_args *a) {
  const bool acc = (a->acc >> 1 & 1) != 0;
  return a->x->dtype == FD_BF16 ? patch<fd::bf16>(ctx, a->y, a->x, a->y, a->P, a->channel_last, false, acc)
                                : patch<float>(ctx, a->y, a->x, a->y, a->P, a->channel_last, false, acc);
}

extern "C" fd_status cuda_upsample2x_fwd(fd_ctx *ctx, const struct fd_upsample2x_fwd_args *a) {
  const int64_t H = a->x->shape[1], W = a->x->shape[2], C = a->x->shape[3], n = fd_tensor_numel(a->y);
  const unsigned grid = fd::stride_blocks(ctx, n, BLOCK);
  if (n == 0) return FD_OK;
  if (a->x->dtype == FD_BF16)
    return FD_CUDA(FD_LAUNCH(upsample_forward<fd::bf16>, grid, BLOCK, 0, fd_cuda_stream(ctx), (const fd::bf16 *)a->x->data,
                             (fd::bf16 *)a->y->data, H, W, C, n));
  return FD_CUDA(FD_LAUNCH(upsample_forward<float>, grid, BLOCK, 0, fd_cuda_stream(ctx), (const float *)a->x->data, (float *)a->y->data, H, W, C, n));
}

extern "C" fd_status cuda_upsample2x_bwd(fd_ctx *ctx, const struct fd_upsample2x_bwd_args *a) {
  const int64_t H = a->dx->shape[1], W = a->dx->shape[2], C = a->dx->shape[3], n = fd_tensor_numel(a->dx);
  const unsigned grid = fd::stride_blocks(ctx, n, BLOCK);
  const bool acc = (a->acc >> 1 & 1) != 0;
  if (n == 0) return FD_OK;
  if (a->dx->dtype == FD_BF16)
    return FD_CUDA(FD_LAUNCH(upsample_backward<fd::bf16>, grid, BLOCK, 0, fd_cuda_stream(ctx), (const fd::bf16 *)a->dy->data,
                             (fd::bf16 *)a->dx->data, acc, H, W, C, n));
  return FD_CUDA(FD_LAUNCH(upsample_backward<float>, grid, BLOCK, 0, fd_cuda_stream(ctx), (const float *)a->dy->data, (float *)a->dx->data, acc, H,
                           W, C, n));
}
