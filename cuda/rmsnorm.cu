// SPDX-License-Identifier: Apache-2.0
// RMSNorm with modulation; memory bound. Forward: a warp reads a row once, holds it, writes y: 2 elements an element of x, 85 % of the bandwidth
// expected. Backward, rows of at most 2048 bf16 or 1024 f32: dy, x and dx in one kernel, 3 elements (4 if added to) and 6 % in partial sums, by 16
// warps on a multiprocessor that wait for each other: 70 %. Longer rows: dx by rows, 3 elements (4), and the sums by columns, 2 more: 80 %; so is
// dx alone, without the 2.
#include "cuda/device.cuh"

#include <type_traits>

namespace {

enum { WARPS = 4, BLOCK = 32 * WARPS };

struct columns { /* of mod; a missing vector has a null pointer */
  const void *mod;
  int mod_bf16;
  int64_t S, rows_per_mod, shift_col, scale_col;
};

/* `width` lanes handle a row: lane l has vectors l, l + width, .. of V elements. With N > 0 there are at most N of them, and what is used twice stays
 * in registers; with N = 0 it is read again. */
#define FD_ROW(i, d)                                                                  \
  _Pragma("unroll") for (int i = 0; N > 0 ? i < N : V * (lane + width * (int64_t)i) < D; i++) \
    if (const int64_t d = V * (lane + width * (int64_t)i); d < D)

template <class T, int V, int N> struct held {
  typename fd::raw<T, V>::type v[N > 0 ? N : 1];
  __device__ __forceinline__ fd::pack<V> read(const T *p, int i, int64_t d) {
    const typename fd::raw<T, V>::type r = fd::load_raw<V>(p + d);
    if (N > 0) v[i] = r;
    return fd::unpack(r);
  }
  __device__ __forceinline__ fd::pack<V> again(const T *p, int i, int64_t d) const {
    return N > 0 ? fd::unpack(v[i]) : fd::load_pack<V>(p + d);
  }
};

/* (1 + w)(1 + scale) */
template <int V> __device__ __forceinline__ fd::pack<V> factor(const void *w, int w_bf16, const columns &c, int64_t sample, int64_t d) {
  fd::pack<V> f = fd::load_pack_any<V>(w, w_bf16, d);
  for (int k = 0; k < V; k++) f.f[k] += 1.0f;
  if (c.mod && c.scale_col >= 0) {
    const fd::pack<V> s = fd::load_pack_any<V>(c.mod, c.mod_bf16, sample * c.S + c.scale_col + d);
    for (int k = 0; k < V; k++) f.f[k] *= 1.0f + s.f[k];
  }
  return f;
}

template <class T, class Y, int V, int N>
__global__ void __launch_bounds__(BLOCK)
    rmsnorm_forward(const T *x, const void *w, int w_bf16, columns c, Y *y, float *rstd, const int *count, int64_t rows, int64_t D, float eps) {
  const int width = 32, lane = threadIdx.x % width; /* a warp a row */
  const int64_t row = (int64_t)blockIdx.x * WARPS + threadIdx.x / 32;
  if (row >= fd::rows_in_use(count, rows)) return; /* the whole warp */
  const int64_t sample = c.mod ? row / c.rows_per_mod : 0;
  held<T, V, N> keep;
  x += row * D, y += row * D;
  float sum = 0;
  FD_ROW(i, d) {
    const fd::pack<V> v = keep.read(x, i, d);
    for (int k = 0; k < V; k++) sum = fmaf(v.f[k], v.f[k], sum);
  }
  const float r = rsqrtf(fd::warp_sum(sum) / (float)D + eps);
  FD_ROW(i, d) {
    fd::pack<V> v = keep.again(x, i, d);
    const fd::pack<V> f = factor<V>(w, w_bf16, c, sample, d);
    const fd::pack<V> shift = c.mod && c.shift_col >= 0 ? fd::load_pack_any<V>(c.mod, c.mod_bf16, sample * c.S + c.shift_col + d) : fd::same<V>(0.0f);
    for (int k = 0; k < V; k++) v.f[k] = fmaf(v.f[k] * r, f.f[k], shift.f[k]);
    fd::store_pack<V>(y + d, v);
  }
  if (lane == 0 && rstd) rstd[row] = r;
}

/* dx = r (g - n mean(g n)), g = dy (1 + w)(1 + scale), n = x r */
template <class T, int V, int N>
__global__ void __launch_bounds__(BLOCK)
    rmsnorm_rows(const T *dy, const T *x, const void *w, int w_bf16, const float *rstd, columns c, T *dx, bool acc, const int *count,
                 int64_t rows, int64_t D) {
  const int width = 32, lane = threadIdx.x % width; /* a warp a row */
  const int64_t row = (int64_t)blockIdx.x * WARPS + threadIdx.x / 32;
  if (row >= fd::rows_in_use(count, rows)) return;
  const int64_t sample = c.mod ? row / c.rows_per_mod : 0;
  held<T, V, N> keep_x, keep_dy;
  x += row * D, dy += row * D, dx += row * D;
  const float r = rstd[row];
  float dot = 0;
  FD_ROW(i, d) {
    const fd::pack<V> v = keep_x.read(x, i, d), g = keep_dy.read(dy, i, d), f = factor<V>(w, w_bf16, c, sample, d);
    for (int k = 0; k < V; k++) dot = fmaf(g.f[k] * f.f[k], v.f[k], dot);
  }
  dot = fd::warp_sum(dot) * r * r / (float)D;
  FD_ROW(i, d) {
    const fd::pack<V> v = keep_x.again(x, i, d), g = keep_dy.again(dy, i, d), f = factor<V>(w, w_bf16, c, sample, d);
    fd::pack<V> o = acc ? fd::load_pack<V>(dx + d) : fd::same<V>(0.0f);
    for (int k = 0; k < V; k++) o.f[k] += fmaf(g.f[k] * f.f[k], r, -(v.f[k] * r * dot));
    fd::store_pack<V>(dx + d, o);
  }
}

/* Sums over rows of one group (a sample, or a chunk of rows where there is no modulation), split: s = sum dy n and t = sum dy, each
 * [groups, splits, D]. */
template <class T, int V>
__global__ void __launch_bounds__(fd::TILE)
    rmsnorm_tiles(const T *dy, const T *x, const float *rstd, float *s_part, float *t_part, const int *count, int64_t rows, int64_t per_group,
                  int64_t splits, int64_t per_split, int64_t D, int lanes) {
  __shared__ float slots[V * fd::TILE];
  const int64_t group = blockIdx.x / splits, split = blockIdx.x % splits, d = V * ((int64_t)blockIdx.y * lanes + threadIdx.x % lanes);
  const int64_t first = group * per_group + split * per_split;
  const int64_t last = min(min(first + per_split, (group + 1) * per_group), fd::rows_in_use(count, rows));
  fd::pack<V> s = fd::same<V>(0.0f), t = fd::same<V>(0.0f);
  if (d < D) {
#pragma unroll 4
    for (int64_t row = first + threadIdx.x / lanes; row < last; row += fd::TILE / lanes) {
      const fd::pack<V> g = fd::load_pack<V>(dy + row * D + d), v = fd::load_pack<V>(x + row * D + d);
      const float r = rstd[row];
      for (int k = 0; k < V; k++) s.f[k] = fmaf(g.f[k], v.f[k] * r, s.f[k]), t.f[k] += g.f[k];
    }
  }
  s = fd::tile_sum<V>(s, lanes, slots);
  if (t_part) t = fd::tile_sum<V>(t, lanes, slots);
  if ((int)threadIdx.x >= lanes || d >= D) return;
  fd::store_pack<V>(s_part + blockIdx.x * D + d, s);
  if (t_part) fd::store_pack<V>(t_part + blockIdx.x * D + d, t);
}

/* Both at once, for rows that fit in the registers of four warps: dx, and the block's s and t, a column of each by the lane that has it in every
 * row. */
enum { LANES = 128, HELD = 2 };
template <class T, int V>
__global__ void __launch_bounds__(fd::TILE, 2)
    rmsnorm_backward(const T *dy, const T *x, const void *w, int w_bf16, const float *rstd, columns c, T *dx, bool acc, float *s_part, float *t_part,
                     const int *count, int64_t rows, int64_t per_group, int64_t splits, int64_t per_split, int64_t D) {
  enum { N = HELD };
  static_assert(N * LANES == fd::TILE, "a block's factors fill slots");
  __shared__ __align__(16) float slots[V * fd::TILE]; /* (1 + w)(1 + scale) of the block's columns; behind the rows, the sums */
  __shared__ float dots[2][fd::TILE / 32];            /* two, so that one barrier a row is enough */
  const int width = LANES, lane = threadIdx.x % width, slot = threadIdx.x / width;
  const int64_t group = blockIdx.x / splits, first = group * per_group + blockIdx.x % splits * per_split;
  const int64_t last = min(min(first + per_split, (group + 1) * per_group), fd::rows_in_use(count, rows));
  fd::pack<V> s[N], t[N];
#pragma unroll
  for (int i = 0; i < N; i++) s[i] = t[i] = fd::same<V>(0.0f);
  if (slot == 0) FD_ROW(i, d) {
      const fd::pack<V> f = factor<V>(w, w_bf16, c, group, d);
      for (int k = 0; k < V; k += 4) *(float4 *)(slots + ((i * V + k) / 4 * LANES + lane) * 4) = make_float4(f.f[k], f.f[k + 1], f.f[k + 2], f.f[k + 3]);
    }
  __syncthreads();
  const auto kept = [&](int i) {
    fd::pack<V> f;
    for (int k = 0; k < V; k += 4) {
      const float4 q = *(const float4 *)(slots + ((i * V + k) / 4 * LANES + lane) * 4);
      f.f[k] = q.x, f.f[k + 1] = q.y, f.f[k + 2] = q.z, f.f[k + 3] = q.w;
    }
    return f;
  };
  int turn = 0;
  for (int64_t base = first; base < last; base += fd::TILE / width, turn ^= 1) { /* the same for the whole block */
    const int64_t row = base + slot;
    const bool live = row < last;
    const float r = live ? rstd[row] : 0.0f;
    held<T, V, N> keep_x, keep_dy, keep_dx;
    float dot = 0;
    if (live) FD_ROW(i, d) {
        keep_x.read(x + row * D, i, d);
        keep_dy.read(dy + row * D, i, d);
        if (acc) keep_dx.read(dx + row * D, i, d);
      }
    if (live) FD_ROW(i, d) {
        const fd::pack<V> v = fd::unpack(keep_x.v[i]), g = fd::unpack(keep_dy.v[i]), f = kept(i);
        for (int k = 0; k < V; k++) {
          s[i].f[k] = fmaf(g.f[k], v.f[k] * r, s[i].f[k]);
          t[i].f[k] += g.f[k];
          dot = fmaf(g.f[k] * f.f[k], v.f[k], dot);
        }
      }
    dot = fd::warp_sum(dot);
    if (threadIdx.x % 32 == 0) dots[turn][threadIdx.x / 32] = dot;
    __syncthreads();
    dot = 0;
    for (int k = 0; k < LANES / 32; k++) dot += dots[turn][slot * (LANES / 32) + k];
    dot *= r * r / (float)D;
    if (live) FD_ROW(i, d) {
        const fd::pack<V> v = fd::unpack(keep_x.v[i]), g = fd::unpack(keep_dy.v[i]), f = kept(i);
        fd::pack<V> o = acc ? fd::unpack(keep_dx.v[i]) : fd::same<V>(0.0f);
        for (int k = 0; k < V; k++) o.f[k] += fmaf(g.f[k] * f.f[k], r, -(v.f[k] * r * dot));
        fd::store_pack<V>(dx + row * D + d, o);
      }
  }
#pragma unroll
  for (int i = 0; i < N; i++) {
    const int64_t d = V * (lane + width * (int64_t)i);
    s[i] = fd::tile_sum<V>(s[i], width, slots);
    if (t_part) t[i] = fd::tile_sum<V>(t[i], width, slots);
    if (slot > 0 || d >= D) continue;
    fd::store_pack<V>(s_part + blockIdx.x * D + d, s[i]);
    if (t_part) fd::store_pack<V>(t_part + blockIdx.x * D + d, t[i]);
  }
}

/* With modulation: dshift = t, dscale = (1 + w) s, and the sample's part of dw, (1 + scale) s. */
__global__ void __launch_bounds__(BLOCK)
    rmsnorm_dmod(const float *s_part, const float *t_part, const void *w, int w_bf16, columns c, void *dmod, int dmod_bf16, float *dw_part,
                 int64_t splits, int64_t D) {
  const int64_t d = (int64_t)blockIdx.y * BLOCK + threadIdx.x, sample = blockIdx.x;
  if (d >= D) return;
  float s = 0, t = 0;
  for (int64_t k = sample * splits; k < (sample + 1) * splits; k++) s += s_part[k * D + d], t += t_part[k * D + d];
  const int64_t scale = sample * c.S + c.scale_col + d, shift = sample * c.S + c.shift_col + d;
  if (dw_part) dw_part[sample * D + d] = c.scale_col >= 0 ? s * (1.0f + fd::load_any(c.mod, c.mod_bf16, scale)) : s;
  if (dmod && c.scale_col >= 0)
    fd::store_any(dmod, dmod_bf16, scale, fd::load_any(dmod, dmod_bf16, scale) + s * (1.0f + fd::load_any(w, w_bf16, d)));
  if (dmod && c.shift_col >= 0) fd::store_any(dmod, dmod_bf16, shift, fd::load_any(dmod, dmod_bf16, shift) + t);
}

columns columns_of(const fd_tensor *mod, int64_t rows_per_mod, int64_t shift_col, int64_t scale_col) {
  return columns{fd::data(mod), fd::is_bf16(mod), mod ? fd_tensor_cols(mod) : 0, rows_per_mod, shift_col, scale_col};
}

/* rmsnorm_backward can hold rows of this length. */
template <class T> bool fits(int64_t D) { return D % fd::wide<T>::V == 0 && D <= LANES * HELD * fd::wide<T>::V; }

/* The rows of one sum, by shape only. rmsnorm_backward's blocks have all columns: more of them, of fewer rows. */
fd::groups groups_of(const struct fd_rmsnorm_bwd_args *a) {
  const int64_t rows = fd_tensor_rows(a->x), D = fd_tensor_cols(a->x);
  const bool whole = a->x->dtype == FD_BF16 ? fits<fd::bf16>(D) : fits<float>(D);
  if (a->mod) return whole ? fd::groups_of(rows, a->rows_per_mod, 512, 16) : fd::groups_of(rows, a->rows_per_mod, D, 64);
  const int64_t per = whole ? fd::chunk_rows(rows, 1024, 32) : fd::chunk_rows(rows, D, 64);
  return fd::groups{(rows + per - 1) / per, 1, per};
}

/* Calls f with N for rows of D. */
template <class T, int V, class F> fd_status by_length(int64_t D, F f) {
  if constexpr (V > 1) {
    if (D <= 32 * V * 8) return f(std::integral_constant<int, 8>());
    if (D <= 32 * V * 16) return f(std::integral_constant<int, 16>());
  }
  return f(std::integral_constant<int, 0>());
}

template <class T, class Y, int V> fd_status forward_to(fd_ctx *ctx, const struct fd_rmsnorm_fwd_args *a) {
  const int64_t rows = fd_tensor_rows(a->x), D = fd_tensor_cols(a->x);
  if (rows == 0) return FD_OK;
  return by_length<T, V>(D, [=](auto n) {
    return FD_CUDA(FD_LAUNCH((rmsnorm_forward<T, Y, V, decltype(n)::value>), fd::blocks(rows, WARPS), BLOCK, 0, fd_cuda_stream(ctx),
                             (const T *)a->x->data, a->w->data, fd::is_bf16(a->w), columns_of(a->mod, a->rows_per_mod, a->shift_col, a->scale_col),
                             (Y *)a->y->data, (float *)fd::data(a->rstd), fd::count_of(a->count), rows, D, a->eps));
  });
}

template <class T, int V> fd_status forward(fd_ctx *ctx, const struct fd_rmsnorm_fwd_args *a) {
  return a->y->dtype == FD_BF16 ? forward_to<T, fd::bf16, V>(ctx, a) : forward_to<T, T, V>(ctx, a);
}

template <class T, int V> fd_status backward(fd_ctx *ctx, const struct fd_rmsnorm_bwd_args *a) {
  const int64_t rows = fd_tensor_rows(a->x), D = fd_tensor_cols(a->x);
  const columns c = columns_of(a->mod, a->rows_per_mod, a->shift_col, a->scale_col);
  const fd::groups g = groups_of(a);
  const int lanes = fd::tile_lanes(D / V);
  const int64_t parts = g.n * g.splits * D;
  float *s_part = (float *)ctx->scratch, *t_part = a->mod ? s_part + parts : NULL, *dw_part = a->mod ? t_part + parts : s_part;
  cudaStream_t stream = fd_cuda_stream(ctx);
  const int64_t per_group = a->mod ? a->rows_per_mod : g.per_split;
  const bool sums = a->dw || a->dmod, whole = V > 1 && sums && fits<T>(D), acc = (a->acc >> 6 & 1) != 0;
  const T *dy = (const T *)a->dy->data, *x = (const T *)a->x->data;
  const float *rstd = (const float *)a->rstd->data;
  fd_status st = FD_OK;
  if constexpr (V > 1)
    if (rows > 0 && whole)
      st = FD_CUDA(FD_LAUNCH((rmsnorm_backward<T, V>), (unsigned)(g.n * g.splits), fd::TILE, 0, stream, dy, x, a->w->data, fd::is_bf16(a->w), rstd,
                             c, (T *)a->dx->data, acc, s_part, t_part, fd::count_of(a->count), rows, per_group, g.splits, g.per_split, D));
  if (rows > 0 && sums && !whole)
    st = FD_CUDA(FD_LAUNCH((rmsnorm_tiles<T, V>), dim3((unsigned)(g.n * g.splits), fd::blocks(D, V * lanes)), fd::TILE, 0, stream, dy, x, rstd,
                           s_part, t_part, fd::count_of(a->count), rows, per_group, g.splits, g.per_split, D, lanes));
  if (st == FD_OK && rows > 0 && a->mod && sums)
    st = FD_CUDA(FD_LAUNCH(rmsnorm_dmod, dim3((unsigned)g.n, fd::blocks(D, BLOCK)), BLOCK, 0, stream, (const float *)s_part, (const float *)t_part,
                           a->w->data, fd::is_bf16(a->w), c, (void *)fd::data(a->dmod), fd::is_bf16(a->dmod), a->dw ? dw_part : NULL, g.splits, D));
  if (st == FD_OK && a->dw)
    st = FD_CUDA((fd::sum_columns<float, 1>(ctx, dw_part, (float *)a->dw->data, (a->acc >> 7 & 1) != 0, NULL, g.n, g.n, D)));
  if (st == FD_OK && rows > 0 && !whole) /* last, since dx may alias dy */
    st = by_length<T, V>(D, [=](auto n) {
      return FD_CUDA(FD_LAUNCH((rmsnorm_rows<T, V, decltype(n)::value>), fd::blocks(rows, WARPS), BLOCK, 0, stream, dy, x, a->w->data,
                               fd::is_bf16(a->w), rstd, c, (T *)a->dx->data, acc, fd::count_of(a->count), rows, D));
    });
  return st;
}

/* What must be a multiple of V for wide access. */
template <class A> int64_t lengths(const A *a) {
  const int64_t cols = fd_tensor_cols(a->x);
  if (!a->mod) return cols;
  return cols | fd_tensor_cols(a->mod) | (a->shift_col > 0 ? a->shift_col : 0) | (a->scale_col > 0 ? a->scale_col : 0);
}

}  // namespace

extern "C" size_t cuda_rmsnorm_bwd_scratch(const struct fd_rmsnorm_bwd_args *a) {
  const fd::groups g = groups_of(a);
  if (!a->dw && !a->dmod) return 0;
  return (size_t)((a->mod ? 2 * g.n * g.splits + g.n : g.n) * fd_tensor_cols(a->x)) * sizeof(float);
}

extern "C" fd_status cuda_rmsnorm_fwd(fd_ctx *ctx, const struct fd_rmsnorm_fwd_args *a) {
  return FD_BY_TYPE(FD_OP_rmsnorm_fwd, a, a->x, lengths(a), forward, ctx, a);
}

extern "C" fd_status cuda_rmsnorm_bwd(fd_ctx *ctx, const struct fd_rmsnorm_bwd_args *a) {
  return FD_BY_TYPE(FD_OP_rmsnorm_bwd, a, a->x, lengths(a), backward, ctx, a);
}
