// SPDX-License-Identifier: Apache-2.0
// GroupNorm over NHWC, with SiLU behind it. Partial sums by channel over tiles of all channels, then by group, then an elementwise pass.
// Forward moves 3 elements an element of x (x twice, y), backward 5 (dy and x twice, dx), and 2 to 4 % of that in partial sums: memory bound, 80 % of
// the bandwidth expected forward. Backward, in bf16 with SiLU, its first pass takes about 45 instructions an element of the 34 that fit: 70 %.
#include "cuda/device.cuh"

namespace {

enum { BLOCK = 128, ROWS = 256 /* pixels of a tile */ };

struct shape {
  int64_t B, HW, C, per, tiles; /* per: channels of a group; tiles of a picture */
  int groups, lanes;
};

/* Where a thread works: picture, its vector of channels, its rows. Grid: pictures x tiles, blocks of channels. */
struct place {
  int64_t b, d, first, last, step;
};
template <int V> __device__ __forceinline__ place place_of(const shape &g, bool backwards = false) {
  const unsigned tile = backwards ? gridDim.x - 1 - blockIdx.x : blockIdx.x;
  const int64_t b = tile / g.tiles, row = tile % g.tiles * ROWS;
  return place{b, V * ((int64_t)blockIdx.y * g.lanes + threadIdx.x % g.lanes), b * g.HW + row + threadIdx.x / g.lanes,
               b * g.HW + min(row + ROWS, g.HW), fd::TILE / g.lanes};
}

/* What the channels of one vector share with their groups: n = (x - mean) r, u = n w + b. */
template <int V> struct channels {
  float mean[V], r[V], w[V], b[V];
};
template <int V>
__device__ __forceinline__ channels<V> channels_of(const shape &g, const place &p, const void *w, int w_bf16, const void *bias, int b_bf16,
                                                   const float *stats) {
  channels<V> c;
  const fd::pack<V> pw = fd::load_pack_any<V>(w, w_bf16, p.d), pb = fd::load_pack_any<V>(bias, b_bf16, p.d);
  for (int k = 0; k < V; k++) {
    const float *stat = stats + 2 * (p.b * g.groups + (p.d + k) / g.per);
    c.mean[k] = stat[0], c.r[k] = stat[1], c.w[k] = pw.f[k], c.b[k] = pb.f[k];
  }
  return c;
}

/* ---- forward ---- */

/* Mean and sum of squared deviations of each channel in a tile: part [B, tiles, 2, C]. Both are sums of differences to the tile's first pixel, so
 * nothing cancels where the mean is large. */
template <class T, int V> __global__ void __launch_bounds__(fd::TILE) groupnorm_moments(const T *x, float *part, shape g) {
  __shared__ float slots[V * fd::TILE];
  const place p = place_of<V>(g);
  const int64_t top = p.first - threadIdx.x / g.lanes;
  fd::pack<V> origin = fd::same<V>(0.0f), sum = origin, squares = origin;
  if (p.d < g.C) {
    origin = fd::load_pack<V>(x + top * g.C + p.d);
#pragma unroll 4
    for (int64_t row = p.first; row < p.last; row += p.step) {
      const fd::pack<V> v = fd::load_pack<V>(x + row * g.C + p.d);
      for (int k = 0; k < V; k++) {
        const float e = v.f[k] - origin.f[k];
        sum.f[k] += e;
        squares.f[k] = fmaf(e, e, squares.f[k]);
      }
    }
  }
  sum = fd::tile_sum<V>(sum, g.lanes, slots);
  squares = fd::tile_sum<V>(squares, g.lanes, slots);
  if ((int)threadIdx.x >= g.lanes || p.d >= g.C) return;
  const float n = (float)(p.last - top);
  for (int k = 0; k < V; k++) {
    const float e = sum.f[k] / n;
    sum.f[k] = origin.f[k] + e;
    squares.f[k] = fmaxf(0.0f, fmaf(-e * n, e, squares.f[k]));
  }
  float *to = part + (int64_t)blockIdx.x * 2 * g.C + p.d;
  fd::store_pack<V>(to, sum);
  fd::store_pack<V>(to + g.C, squares);
}

/* A block joins the channels and tiles of one group of one picture: the mean first, then deviations from it (Chan et al. 1979). */
__global__ void __launch_bounds__(BLOCK) groupnorm_statistics(const float *part, float *stats, shape g, float eps) {
  __shared__ float slots[32];
  const int64_t b = blockIdx.x / g.groups, first = blockIdx.x % g.groups * g.per, items = g.tiles * g.per;
  const float n = (float)g.HW * (float)g.per;
  float sum = 0, squares = 0;
  for (int64_t i = threadIdx.x; i < items; i += BLOCK) {
    const int64_t tile = i / g.per;
    sum = fmaf((float)min((int64_t)ROWS, g.HW - tile * ROWS), part[(b * g.tiles + tile) * 2 * g.C + first + i % g.per], sum);
  }
  const float mean = fd::block_sum(sum, slots) / n;
  for (int64_t i = threadIdx.x; i < items; i += BLOCK) {
    const int64_t tile = i / g.per;
    const float *at = part + (b * g.tiles + tile) * 2 * g.C + first + i % g.per, e = at[0] - mean;
    squares += fmaf((float)min((int64_t)ROWS, g.HW - tile * ROWS) * e, e, at[g.C]);
  }
  const float var = fd::block_sum(squares, slots) / n;
  if (threadIdx.x == 0) stats[2 * blockIdx.x] = mean, stats[2 * blockIdx.x + 1] = rsqrtf(var + eps);
}

template <class T, int V, int ACT>
__global__ void __launch_bounds__(fd::TILE, 4)
    groupnorm_apply(const T *__restrict__ x, const void *w, int w_bf16, const void *bias, int b_bf16, const float *stats, T *__restrict__ y, shape g) {
  const place p = place_of<V>(g, true); /* last tiles first: the pass before left them in the L2 cache */
  if (p.d >= g.C) return;
  const channels<V> c = channels_of<V>(g, p, w, w_bf16, bias, b_bf16, stats);
  fd::pack<V> scale;
  for (int k = 0; k < V; k++) scale.f[k] = c.r[k] * c.w[k];
  for (int64_t row = p.first; row < p.last; row += 2 * p.step) { /* two loads on their way at once */
    const bool second = row + p.step < p.last;
    const int64_t at = row * g.C + p.d, next = second ? at + p.step * g.C : at;
    fd::pack<V> v[2] = {fd::load_pack<V>(x + at), fd::load_pack<V>(x + next)};
#pragma unroll
    for (int j = 0; j < 2; j++)
#pragma unroll
      for (int k = 0; k < V; k++) v[j].f[k] = fd::act_value<T>(ACT, fmaf(v[j].f[k] - c.mean[k], scale.f[k], c.b[k]));
    fd::store_pack<V>(y + at, v[0]);
    if (second) fd::store_pack<V>(y + next, v[1]);
  }
}

/* ---- backward: dx = r (w h - mean(w h) - n mean(w h n)), h = dy act'(u) ---- */

/* s = sum h n and t = sum h of each channel in a tile: part [B, tiles, 2, C]. */
template <class T, int V>
__global__ void __launch_bounds__(fd::TILE)
    groupnorm_sums(const T *dy, const T *x, const void *w, int w_bf16, const void *bias, int b_bf16, const float *stats, float *part, shape g,
                   int act) {
  __shared__ float slots[V * fd::TILE];
  const place p = place_of<V>(g);
  fd::pack<V> s = fd::same<V>(0.0f), t = s;
  if (p.d < g.C) {
    const channels<V> c = channels_of<V>(g, p, w, w_bf16, bias, b_bf16, stats);
#pragma unroll 2
    for (int64_t row = p.first; row < p.last; row += p.step) {
      const fd::pack<V> v = fd::load_pack<V>(x + row * g.C + p.d), d = fd::load_pack<V>(dy + row * g.C + p.d);
      for (int k = 0; k < V; k++) {
        const float n = (v.f[k] - c.mean[k]) * c.r[k], h = d.f[k] * fd::act_slope<T>(act, fmaf(n, c.w[k], c.b[k]));
        s.f[k] = fmaf(h, n, s.f[k]);
        t.f[k] += h;
      }
    }
  }
  s = fd::tile_sum<V>(s, g.lanes, slots);
  t = fd::tile_sum<V>(t, g.lanes, slots);
  if ((int)threadIdx.x >= g.lanes || p.d >= g.C) return;
  float *to = part + (int64_t)blockIdx.x * 2 * g.C + p.d;
  fd::store_pack<V>(to, s);
  fd::store_pack<V>(to + g.C, t);
}

/* From the pictures' channel sums [B, 2, C]: mean(w h) and mean(w h n) of each group, a thread each. */
__global__ void __launch_bounds__(BLOCK) groupnorm_means(const float *sums, const void *w, int w_bf16, float *means, shape g) {
  const int64_t i = (int64_t)blockIdx.x * BLOCK + threadIdx.x, b = i / g.groups, first = i % g.groups * g.per;
  if (i >= g.B * g.groups) return;
  float sum = 0, dot = 0;
  for (int64_t c = first; c < first + g.per; c++) {
    const float weight = fd::load_any(w, w_bf16, c);
    dot = fmaf(weight, sums[b * 2 * g.C + c], dot);
    sum = fmaf(weight, sums[(b * 2 + 1) * g.C + c], sum);
  }
  const float n = (float)g.HW * (float)g.per;
  means[2 * i] = sum / n, means[2 * i + 1] = dot / n;
}

/* dw and db: the pictures' sums, in order. */
__global__ void __launch_bounds__(BLOCK) groupnorm_weights(const float *sums, float *dw, bool acc_w, float *db, bool acc_b, shape g) {
  const int64_t c = (int64_t)blockIdx.x * BLOCK + threadIdx.x;
  if (c >= g.C) return;
  float s = dw && acc_w ? dw[c] : 0.0f, t = db && acc_b ? db[c] : 0.0f;
  for (int64_t b = 0; b < g.B; b++) s += sums[b * 2 * g.C + c], t += sums[(b * 2 + 1) * g.C + c];
  if (dw) dw[c] = s;
  if (db) db[c] = t;
}

template <class T, int V>
__global__ void __launch_bounds__(fd::TILE)
    groupnorm_dx(const T *__restrict__ dy, const T *__restrict__ x, const void *w, int w_bf16, const void *bias, int b_bf16, const float *stats,
                 const float *means, T *__restrict__ dx, bool acc, shape g, int act) {
  const place p = place_of<V>(g);
  if (p.d >= g.C) return;
  const channels<V> c = channels_of<V>(g, p, w, w_bf16, bias, b_bf16, stats);
  fd::pack<V> sum, dot;
  for (int k = 0; k < V; k++) {
    const float *mean = means + 2 * (p.b * g.groups + (p.d + k) / g.per);
    sum.f[k] = mean[0], dot.f[k] = mean[1];
  }
  for (int64_t row = p.first; row < p.last; row += p.step) {
    const fd::pack<V> v = fd::load_pack<V>(x + row * g.C + p.d), d = fd::load_pack<V>(dy + row * g.C + p.d);
    fd::pack<V> out = acc ? fd::load_pack<V>(dx + row * g.C + p.d) : fd::same<V>(0.0f);
    for (int k = 0; k < V; k++) {
      const float n = (v.f[k] - c.mean[k]) * c.r[k], h = d.f[k] * fd::act_slope<T>(act, fmaf(n, c.w[k], c.b[k])) * c.w[k];
      out.f[k] += c.r[k] * (h - sum.f[k] - n * dot.f[k]);
    }
    fd::store_pack<V>(dx + row * g.C + p.d, out);
  }
}

/* ---- host ---- */

shape shape_of(const fd_tensor *x, int groups, int V) {
  const int64_t C = fd_tensor_cols(x), HW = x->shape[0] ? fd_tensor_rows(x) / x->shape[0] : 0;
  return shape{x->shape[0], HW, C, C / groups, (HW + ROWS - 1) / ROWS, groups, fd::tile_lanes(C / V)};
}
dim3 grid_of(const shape &g, int V) { return dim3((unsigned)(g.B * g.tiles), fd::blocks(g.C, V * g.lanes)); }

template <class T, int V> fd_status forward(fd_ctx *ctx, const struct fd_groupnorm_fwd_args *a) {
  if (fd_tensor_numel(a->x) == 0) return FD_OK;
  const shape g = shape_of(a->x, a->groups, V);
  const T *x = (const T *)a->x->data;
  float *part = (float *)ctx->scratch, *stats = (float *)a->stats->data;
  cudaStream_t stream = fd_cuda_stream(ctx);
  fd_status st = FD_CUDA(FD_LAUNCH((groupnorm_moments<T, V>), grid_of(g, V), fd::TILE, 0, stream, x, part, g));
  if (st == FD_OK)
    st = FD_CUDA(FD_LAUNCH(groupnorm_statistics, (unsigned)(g.B * g.groups), BLOCK, 0, stream, (const float *)part, stats, g, a->eps));
  if (st == FD_OK)
    st = FD_CUDA(FD_LAUNCH((a->act == FD_ACT_SILU ? groupnorm_apply<T, V, FD_ACT_SILU> : groupnorm_apply<T, V, FD_ACT_NONE>), grid_of(g, V), fd::TILE,
                           0, stream, x, a->w->data, fd::is_bf16(a->w), a->b->data, fd::is_bf16(a->b), (const float *)stats, (T *)a->y->data, g));
  return st;
}

template <class T, int V> fd_status backward(fd_ctx *ctx, const struct fd_groupnorm_bwd_args *a) {
  const shape g = shape_of(a->x, a->groups, V);
  const T *x = (const T *)a->x->data, *dy = (const T *)a->dy->data;
  const float *stats = (const float *)a->stats->data;
  const int w_bf16 = fd::is_bf16(a->w), b_bf16 = fd::is_bf16(a->b);
  const bool some = fd_tensor_numel(a->x) > 0;
  float *part = (float *)ctx->scratch, *sums = part + g.B * g.tiles * 2 * g.C, *means = sums + g.B * 2 * g.C;
  cudaStream_t stream = fd_cuda_stream(ctx);
  fd_status st = FD_OK;
  if (some)
    st = FD_CUDA(FD_LAUNCH((groupnorm_sums<T, V>), grid_of(g, V), fd::TILE, 0, stream, dy, x, a->w->data, w_bf16, a->b->data, b_bf16, stats, part, g,
                           a->act));
  if (st == FD_OK && some) st = FD_CUDA((fd::sum_columns<float, 1>(ctx, part, sums, false, NULL, g.B * g.tiles, g.tiles, 2 * g.C)));
  if (st == FD_OK && (a->dw || a->db)) {
    shape pictures = g;
    if (!some) pictures.B = 0; /* sums over nothing */
    st = FD_CUDA(FD_LAUNCH(groupnorm_weights, fd::blocks(g.C, BLOCK), BLOCK, 0, stream, (const float *)sums, (float *)fd::data(a->dw),
                           (a->acc >> 6 & 1) != 0, (float *)fd::data(a->db), (a->acc >> 7 & 1) != 0, pictures));
  }
  if (st == FD_OK && some)
    st = FD_CUDA(FD_LAUNCH(groupnorm_means, fd::blocks(g.B * g.groups, BLOCK), BLOCK, 0, stream, (const float *)sums, a->w->data, w_bf16, means, g));
  if (st == FD_OK && some)
    st = FD_CUDA(FD_LAUNCH((groupnorm_dx<T, V>), grid_of(g, V), fd::TILE, 0, stream, dy, x, a->w->data, w_bf16, a->b->data, b_bf16, stats,
                           (const float *)means, (T *)a->dx->data, (a->acc >> 5 & 1) != 0, g, a->act));
  return st;
}

}  // namespace

extern "C" size_t cuda_groupnorm_fwd_scratch(const struct fd_groupnorm_fwd_args *a) {
  const shape g = shape_of(a->x, a->groups, 1);
  return (size_t)(g.B * g.tiles * 2 * g.C) * sizeof(float);
}

extern "C" size_t cuda_groupnorm_bwd_scratch(const struct fd_groupnorm_bwd_args *a) {
  const shape g = shape_of(a->x, a->groups, 1);
  return (size_t)(g.B * g.tiles * 2 * g.C + g.B * 2 * g.C + g.B * g.groups * 2) * sizeof(float);
}

extern "C" fd_status cuda_groupnorm_fwd(fd_ctx *ctx, const struct fd_groupnorm_fwd_args *a) {
  return FD_BY_TYPE(FD_OP_groupnorm_fwd, a, a->x, fd_tensor_cols(a->x), forward, ctx, a);
}

extern "C" fd_status cuda_groupnorm_bwd(fd_ctx *ctx, const struct fd_groupnorm_bwd_args *a) {
  return FD_BY_TYPE(FD_OP_groupnorm_bwd, a, a->x, fd_tensor_cols(a->x), backward, ctx, a);
}
