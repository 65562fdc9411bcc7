// SPDX-License-Identifier: Apache-2.0
// y = x + gate a; backward: da = gate dy and, from the same reads, the gate's gradient.
// Forward moves 3 elements an element of y; backward 3 (dy, a, da; 4 if da is added to; 2 without a gate): memory bound, 85 % of the bandwidth
// expected.
#include "cuda/device.cuh"

namespace {

enum { BLOCK = 256 };

template <class T, class A, int V>
__global__ void gate_forward(const T *x, const A *a, const void *mod, int mod_bf16, int64_t S, int64_t col, int64_t rows_per_mod, T *y,
                             const int *count, int64_t rows, int64_t D) {
  const int64_t n = fd::rows_in_use(count, rows) * D;
  for (int64_t i = V * ((int64_t)blockIdx.x * BLOCK + threadIdx.x); i < n; i += (int64_t)V * BLOCK * gridDim.x) {
    fd::pack<V> v = fd::load_pack<V>(x + i);
    const fd::pack<V> b = fd::load_pack<V>(a + i);
    const fd::pack<V> gate = mod ? fd::load_pack_any<V>(mod, mod_bf16, i / D / rows_per_mod * S + col + i % D) : fd::same<V>(1.0f);
    for (int k = 0; k < V; k++) v.f[k] = fmaf(gate.f[k], b.f[k], v.f[k]);
    fd::store_pack<V>(y + i, v);
  }
}

/* Without dmod: elementwise. */
template <class T, int V>
__global__ void gate_backward(const T *dy, const void *mod, int mod_bf16, int64_t S, int64_t col, int64_t rows_per_mod, T *da, bool acc,
                              const int *count, int64_t rows, int64_t D) {
  const int64_t n = fd::rows_in_use(count, rows) * D;
  for (int64_t i = V * ((int64_t)blockIdx.x * BLOCK + threadIdx.x); i < n; i += (int64_t)V * BLOCK * gridDim.x) {
    const fd::pack<V> g = fd::load_pack<V>(dy + i);
    const fd::pack<V> gate = mod ? fd::load_pack_any<V>(mod, mod_bf16, i / D / rows_per_mod * S + col + i % D) : fd::same<V>(1.0f);
    fd::pack<V> out = acc ? fd::load_pack<V>(da + i) : fd::same<V>(0.0f);
    for (int k = 0; k < V; k++) out.f[k] = fmaf(g.f[k], gate.f[k], out.f[k]);
    fd::store_pack<V>(da + i, out);
  }
}

/* A block owns some columns of some rows of one sample: da, and part [samples, splits, D] of the gate's gradient. */
template <class T, int V>
__global__ void __launch_bounds__(fd::TILE)
    gate_tiles(const T *__restrict__ dy, const T *__restrict__ a, const void *mod, int mod_bf16, int64_t S, int64_t col, int64_t rows_per_mod,
               T *__restrict__ da, bool acc, float *part, const int *count, int64_t rows, int64_t D, int64_t splits, int64_t per_split, int lanes) {
  __shared__ float slots[V * fd::TILE];
  const int64_t sample = blockIdx.x / splits, split = blockIdx.x % splits, d = V * ((int64_t)blockIdx.y * lanes + threadIdx.x % lanes);
  const int64_t first = sample * rows_per_mod + split * per_split;
  const int64_t last = min(min(first + per_split, (sample + 1) * rows_per_mod), fd::rows_in_use(count, rows));
  fd::pack<V> sum = fd::same<V>(0.0f);
  if (d < D) {
    const fd::pack<V> gate = fd::load_pack_any<V>(mod, mod_bf16, sample * S + col + d);
#pragma unroll 4
    for (int64_t r = first + threadIdx.x / lanes; r < last; r += fd::TILE / lanes) {
      const fd::pack<V> g = fd::load_pack<V>(dy + r * D + d), x = fd::load_pack<V>(a + r * D + d);
      fd::pack<V> out = acc ? fd::load_pack<V>(da + r * D + d) : fd::same<V>(0.0f);
      for (int k = 0; k < V; k++) {
        sum.f[k] = fmaf(g.f[k], x.f[k], sum.f[k]);
        out.f[k] = fmaf(g.f[k], gate.f[k], out.f[k]);
      }
      fd::store_pack<V>(da + r * D + d, out);
    }
  }
  sum = fd::tile_sum<V>(sum, lanes, slots);
  if ((int)threadIdx.x < lanes && d < D) fd::store_pack<V>(part + blockIdx.x * D + d, sum);
}

__global__ void __launch_bounds__(BLOCK) gate_dmod(const float *part, void *dmod, int dmod_bf16, int64_t S, int64_t col, int64_t D, int64_t splits) {
  const int64_t d = (int64_t)blockIdx.y * BLOCK + threadIdx.x, sample = blockIdx.x, at = sample * S + col + d;
  if (d >= D) return;
  float sum = fd::load_any(dmod, dmod_bf16, at);
  for (int64_t k = 0; k < splits; k++) sum += part[(sample * splits + k) * D + d];
  fd::store_any(dmod, dmod_bf16, at, sum);
}

template <class T, class A, int V> fd_status forward_from(fd_ctx *ctx, const struct fd_gate_residual_fwd_args *a) {
  const int64_t rows = fd_tensor_rows(a->x), D = fd_tensor_cols(a->x);
  const unsigned grid = fd::stride_blocks(ctx, rows * D, V * BLOCK);
  if (grid == 0) return FD_OK;
  return FD_CUDA(FD_LAUNCH((gate_forward<T, A, V>), grid, BLOCK, 0, fd_cuda_stream(ctx), (const T *)a->x->data, (const A *)a->a->data,
                           fd::data(a->mod), fd::is_bf16(a->mod), a->mod ? fd_tensor_cols(a->mod) : 0, a->gate_col, a->rows_per_mod,
                           (T *)a->y->data, fd::count_of(a->count), rows, D));
}

template <class T, int V> fd_status forward(fd_ctx *ctx, const struct fd_gate_residual_fwd_args *a) {
  return a->a->dtype == FD_BF16 ? forward_from<T, fd::bf16, V>(ctx, a) : forward_from<T, T, V>(ctx, a);
}

template <class T, int V> fd_status backward(fd_ctx *ctx, const struct fd_gate_residual_bwd_args *a) {
  const int64_t rows = fd_tensor_rows(a->dy), D = fd_tensor_cols(a->dy), S = a->mod ? fd_tensor_cols(a->mod) : 0;
  const bool acc = (a->acc >> 4 & 1) != 0;
  cudaStream_t stream = fd_cuda_stream(ctx);
  if (rows * D == 0) return FD_OK;
  if (!a->dmod)
    return FD_CUDA(FD_LAUNCH((gate_backward<T, V>), fd::stride_blocks(ctx, rows * D, V * BLOCK), BLOCK, 0, stream, (const T *)a->dy->data,
                             fd::data(a->mod), fd::is_bf16(a->mod), S, a->gate_col, a->rows_per_mod, (T *)a->da->data, acc, fd::count_of(a->count),
                             rows, D));
  const fd::groups g = fd::groups_of(rows, a->rows_per_mod, D, 64);
  const int lanes = fd::tile_lanes(D / V);
  float *part = (float *)ctx->scratch;
  fd_status st = FD_CUDA(FD_LAUNCH((gate_tiles<T, V>), dim3((unsigned)(g.n * g.splits), fd::blocks(D, V * lanes)), fd::TILE, 0, stream,
                                   (const T *)a->dy->data, (const T *)a->a->data, a->mod->data, fd::is_bf16(a->mod), S, a->gate_col, a->rows_per_mod,
                                   (T *)a->da->data, acc, part, fd::count_of(a->count), rows, D, g.splits, g.per_split, lanes));
  if (st == FD_OK)
    st = FD_CUDA(FD_LAUNCH(gate_dmod, dim3((unsigned)g.n, fd::blocks(D, BLOCK)), BLOCK, 0, stream, (const float *)part, a->dmod->data,
                           fd::is_bf16(a->dmod), S, a->gate_col, D, g.splits));
  return st;
}

}  // namespace

extern "C" size_t cuda_gate_residual_bwd_scratch(const struct fd_gate_residual_bwd_args *a) {
  const fd::groups g = fd::groups_of(fd_tensor_rows(a->dy), a->rows_per_mod, fd_tensor_cols(a->dy), 64);
  return a->dmod ? (size_t)(g.n * g.splits * fd_tensor_cols(a->dy)) * sizeof(float) : 0;
}

extern "C" fd_status cuda_gate_residual_fwd(fd_ctx *ctx, const struct fd_gate_residual_fwd_args *a) {
  const int64_t lengths = fd_tensor_cols(a->x) | (a->mod ? fd_tensor_cols(a->mod) | a->gate_col : 0);
  return FD_BY_TYPE(FD_OP_gate_residual_fwd, a, a->x, lengths, forward, ctx, a);
}

extern "C" fd_status cuda_gate_residual_bwd(fd_ctx *ctx, const struct fd_gate_residual_bwd_args *a) {
  const int64_t lengths = fd_tensor_cols(a->dy) | (a->mod ? fd_tensor_cols(a->mod) | a->gate_col : 0);
  return FD_BY_TYPE(FD_OP_gate_residual_bwd, a, a->dy, lengths, backward, ctx, a);
}
