// SPDX-License-Identifier: Apache-2.0
// y = x + gate a; backward: da = gate dy and the gate's gradient. 3 passes each: memory bound, at least 85 % of the bandwidth expected.
#include "cuda/device.cuh"

namespace {

enum { BLOCK = 256 };

template <class T, int V>
__global__ void gate_forward(const T *x, const T *a, const void *mod, int mod_bf16, int64_t S, int64_t col, int64_t rows_per_mod, T *y,
                             const int *count, int64_t rows, int64_t D) {
  const int64_t n = fd::rows_in_use(count, rows) * D;
  for (int64_t i = V * ((int64_t)blockIdx.x * BLOCK + threadIdx.x); i < n; i += (int64_t)V * BLOCK * gridDim.x) {
    fd::pack<V> v = fd::load_pack<V>(x + i);
    const fd::pack<V> b = fd::load_pack<V>(a + i);
    const int64_t at = mod ? i / D / rows_per_mod * S + col + i % D : 0;
    for (int k = 0; k < V; k++) v.f[k] += mod ? fd::load_any(mod, mod_bf16, at + k) * b.f[k] : b.f[k];
    fd::store_pack<V>(y + i, v);
  }
}

template <class T, int V>
__global__ void gate_backward(const T *dy, const void *mod, int mod_bf16, int64_t S, int64_t col, int64_t rows_per_mod, T *da, bool acc,
                              const int *count, int64_t rows, int64_t D) {
  const int64_t n = fd::rows_in_use(count, rows) * D;
  for (int64_t i = V * ((int64_t)blockIdx.x * BLOCK + threadIdx.x); i < n; i += (int64_t)V * BLOCK * gridDim.x) {
    fd::pack<V> v = fd::load_pack<V>(dy + i), old;
    if (acc) old = fd::load_pack<V>(da + i);
    const int64_t at = mod ? i / D / rows_per_mod * S + col + i % D : 0;
    for (int k = 0; k < V; k++) {
      if (mod) v.f[k] *= fd::load_any(mod, mod_bf16, at + k);
      if (acc) v.f[k] += old.f[k];
    }
    fd::store_pack<V>(da + i, v);
  }
}

/* dmod: a thread owns a column of one sample and adds its rows in order. */
template <class T>
__global__ void gate_columns(const T *dy, const T *a, void *dmod, int dmod_bf16, int64_t S, int64_t col, int64_t rows_per_mod, const int *count,
                             int64_t rows, int64_t D) {
  const int64_t d = (int64_t)blockIdx.x * BLOCK + threadIdx.x, sample = blockIdx.y;
  if (d >= D) return;
  const int64_t last = min((sample + 1) * rows_per_mod, fd::rows_in_use(count, rows));
  float sum = 0;
  for (int64_t row = sample * rows_per_mod; row < last; row++) sum = fmaf(fd::load(dy + row * D + d), fd::load(a + row * D + d), sum);
  const int64_t at = sample * S + col + d;
  fd::store_any(dmod, dmod_bf16, at, fd::load_any(dmod, dmod_bf16, at) + sum);
}

template <class T, int V> fd_status forward(fd_ctx *ctx, const struct fd_gate_residual_fwd_args *a) {
  const int64_t rows = fd_tensor_rows(a->x), D = fd_tensor_cols(a->x);
  const unsigned grid = fd::stride_blocks(ctx, rows * D, V * BLOCK);
  if (grid == 0) return FD_OK;
  return FD_CUDA(FD_LAUNCH((gate_forward<T, V>), grid, BLOCK, 0, fd_cuda_stream(ctx), (const T *)a->x->data, (const T *)a->a->data,
                           fd::data(a->mod), fd::is_bf16(a->mod), a->mod ? fd_tensor_cols(a->mod) : 0, a->gate_col, a->rows_per_mod,
                           (T *)a->y->data, fd::count_of(a->count), rows, D));
}

template <class T, int V> fd_status backward(fd_ctx *ctx, const struct fd_gate_residual_bwd_args *a) {
  const int64_t rows = fd_tensor_rows(a->dy), D = fd_tensor_cols(a->dy), S = a->mod ? fd_tensor_cols(a->mod) : 0;
  const unsigned grid = fd::stride_blocks(ctx, rows * D, V * BLOCK);
  cudaStream_t stream = fd_cuda_stream(ctx);
  fd_status st = FD_OK;
  if (grid == 0) return FD_OK;
  if (a->dmod)
    st = FD_CUDA(FD_LAUNCH((gate_columns<T>), dim3(fd::blocks(D, BLOCK), fd::blocks(rows, a->rows_per_mod)), BLOCK, 0, stream,
                           (const T *)a->dy->data, (const T *)a->a->data, a->dmod->data, fd::is_bf16(a->dmod), S, a->gate_col, a->rows_per_mod,
                           fd::count_of(a->count), rows, D));
  if (st == FD_OK)
    st = FD_CUDA(FD_LAUNCH((gate_backward<T, V>), grid, BLOCK, 0, stream, (const T *)a->dy->data, fd::data(a->mod), fd::is_bf16(a->mod),
                           S, a->gate_col, a->rows_per_mod, (T *)a->da->data, (a->acc >> 4 & 1) != 0, fd::count_of(a->count), rows, D));
  return st;
}

}  // namespace

extern "C" fd_status cuda_gate_residual_fwd(fd_ctx *ctx, const struct fd_gate_residual_fwd_args *a) {
  return FD_BY_TYPE(a->x, fd_tensor_cols(a->x), forward, ctx, a);
}

extern "C" fd_status cuda_gate_residual_bwd(fd_ctx *ctx, const struct fd_gate_residual_bwd_args *a) {
  return FD_BY_TYPE(a->dy, fd_tensor_cols(a->dy), backward, ctx, a);
}
