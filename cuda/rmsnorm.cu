// SPDX-License-Identifier: Apache-2.0
// RMSNorm with modulation. Forward: 2 passes of x, one warp a row; backward: 4 passes (rows, then columns): memory bound, at least 80 % of the
// bandwidth expected.
#include "cuda/device.cuh"

namespace {

enum { WARPS = 4, BLOCK = 32 * WARPS, CHUNK = 64 /* rows of one partial sum where there is no modulation */ };

struct columns { /* of mod; a missing vector has a null pointer */
  const void *mod;
  int mod_bf16;
  int64_t S, rows_per_mod, shift_col, scale_col;
};

__device__ __forceinline__ float scale_of(const columns &c, int64_t sample, int64_t d) {
  return c.mod && c.scale_col >= 0 ? 1.0f + fd::load_any(c.mod, c.mod_bf16, sample * c.S + c.scale_col + d) : 1.0f;
}
__device__ __forceinline__ float shift_of(const columns &c, int64_t sample, int64_t d) {
  return c.mod && c.shift_col >= 0 ? fd::load_any(c.mod, c.mod_bf16, sample * c.S + c.shift_col + d) : 0.0f;
}

template <class T, int V>
__global__ void __launch_bounds__(BLOCK)
    rmsnorm_forward(const T *x, const void *w, int w_bf16, columns c, T *y, float *rstd, const int *count, int64_t rows, int64_t D, float eps) {
  const int lane = threadIdx.x % 32;
  const int64_t row = (int64_t)blockIdx.x * WARPS + threadIdx.x / 32;
  if (row >= fd::rows_in_use(count, rows)) return; /* the whole warp */
  const int64_t sample = c.mod ? row / c.rows_per_mod : 0;
  x += row * D, y += row * D;
  float sum = 0;
  for (int64_t d = V * lane; d < D; d += 32 * V) {
    const fd::pack<V> v = fd::load_pack<V>(x + d);
    for (int i = 0; i < V; i++) sum = fmaf(v.f[i], v.f[i], sum);
  }
  const float r = rsqrtf(fd::warp_sum(sum) / (float)D + eps);
  for (int64_t d = V * lane; d < D; d += 32 * V) {
    fd::pack<V> v = fd::load_pack<V>(x + d);
    for (int i = 0; i < V; i++)
      v.f[i] = fmaf(v.f[i] * r * (1.0f + fd::load_any(w, w_bf16, d + i)), scale_of(c, sample, d + i), shift_of(c, sample, d + i));
    fd::store_pack<V>(y + d, v);
  }
  if (lane == 0 && rstd) rstd[row] = r;
}

/* dx = r (g - n mean(g n)), g = dy (1 + w)(1 + scale), n = x r */
template <class T, int V>
__global__ void __launch_bounds__(BLOCK)
    rmsnorm_rows(const T *dy, const T *x, const void *w, int w_bf16, const float *rstd, columns c, T *dx, bool acc, const int *count,
                 int64_t rows, int64_t D) {
  const int lane = threadIdx.x % 32;
  const int64_t row = (int64_t)blockIdx.x * WARPS + threadIdx.x / 32;
  if (row >= fd::rows_in_use(count, rows)) return;
  const int64_t sample = c.mod ? row / c.rows_per_mod : 0;
  x += row * D, dy += row * D, dx += row * D;
  const float r = rstd[row];
  float dot = 0;
  for (int64_t d = V * lane; d < D; d += 32 * V) {
    const fd::pack<V> v = fd::load_pack<V>(x + d), g = fd::load_pack<V>(dy + d);
    for (int i = 0; i < V; i++)
      dot = fmaf(g.f[i] * ((1.0f + fd::load_any(w, w_bf16, d + i)) * scale_of(c, sample, d + i)), v.f[i], dot);
  }
  dot = fd::warp_sum(dot) * r * r / (float)D;
  for (int64_t d = V * lane; d < D; d += 32 * V) {
    const fd::pack<V> v = fd::load_pack<V>(x + d), g = fd::load_pack<V>(dy + d);
    fd::pack<V> o;
    if (acc) o = fd::load_pack<V>(dx + d);
    for (int i = 0; i < V; i++) {
      const float grad = g.f[i] * ((1.0f + fd::load_any(w, w_bf16, d + i)) * scale_of(c, sample, d + i));
      const float value = fmaf(grad, r, -(v.f[i] * r * dot));
      o.f[i] = acc ? o.f[i] + value : value;
    }
    fd::store_pack<V>(dx + d, o);
  }
}

/* Per group of rows (a sample, or CHUNK rows) and column: s = sum dy n, t = sum dy. From them dshift = t, dscale = (1 + w) s, and
 * dw's part (1 + scale) s, which goes to `part` [groups, D]. A thread owns a column; its rows are added in order. */
template <class T>
__global__ void __launch_bounds__(BLOCK)
    rmsnorm_columns(const T *dy, const T *x, const void *w, int w_bf16, const float *rstd, columns c, void *dmod, int dmod_bf16, float *part,
                    const int *count, int64_t rows, int64_t per_group, int64_t D) {
  const int64_t d = (int64_t)blockIdx.x * BLOCK + threadIdx.x, group = blockIdx.y;
  if (d >= D) return;
  const int64_t first = group * per_group, last = min(first + per_group, fd::rows_in_use(count, rows));
  float s = 0, t = 0;
  for (int64_t row = first; row < last; row++) {
    const float g = fd::load(dy + row * D + d);
    s = fmaf(g, fd::load(x + row * D + d) * rstd[row], s);
    t += g;
  }
  if (part) part[group * D + d] = s * scale_of(c, group, d);
  if (dmod) {
    const int64_t scale = group * c.S + c.scale_col + d, shift = group * c.S + c.shift_col + d;
    if (c.scale_col >= 0) fd::store_any(dmod, dmod_bf16, scale, fd::load_any(dmod, dmod_bf16, scale) + s * (1.0f + fd::load_any(w, w_bf16, d)));
    if (c.shift_col >= 0) fd::store_any(dmod, dmod_bf16, shift, fd::load_any(dmod, dmod_bf16, shift) + t);
  }
}

__global__ void __launch_bounds__(BLOCK) rmsnorm_dw(const float *part, float *dw, bool acc, int64_t groups, int64_t D) {
  const int64_t d = (int64_t)blockIdx.x * BLOCK + threadIdx.x;
  if (d >= D) return;
  float sum = acc ? dw[d] : 0.0f;
  for (int64_t g = 0; g < groups; g++) sum += part[g * D + d];
  dw[d] = sum;
}

columns columns_of(const fd_tensor *mod, int64_t rows_per_mod, int64_t shift_col, int64_t scale_col) {
  return columns{fd::data(mod), fd::is_bf16(mod), mod ? fd_tensor_cols(mod) : 0, rows_per_mod, shift_col, scale_col};
}

int64_t group_rows(const struct fd_rmsnorm_bwd_args *a) { return a->mod ? a->rows_per_mod : (int64_t)CHUNK; }

template <class T, int V> fd_status forward(fd_ctx *ctx, const struct fd_rmsnorm_fwd_args *a) {
  const int64_t rows = fd_tensor_rows(a->x), D = fd_tensor_cols(a->x);
  if (rows == 0) return FD_OK;
  return FD_CUDA(FD_LAUNCH((rmsnorm_forward<T, V>), fd::blocks(rows, WARPS), BLOCK, 0, fd_cuda_stream(ctx), (const T *)a->x->data,
                           a->w->data, fd::is_bf16(a->w), columns_of(a->mod, a->rows_per_mod, a->shift_col, a->scale_col),
                           (T *)a->y->data, (float *)fd::data(a->rstd), fd::count_of(a->count), rows, D, a->eps));
}

template <class T, int V> fd_status backward(fd_ctx *ctx, const struct fd_rmsnorm_bwd_args *a) {
  const int64_t rows = fd_tensor_rows(a->x), D = fd_tensor_cols(a->x);
  const columns c = columns_of(a->mod, a->rows_per_mod, a->shift_col, a->scale_col);
  const int64_t per_group = group_rows(a), groups = (rows + per_group - 1) / per_group;
  cudaStream_t stream = fd_cuda_stream(ctx);
  fd_status st = FD_OK;
  if (rows > 0 && (a->dw || a->dmod))
    st = FD_CUDA(FD_LAUNCH((rmsnorm_columns<T>), dim3(fd::blocks(D, BLOCK), (unsigned)groups), BLOCK, 0, stream,
                           (const T *)a->dy->data, (const T *)a->x->data, a->w->data, fd::is_bf16(a->w), (const float *)a->rstd->data, c,
                           (void *)fd::data(a->dmod), fd::is_bf16(a->dmod), a->dw ? (float *)ctx->scratch : NULL, fd::count_of(a->count), rows, per_group, D));
  if (st == FD_OK && a->dw)
    st = FD_CUDA(FD_LAUNCH(rmsnorm_dw, fd::blocks(D, BLOCK), BLOCK, 0, stream, (const float *)ctx->scratch, (float *)a->dw->data,
                           (a->acc >> 7 & 1) != 0, groups, D));
  if (st == FD_OK && rows > 0) /* last, since dx may alias dy */
    st = FD_CUDA(FD_LAUNCH((rmsnorm_rows<T, V>), fd::blocks(rows, WARPS), BLOCK, 0, stream, (const T *)a->dy->data,
                           (const T *)a->x->data, a->w->data, fd::is_bf16(a->w), (const float *)a->rstd->data, c, (T *)a->dx->data,
                           (a->acc >> 6 & 1) != 0, fd::count_of(a->count), rows, D));
  return st;
}

}  // namespace

extern "C" size_t cuda_rmsnorm_bwd_scratch(const struct fd_rmsnorm_bwd_args *a) {
  const int64_t per_group = group_rows(a);
  return a->dw ? (size_t)((fd_tensor_rows(a->x) + per_group - 1) / per_group * fd_tensor_cols(a->x)) * sizeof(float) : 0;
}

extern "C" fd_status cuda_rmsnorm_fwd(fd_ctx *ctx, const struct fd_rmsnorm_fwd_args *a) {
  return FD_BY_TYPE(a->x, fd_tensor_cols(a->x), forward, ctx, a);
}

extern "C" fd_status cuda_rmsnorm_bwd(fd_ctx *ctx, const struct fd_rmsnorm_bwd_args *a) {
  return FD_BY_TYPE(a->x, fd_tensor_cols(a->x), backward, ctx, a);
}
