// SPDX-License-Identifier: Apache-2.0
// y = act(gate) up. Forward moves 3 F, backward 5 F elements a row (7 F if added to): memory bound, 85 % of the bandwidth expected; value and slope
// share one exponential, so that in bf16 arithmetic stays far under the memory time (18 of 50, 31 of 85 instructions an element).
#include "cuda/device.cuh"

#include <type_traits>

namespace {

enum { BLOCK = 256 };

template <class T, int V, int ACT> __global__ void geglu_forward(const T *gate_up, T *y, const int *count, int64_t rows, int64_t F) {
  const int64_t n = fd::rows_in_use(count, rows) * F;
  for (int64_t i = V * ((int64_t)blockIdx.x * BLOCK + threadIdx.x); i < n; i += (int64_t)V * BLOCK * gridDim.x) {
    const int64_t at = i / F * 2 * F + i % F;
    fd::pack<V> g = fd::load_pack<V>(gate_up + at);
    const fd::pack<V> u = fd::load_pack<V>(gate_up + at + F);
    for (int k = 0; k < V; k++) g.f[k] = fd::act_value<T>(ACT, g.f[k]) * u.f[k];
    fd::store_pack<V>(y + i, g);
  }
}

template <class T, int V, int ACT>
__global__ void geglu_backward(const T *dy, const T *gate_up, T *dgate_up, const int *count, int64_t rows, int64_t F, bool acc) {
  const int64_t n = fd::rows_in_use(count, rows) * F;
  for (int64_t i = V * ((int64_t)blockIdx.x * BLOCK + threadIdx.x); i < n; i += (int64_t)V * BLOCK * gridDim.x) {
    const int64_t at = i / F * 2 * F + i % F;
    const fd::pack<V> d = fd::load_pack<V>(dy + i);
    fd::pack<V> g = fd::load_pack<V>(gate_up + at), u = fd::load_pack<V>(gate_up + at + F);
    for (int k = 0; k < V; k++) {
      const fd::value_slope a = fd::act_both<T>(ACT, g.f[k]);
      g.f[k] = d.f[k] * u.f[k] * a.slope;
      u.f[k] = d.f[k] * a.value;
    }
    if (acc) {
      const fd::pack<V> g0 = fd::load_pack<V>(dgate_up + at), u0 = fd::load_pack<V>(dgate_up + at + F);
      for (int k = 0; k < V; k++) g.f[k] += g0.f[k], u.f[k] += u0.f[k];
    }
    fd::store_pack<V>(dgate_up + at, g);
    fd::store_pack<V>(dgate_up + at + F, u);
  }
}

/* f with the activation as a constant: tests and selections in the loop would be half of its instructions. */
template <class F> fd_status by_act(int act, F f) {
  switch (act) {
    case FD_ACT_SILU: return f(std::integral_constant<int, FD_ACT_SILU>());
    case FD_ACT_GELU_TANH: return f(std::integral_constant<int, FD_ACT_GELU_TANH>());
    case FD_ACT_GELU_ERF: return f(std::integral_constant<int, FD_ACT_GELU_ERF>());
    default: return f(std::integral_constant<int, FD_ACT_NONE>());
  }
}

template <class T, int V> fd_status forward(fd_ctx *ctx, const struct fd_geglu_fwd_args *a) {
  const int64_t rows = fd_tensor_rows(a->y), F = fd_tensor_cols(a->y);
  const unsigned grid = fd::stride_blocks(ctx, rows * F, V * BLOCK);
  if (grid == 0) return FD_OK;
  return by_act(a->act, [=](auto act) {
    return FD_CUDA(FD_LAUNCH((geglu_forward<T, V, decltype(act)::value>), grid, BLOCK, 0, fd_cuda_stream(ctx), (const T *)a->gate_up->data,
                             (T *)a->y->data, fd::count_of(a->count), rows, F));
  });
}

template <class T, int V> fd_status backward(fd_ctx *ctx, const struct fd_geglu_bwd_args *a) {
  const int64_t rows = fd_tensor_rows(a->dy), F = fd_tensor_cols(a->dy);
  const unsigned grid = fd::stride_blocks(ctx, rows * F, V * BLOCK);
  if (grid == 0) return FD_OK;
  return by_act(a->act, [=](auto act) {
    return FD_CUDA(FD_LAUNCH((geglu_backward<T, V, decltype(act)::value>), grid, BLOCK, 0, fd_cuda_stream(ctx), (const T *)a->dy->data,
                             (const T *)a->gate_up->data, (T *)a->dgate_up->data, fd::count_of(a->count), rows, F, (a->acc >> 3 & 1) != 0));
  });
}

}  // namespace

extern "C" fd_status cuda_geglu_fwd(fd_ctx *ctx, const struct fd_geglu_fwd_args *a) {
  return FD_BY_TYPE(FD_OP_geglu_fwd, a, a->y, fd_tensor_cols(a->y), forward, ctx, a);
}

extern "C" fd_status cuda_geglu_bwd(fd_ctx *ctx, const struct fd_geglu_bwd_args *a) {
  return FD_BY_TYPE(FD_OP_geglu_bwd, a, a->dy, fd_tensor_cols(a->dy), backward, ctx, a);
}
