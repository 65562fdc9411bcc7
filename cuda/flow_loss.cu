// SPDX-License-Identifier: Apache-2.0
// The loss of flow matching and its gradient. Latents only: less than 0.1 % of a step.
#include "cuda/device.cuh"

namespace {

enum { BLOCK = 256 };

struct flow {
  const void *out, *x_t;
  int out_bf16, x_t_bf16;
  const float *x, *noise, *sigma;
  int precondition;
};

/* pred - target at element i of a sample with this sigma */
__device__ __forceinline__ float error_at(const flow &f, float sigma, int64_t i) {
  const float out = fd::load_any(f.out, f.out_bf16, i);
  if (f.precondition) return out * -sigma + fd::load_any(f.x_t, f.x_t_bf16, i) - f.x[i];
  return out - (f.noise[i] - f.x[i]);
}

__global__ void __launch_bounds__(BLOCK) flow_loss_forward(flow f, const float *weight, float *loss, int64_t per_sample) {
  __shared__ float slots[32];
  const int64_t b = blockIdx.x;
  const float sigma = f.sigma[b];
  float sum = 0;
  for (int64_t i = threadIdx.x; i < per_sample; i += BLOCK) {
    const float e = error_at(f, sigma, b * per_sample + i);
    sum = fmaf(e, e, sum);
  }
  sum = fd::block_sum(sum, slots);
  if (threadIdx.x == 0) loss[b] = weight[b] * sum / (float)per_sample;
}

template <class T>
__global__ void flow_loss_backward(const float *dloss, flow f, const float *weight, T *dout, bool acc, int64_t per_sample, int64_t n) {
  for (int64_t i = (int64_t)blockIdx.x * BLOCK + threadIdx.x; i < n; i += (int64_t)BLOCK * gridDim.x) {
    const int64_t b = i / per_sample;
    const float sigma = f.sigma[b];
    float g = dloss[b] * weight[b] * 2.0f * error_at(f, sigma, i) / (float)per_sample;
    if (f.precondition) g *= -sigma;
    fd::store(dout + i, acc ? fd::load(dout + i) + g : g);
  }
}

}  // namespace

extern "C" fd_status cuda_flow_loss_fwd(fd_ctx *ctx, const struct fd_flow_loss_fwd_args *a) {
  const int64_t B = fd_tensor_numel(a->loss), n = fd_tensor_numel(a->out);
  const flow f = {a->out->data, fd::data(a->x_t), fd::is_bf16(a->out), fd::is_bf16(a->x_t), (const float *)a->x->data,
                  (const float *)a->noise->data, (const float *)a->sigma->data, a->precondition};
  if (B == 0) return FD_OK;
  return FD_CUDA(FD_LAUNCH(flow_loss_forward, (unsigned)B, BLOCK, 0, fd_cuda_stream(ctx), f, (const float *)a->weight->data, (float *)a->loss->data, n / B));
}

extern "C" fd_status cuda_flow_loss_bwd(fd_ctx *ctx, const struct fd_flow_loss_bwd_args *a) {
  const int64_t B = fd_tensor_numel(a->dloss), n = fd_tensor_numel(a->out);
  const flow f = {a->out->data, fd::data(a->x_t), fd::is_bf16(a->out), fd::is_bf16(a->x_t), (const float *)a->x->data,
                  (const float *)a->noise->data, (const float *)a->sigma->data, a->precondition};
  const bool acc = (a->acc >> 7 & 1) != 0;
  if (n == 0) return FD_OK;
  if (a->dout->dtype == FD_BF16)
    return FD_CUDA(FD_LAUNCH(flow_loss_backward<fd::bf16>, fd::stride_blocks(ctx, n, BLOCK), BLOCK, 0, fd_cuda_stream(ctx),
                             (const float *)a->dloss->data, f, (const float *)a->weight->data, (fd::bf16 *)a->dout->data, acc, n / B, n));
  return FD_CUDA(FD_LAUNCH(flow_loss_backward<float>, fd::stride_blocks(ctx, n, BLOCK), BLOCK, 0, fd_cuda_stream(ctx), (const float *)a->dloss->data, f,
                           (const float *)a->weight->data, (float *)a->dout->data, acc, n / B, n));
}
