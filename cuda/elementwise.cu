// SPDX-License-Identifier: Apache-2.0
// Ops that read and write each element once: cast, fill, channel_affine, pixels, flow_noise, cfg_euler, posterior.
// All memory bound. cast moves 2 or 4 B in and out, pixels 1 B in and 2 out, fill its output, channel_affine 2 or 4 B in and out: 80 to 85 % of the
// bandwidth expected at 16 MB or more. The others touch latents only (half a million numbers at production size): bound by the launch, microseconds.
#include "cuda/device.cuh"

namespace {

enum { BLOCK = 256 };

/* One thread an element, or V of them, striding by the grid. */
#define FD_EACH_V(i, n, V) for (int64_t i = (V) * ((int64_t)blockIdx.x * BLOCK + threadIdx.x); i < (n); i += (int64_t)(V) * BLOCK * gridDim.x)
#define FD_EACH(i, n) FD_EACH_V(i, n, 1)

template <int V> __global__ void cast_kernel(const void *x, int x_bf16, void *y, int y_bf16, bool acc, int64_t n, int64_t period) {
  FD_EACH_V(i, n, V) {
    fd::pack<V> v = fd::load_pack_any<V>(x, x_bf16, i % period);
    const fd::pack<V> old = acc ? fd::load_pack_any<V>(y, y_bf16, i) : fd::same<V>(0.0f);
    for (int k = 0; k < V; k++) v.f[k] += old.f[k];
    fd::store_pack_any<V>(y, y_bf16, i, v);
  }
}

template <int V> __global__ void fill_kernel(void *y, int y_bf16, float value, int64_t n) {
  FD_EACH_V(i, n, V) fd::store_pack_any<V>(y, y_bf16, i, fd::same<V>(value));
}
__global__ void fill_f64_kernel(double *y, float value, int64_t n) { FD_EACH(i, n) y[i] = value; }

template <int V>
__global__ void channel_affine_kernel(const void *x, int x_bf16, const float *sub, const float *mul, void *y, int y_bf16, int inverse, int64_t n,
                                      int64_t C) {
  FD_EACH_V(i, n, V) {
    fd::pack<V> v = fd::load_pack_any<V>(x, x_bf16, i);
    const fd::pack<V> s = fd::load_pack<V>(sub + i % C), m = fd::load_pack<V>(mul + i % C);
    for (int k = 0; k < V; k++) v.f[k] = inverse ? v.f[k] / m.f[k] + s.f[k] : (v.f[k] - s.f[k]) * m.f[k];
    fd::store_pack_any<V>(y, y_bf16, i, v);
  }
}

template <int V> __global__ void pixels_kernel(const uint8_t *bytes, void *y, int y_bf16, int64_t n) {
  FD_EACH_V(i, n, V) {
    uint8_t b[V];
    if constexpr (V == 8) {
      const uint2 w = *(const uint2 *)(bytes + i);
      for (int k = 0; k < 4; k++) b[k] = (uint8_t)(w.x >> 8 * k), b[k + 4] = (uint8_t)(w.y >> 8 * k);
    } else {
      b[0] = bytes[i];
    }
    fd::pack<V> v;
    for (int k = 0; k < V; k++) v.f[k] = ((float)b[k] / 255.0f - 0.5f) / 0.5f;
    fd::store_pack_any<V>(y, y_bf16, i, v);
  }
}

__global__ void flow_noise_kernel(const float *x, const float *noise, const float *sigma, void *x_t, int bf16, int64_t n, int64_t per_sample) {
  FD_EACH(i, n) {
    const float s = sigma[i / per_sample];
    fd::store_any(x_t, bf16, i, (1.0f - s) * x[i] + s * noise[i]);
  }
}

__global__ void cfg_euler_kernel(const void *out, int bf16, const float *step, float *sample, int64_t n, bool guided) {
  FD_EACH(i, n) {
    float v = fd::load_any(out, bf16, i);
    if (guided) v += step[0] * (fd::load_any(out, bf16, n + i) - v);
    sample[i] += step[1] * v;
  }
}

__global__ void posterior_forward(const void *moments, int bf16, const float *noise, float *mean, float *logvar, float *latent, int64_t n, int64_t Z) {
  FD_EACH(i, n) {
    const int64_t at = i / Z * 2 * Z + i % Z;
    const float m = fd::load_any(moments, bf16, at), l = fminf(20.0f, fmaxf(-30.0f, fd::load_any(moments, bf16, at + Z)));
    if (mean) mean[i] = m;
    if (logvar) logvar[i] = l;
    if (latent) latent[i] = noise ? m + expf(0.5f * l) * noise[i] : m;
  }
}

__global__ void posterior_backward(const float *dmean, const float *dlogvar, const float *dlatent, const void *moments, int bf16, const float *noise,
                                   void *dmoments, bool acc, int64_t n, int64_t Z) {
  FD_EACH(i, n) {
    const int64_t at = i / Z * 2 * Z + i % Z;
    const float raw = fd::load_any(moments, bf16, at + Z);
    const bool inside = raw >= -30.0f && raw <= 20.0f;
    float dm = dmean ? dmean[i] : 0.0f, dl = dlogvar ? dlogvar[i] : 0.0f;
    if (dlatent) {
      dm += dlatent[i];
      if (noise) dl += dlatent[i] * noise[i] * 0.5f * expf(0.5f * fminf(20.0f, fmaxf(-30.0f, raw)));
    }
    if (!inside) dl = 0.0f;
    fd::store_any(dmoments, bf16, at, acc ? fd::load_any(dmoments, bf16, at) + dm : dm);
    fd::store_any(dmoments, bf16, at + Z, acc ? fd::load_any(dmoments, bf16, at + Z) + dl : dl);
  }
}

}  // namespace

#define FD_EACH_LAUNCH(kernel, n, ...) \
  ((n) == 0 ? FD_OK : FD_CUDA(FD_LAUNCH(kernel, fd::stride_blocks(ctx, (n), BLOCK), BLOCK, 0, fd_cuda_stream(ctx), __VA_ARGS__)))
/* kernel<8> if it may, else kernel<1> */
#define FD_WIDE_LAUNCH(wide, kernel, n, ...)                                                                                        \
  ((n) == 0 ? FD_OK                                                                                                                 \
            : FD_CUDA(FD_LAUNCH((wide) ? kernel<8> : kernel<1>, fd::stride_blocks(ctx, (n), (wide) ? 8 * BLOCK : BLOCK), BLOCK, 0, \
                                fd_cuda_stream(ctx), __VA_ARGS__)))

extern "C" fd_status cuda_cast(fd_ctx *ctx, const struct fd_cast_args *a) {
  const int64_t n = fd_tensor_numel(a->y), period = fd_tensor_numel(a->x);
  const bool wide = (n | period) % 8 == 0 && fd::aligned(FD_OP_cast, a);
  return FD_WIDE_LAUNCH(wide, cast_kernel, n, a->x->data, fd::is_bf16(a->x), a->y->data, fd::is_bf16(a->y), (a->acc >> 1 & 1) != 0, n, period);
}

extern "C" fd_status cuda_fill(fd_ctx *ctx, const struct fd_fill_args *a) {
  const int64_t n = fd_tensor_numel(a->y);
  const bool wide = n % 8 == 0 && fd::aligned(FD_OP_fill, a);
  if (a->y->dtype == FD_F64) return FD_EACH_LAUNCH(fill_f64_kernel, n, (double *)a->y->data, a->value, n);
  return FD_WIDE_LAUNCH(wide, fill_kernel, n, a->y->data, fd::is_bf16(a->y), a->value, n);
}

extern "C" fd_status cuda_channel_affine(fd_ctx *ctx, const struct fd_channel_affine_args *a) {
  const int64_t n = fd_tensor_numel(a->x), C = fd_tensor_cols(a->x);
  const bool wide = C % 8 == 0 && fd::aligned(FD_OP_channel_affine, a);
  return FD_WIDE_LAUNCH(wide, channel_affine_kernel, n, a->x->data, fd::is_bf16(a->x), (const float *)a->sub->data, (const float *)a->mul->data,
                        a->y->data, fd::is_bf16(a->y), a->inverse, n, C);
}

extern "C" fd_status cuda_pixels_fwd(fd_ctx *ctx, const struct fd_pixels_fwd_args *a) {
  const int64_t n = fd_tensor_numel(a->y);
  const bool wide = n % 8 == 0 && fd::aligned(FD_OP_pixels_fwd, a) && (uintptr_t)a->bytes->data % 8 == 0;
  return FD_WIDE_LAUNCH(wide, pixels_kernel, n, (const uint8_t *)a->bytes->data, a->y->data, fd::is_bf16(a->y), n);
}

extern "C" fd_status cuda_flow_noise(fd_ctx *ctx, const struct fd_flow_noise_args *a) {
  const int64_t n = fd_tensor_numel(a->x), B = fd_tensor_numel(a->sigma);
  return FD_EACH_LAUNCH(flow_noise_kernel, n, (const float *)a->x->data, (const float *)a->noise->data, (const float *)a->sigma->data, a->x_t->data,
                        fd::is_bf16(a->x_t), n, n / B);
}

extern "C" fd_status cuda_cfg_euler(fd_ctx *ctx, const struct fd_cfg_euler_args *a) {
  const int64_t n = fd_tensor_numel(a->sample);
  return FD_EACH_LAUNCH(cfg_euler_kernel, n, a->model_out->data, fd::is_bf16(a->model_out), (const float *)a->step->data, (float *)a->sample->data, n,
                        fd_tensor_numel(a->model_out) == 2 * n);
}

extern "C" fd_status cuda_posterior_fwd(fd_ctx *ctx, const struct fd_posterior_fwd_args *a) {
  const int64_t n = fd_tensor_numel(a->moments) / 2;
  return FD_EACH_LAUNCH(posterior_forward, n, a->moments->data, fd::is_bf16(a->moments), (const float *)fd::data(a->noise),
                        (float *)fd::data(a->mean), (float *)fd::data(a->logvar), (float *)fd::data(a->latent), n, fd_tensor_cols(a->moments) / 2);
}

extern "C" fd_status cuda_posterior_bwd(fd_ctx *ctx, const struct fd_posterior_bwd_args *a) {
  const int64_t n = fd_tensor_numel(a->moments) / 2;
  return FD_EACH_LAUNCH(posterior_backward, n, (const float *)fd::data(a->dmean), (const float *)fd::data(a->dlogvar),
                        (const float *)fd::data(a->dlatent), a->moments->data, fd::is_bf16(a->moments), (const float *)fd::data(a->noise),
                        a->dmoments->data, (a->acc >> 5 & 1) != 0, n, fd_tensor_cols(a->moments) / 2);
}
