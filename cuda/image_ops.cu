// SPDX-License-Identifier: Apache-2.0
// Ops that move elements of pictures: patchify, unpatchify, upsample2x. Memory bound. upsample2x moves 5 elements an element of x (1 in, 4 out; its
// gradient 4 in, 1 out): 85 % of the bandwidth expected where C is a multiple of 8. patchify and unpatchify touch latents only: microseconds.
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

/* First element in dy or y of the 2 x 2 pixels over element i of [B, H, W, C]. */
__device__ __forceinline__ int64_t corner(int64_t i, int64_t W, int64_t C) {
  const int64_t pixel = i / C, row = pixel / W; /* row of all pictures */
  return (4 * row * W + 2 * (pixel - row * W)) * C + (i - pixel * C);
}

template <class T, int V> __global__ void upsample_forward(const T *x, T *y, int64_t W, int64_t C, int64_t n) {
  for (int64_t i = V * ((int64_t)blockIdx.x * BLOCK + threadIdx.x); i < n; i += (int64_t)V * BLOCK * gridDim.x) {
    const fd::pack<V> v = fd::load_pack<V>(x + i);
    const int64_t at = corner(i, W, C);
    for (int k = 0; k < 4; k++) fd::store_pack<V>(y + at + (k / 2 * 2 * W + k % 2) * C, v);
  }
}

template <class T, int V> __global__ void upsample_backward(const T *dy, T *dx, bool acc, int64_t W, int64_t C, int64_t n) {
  for (int64_t i = V * ((int64_t)blockIdx.x * BLOCK + threadIdx.x); i < n; i += (int64_t)V * BLOCK * gridDim.x) {
    const int64_t at = corner(i, W, C);
    fd::pack<V> sum = acc ? fd::load_pack<V>(dx + i) : fd::same<V>(0.0f);
    for (int k = 0; k < 4; k++) {
      const fd::pack<V> v = fd::load_pack<V>(dy + at + (k / 2 * 2 * W + k % 2) * C);
      for (int j = 0; j < V; j++) sum.f[j] += v.f[j];
    }
    fd::store_pack<V>(dx + i, sum);
  }
}

template <class T, int V> fd_status upsample(fd_ctx *ctx, const fd_tensor *x, const fd_tensor *y) {
  const int64_t n = fd_tensor_numel(x);
  if (n == 0) return FD_OK;
  return FD_CUDA(FD_LAUNCH((upsample_forward<T, V>), fd::stride_blocks(ctx, n, V * BLOCK), BLOCK, 0, fd_cuda_stream(ctx), (const T *)x->data,
                           (T *)y->data, x->shape[2], x->shape[3], n));
}

template <class T, int V> fd_status upsample_gradient(fd_ctx *ctx, const fd_tensor *dy, const fd_tensor *dx, bool acc) {
  const int64_t n = fd_tensor_numel(dx);
  if (n == 0) return FD_OK;
  return FD_CUDA(FD_LAUNCH((upsample_backward<T, V>), fd::stride_blocks(ctx, n, V * BLOCK), BLOCK, 0, fd_cuda_stream(ctx), (const T *)dy->data,
                           (T *)dx->data, acc, dx->shape[2], dx->shape[3], n));
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
  return FD_BY_TYPE(FD_OP_upsample2x_fwd, a, a->x, a->x->shape[3], upsample, ctx, a->x, a->y);
}

extern "C" fd_status cuda_upsample2x_bwd(fd_ctx *ctx, const struct fd_upsample2x_bwd_args *a) {
  return FD_BY_TYPE(FD_OP_upsample2x_bwd, a, a->dx, a->dx->shape[3], upsample_gradient, ctx, a->dy, a->dx, (a->acc >> 1 & 1) != 0);
}
