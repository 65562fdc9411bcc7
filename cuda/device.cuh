// SPDX-License-Identifier: Apache-2.0
// Device-side helpers that the kernels share: elements as floats, sums over a warp, launch sizes, choice by type.
// Invariant: every sum has a fixed order, so the same launch gives the same bits.
#ifndef FD_CUDA_DEVICE_CUH
#define FD_CUDA_DEVICE_CUH

#include "cuda/cuda.h"

namespace fd {

/* ---- elements ---- */

typedef uint16_t bf16; /* as the host has it */

static __device__ __forceinline__ float load(const float *p) { return *p; }
static __device__ __forceinline__ float load(const bf16 *p) { return __uint_as_float((unsigned)*p << 16); }
static __device__ __forceinline__ void store(float *p, float v) { *p = v; }
static __device__ __forceinline__ void store(bf16 *p, float v) { *p = __bfloat16_as_ushort(__float2bfloat16_rn(v)); }
/* Either type, chosen at run time: for small operands (weights of norms, biases). */
static __device__ __forceinline__ float load_any(const void *p, int is_bf16, int64_t i) {
  return is_bf16 ? load((const bf16 *)p + i) : load((const float *)p + i);
}

static __device__ __forceinline__ void store_any(void *p, int is_bf16, int64_t i, float v) {
  if (is_bf16)
    store((bf16 *)p + i, v);
  else
    store((float *)p + i, v);
}

/* V elements at once: 16 bytes where V is wide<T>(), one element where the length is odd. */
template <class T> struct wide;
template <> struct wide<float> { enum { V = 4 }; };
template <> struct wide<bf16> { enum { V = 8 }; };

template <int V> struct pack {
  float f[V];
};

template <int V> static __device__ __forceinline__ pack<V> load_pack(const float *p) {
  pack<V> v;
  if (V == 1) {
    v.f[0] = *p;
  } else {
    for (int i = 0; i < V; i += 4) {
      const float4 u = *(const float4 *)(p + i);
      v.f[i] = u.x, v.f[i + 1] = u.y, v.f[i + 2] = u.z, v.f[i + 3] = u.w;
    }
  }
  return v;
}

template <int V> static __device__ __forceinline__ pack<V> load_pack(const bf16 *p) {
  pack<V> v;
  if (V == 1) {
    v.f[0] = load(p);
  } else {
    const uint4 u = *(const uint4 *)p;
    const unsigned w[4] = {u.x, u.y, u.z, u.w};
    for (int i = 0; i < V / 2; i++) {
      v.f[2 * i] = __uint_as_float(w[i] << 16);
      v.f[2 * i + 1] = __uint_as_float(w[i] & 0xffff0000u);
    }
  }
  return v;
}

template <int V> static __device__ __forceinline__ void store_pack(float *p, const pack<V> &v) {
  if (V == 1) {
    *p = v.f[0];
  } else {
    for (int i = 0; i < V; i += 4) *(float4 *)(p + i) = make_float4(v.f[i], v.f[i + 1], v.f[i + 2], v.f[i + 3]);
  }
}

template <int V> static __device__ __forceinline__ void store_pack(bf16 *p, const pack<V> &v) {
  if (V == 1) {
    store(p, v.f[0]);
  } else {
    unsigned w[4];
    for (int i = 0; i < V / 2; i++)
      w[i] = __bfloat16_as_ushort(__float2bfloat16_rn(v.f[2 * i])) |
             (unsigned)__bfloat16_as_ushort(__float2bfloat16_rn(v.f[2 * i + 1])) << 16;
    *(uint4 *)p = make_uint4(w[0], w[1], w[2], w[3]);
  }
}

/* ---- sums ---- */

static __device__ __forceinline__ float warp_sum(float v) {
  for (int i = 16; i > 0; i /= 2) v += __shfl_xor_sync(0xffffffffu, v, i);
  return v;
}
static __device__ __forceinline__ double warp_sum(double v) {
  for (int i = 16; i > 0; i /= 2) v += __shfl_xor_sync(0xffffffffu, v, i);
  return v;
}

/* Sum over a block of at most 1024 threads (whole warps); every thread gets it. `slots` is shared memory of 32 values. */
template <class F> static __device__ __forceinline__ F block_sum(F v, F *slots) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = (blockDim.x + 31) / 32;
  v = warp_sum(v);
  __syncthreads(); /* slots may still be read from the sum before */
  if (lane == 0) slots[warp] = v;
  __syncthreads();
  F sum = 0;
  for (int w = 0; w < warps; w++) sum += slots[w];
  return sum;
}

/* ---- rows in use ---- */

static __device__ __forceinline__ int64_t rows_in_use(const int *count, int64_t capacity) {
  return count ? min((int64_t)*count, capacity) : capacity;
}

/* ---- activations: derivative beside value ---- */

static __device__ __forceinline__ float sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }
/* small u: no difference of near numbers */
static __device__ __forceinline__ float tanh_exp(float u) { return tanhf(u); }

static __device__ __forceinline__ float gelu_inner(float x) { return 0.7978845608028654f * (x + 0.044715f * x * x * x); }

/* 1 + tanh(u) is written as 2 sigmoid(2u): no cancellation where it is small */
static __device__ __forceinline__ float act_value(int act, float x) {
  if (act == FD_ACT_SILU) return x * sigmoid(x);
  if (act == FD_ACT_GELU_TANH) return x * sigmoid(2.0f * gelu_inner(x));
  if (act == FD_ACT_GELU_ERF) return 0.5f * x * erfcf(x * -0.7071067811865476f);
  return x;
}

static __device__ __forceinline__ float act_slope(int act, float x) {
  if (act == FD_ACT_SILU) {
    const float s = sigmoid(x);
    return s * (1.0f + x * sigmoid(-x));
  }
  if (act == FD_ACT_GELU_TANH) {
    const float u = 2.0f * gelu_inner(x), s = sigmoid(u);
    return s * (1.0f + x * sigmoid(-u) * 2.0f * 0.7978845608028654f * (1.0f + 3.0f * 0.044715f * x * x));
  }
  if (act == FD_ACT_GELU_ERF) return 0.5f * erfcf(x * -0.7071067811865476f) + x * 0.3989422804014327f * expf(-0.5f * x * x);
  return 1.0f;
}

/* ---- host side ---- */

static inline const void *data(const fd_tensor *t) { return t ? t->data : NULL; }
static inline int is_bf16(const fd_tensor *t) { return t && t->dtype == FD_BF16; }
static inline const int *count_of(const fd_tensor *t) { return t ? (const int *)t->data : NULL; }
static inline unsigned blocks(int64_t n, int64_t per_block) { return (unsigned)((n + per_block - 1) / per_block); }
/* Grid of a loop over n items that strides by the grid: enough blocks to fill the device, no more. */
static inline unsigned stride_blocks(fd_ctx *ctx, int64_t n, int per_block) {
  const int64_t want = (n + per_block - 1) / per_block, most = 8 * (int64_t)fd_cuda_of(ctx)->sm_count;
  return (unsigned)(want < most ? want : most);
}
/* 16-byte access is possible: the length of a row is a multiple of V, and so every row is aligned. */
template <class T> static inline bool wide_rows(int64_t cols) { return cols % wide<T>::V == 0; }

/* Calls f<T, V>(...) for the tensor's type, with V wide if rows of `cols` allow it. */
#define FD_BY_TYPE(tensor, cols, f, ...)                                                                          \
  ((tensor)->dtype == FD_BF16                                                                                     \
       ? (fd::wide_rows<fd::bf16>(cols) ? f<fd::bf16, 8>(__VA_ARGS__) : f<fd::bf16, 1>(__VA_ARGS__))               \
       : (fd::wide_rows<float>(cols) ? f<float, 4>(__VA_ARGS__) : f<float, 1>(__VA_ARGS__)))

}  // namespace fd

#endif
