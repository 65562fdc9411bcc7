// SPDX-License-Identifier: Apache-2.0
// GroupNorm over NHWC, with SiLU behind it. Forward 3 passes (statistics, then value), backward 5: memory bound, at least 70 % of the bandwidth
// expected. A block owns a group of one picture.
#include "cuda/device.cuh"

namespace {

enum { BLOCK = 256 };

struct group {
  int64_t HW, C, per; /* channels of a group */
  int groups;
};

__device__ __forceinline__ int64_t element(const group &g, int64_t b, int64_t first, int64_t i) {
  return (b * g.HW + i / g.per) * g.C + first + i % g.per;
}

template <class T>
__global__ void __launch_bounds__(BLOCK)
    groupnorm_forward(const T *x, const void *w, int w_bf16, const void *bias, int b_bf16, T *y, float *stats, group g, float eps, int act) {
  __shared__ float slots[32];
  const int64_t b = blockIdx.x / g.groups, first = blockIdx.x % g.groups * g.per, n = g.HW * g.per;
  float sum = 0, squares = 0;
  for (int64_t i = threadIdx.x; i < n; i += BLOCK) sum += fd::load(x + element(g, b, first, i));
  const float mean = fd::block_sum(sum, slots) / (float)n;
  for (int64_t i = threadIdx.x; i < n; i += BLOCK) { /* a second pass: no cancellation */
    const float d = fd::load(x + element(g, b, first, i)) - mean;
    squares = fmaf(d, d, squares);
  }
  const float r = rsqrtf(fd::block_sum(squares, slots) / (float)n + eps);
  if (threadIdx.x == 0) stats[2 * blockIdx.x] = mean, stats[2 * blockIdx.x + 1] = r;
  for (int64_t i = threadIdx.x; i < n; i += BLOCK) {
    const int64_t at = element(g, b, first, i), c = first + i % g.per;
    fd::store(y + at, fd::act_value(act, (fd::load(x + at) - mean) * r * fd::load_any(w, w_bf16, c) + fd::load_any(bias, b_bf16, c)));
  }
}

/* dx = r (h - mean(h) - n mean(h n)), h = dy act'(..) w, n = (x - mean) r */
template <class T>
__global__ void __launch_bounds__(BLOCK)
    groupnorm_backward(const T *dy, const T *x, const void *w, int w_bf16, const void *bias, int b_bf16, const float *stats, T *dx, bool acc, group g,
                       int act) {
  __shared__ float slots[32];
  const int64_t b = blockIdx.x / g.groups, first = blockIdx.x % g.groups * g.per, n = g.HW * g.per;
  const float mean = stats[2 * blockIdx.x], r = stats[2 * blockIdx.x + 1];
  float sum = 0, dot = 0;
  for (int64_t i = threadIdx.x; i < n; i += BLOCK) {
    const int64_t at = element(g, b, first, i), c = first + i % g.per;
    const float normal = (fd::load(x + at) - mean) * r, weight = fd::load_any(w, w_bf16, c);
    const float h = fd::load(dy + at) * fd::act_slope(act, normal * weight + fd::load_any(bias, b_bf16, c)) * weight;
    sum += h;
    dot = fmaf(h, normal, dot);
  }
  sum = fd::block_sum(sum, slots) / (float)n;
  dot = fd::block_sum(dot, slots) / (float)n;
  for (int64_t i = threadIdx.x; i < n; i += BLOCK) {
    const int64_t at = element(g, b, first, i), c = first + i % g.per;
    const float normal = (fd::load(x + at) - mean) * r, weight = fd::load_any(w, w_bf16, c);
    const float h = fd::load(dy + at) * fd::act_slope(act, normal * weight + fd::load_any(bias, b_bf16, c)) * weight;
    const float value = r * (h - sum - normal * dot);
    fd::store(dx + at, acc ? fd::load(dx + at) + value : value);
  }
}

/* dw, db of one channel: a block adds over all pictures and pixels. */
template <class T>
__global__ void __launch_bounds__(BLOCK)
    groupnorm_weights(const T *dy, const T *x, const void *w, int w_bf16, const void *bias, int b_bf16, const float *stats, float *dw, bool acc_w,
                      float *db, bool acc_b, int64_t B, group g, int act) {
  __shared__ float slots[32];
  const int64_t c = blockIdx.x, n = B * g.HW;
  const float weight = fd::load_any(w, w_bf16, c), shift = fd::load_any(bias, b_bf16, c);
  float s = 0, t = 0;
  for (int64_t i = threadIdx.x; i < n; i += BLOCK) {
    const float *stat = stats + 2 * (i / g.HW * g.groups + c / g.per);
    const float normal = (fd::load(x + i * g.C + c) - stat[0]) * stat[1];
    const float h = fd::load(dy + i * g.C + c) * fd::act_slope(act, normal * weight + shift);
    s = fmaf(h, normal, s);
    t += h;
  }
  s = fd::block_sum(s, slots);
  t = fd::block_sum(t, slots);
  if (threadIdx.x == 0) {
    if (dw) dw[c] = acc_w ? dw[c] + s : s;
    if (db) db[c] = acc_b ? db[c] + t : t;
  }
}

group group_of(const fd_tensor *x, int groups) {
  const int64_t C = fd_tensor_cols(x);
  return group{fd_tensor_rows(x) / x->shape[0], C, C / groups, groups};
}

template <class T> fd_status forward(fd_ctx *ctx, const struct fd_groupnorm_fwd_args *a) {
  if (fd_tensor_numel(a->x) == 0) return FD_OK;
  return FD_CUDA(FD_LAUNCH(groupnorm_forward<T>, (unsigned)(a->x->shape[0] * a->groups), BLOCK, 0, fd_cuda_stream(ctx), (const T *)a->x->data,
                           a->w->data, fd::is_bf16(a->w), a->b->data, fd::is_bf16(a->b), (T *)a->y->data, (float *)a->stats->data,
                           group_of(a->x, a->groups), a->eps, a->act));
}

template <class T> fd_status backward(fd_ctx *ctx, const struct fd_groupnorm_bwd_args *a) {
  if (fd_tensor_numel(a->x) == 0) { /* sums over nothing */
    fd_status none = FD_OK;
    if (a->dw && !(a->acc >> 6 & 1)) none = FD_CUDA(cudaMemsetAsync(a->dw->data, 0, fd_tensor_bytes(a->dw), fd_cuda_stream(ctx)));
    if (none == FD_OK && a->db && !(a->acc >> 7 & 1)) none = FD_CUDA(cudaMemsetAsync(a->db->data, 0, fd_tensor_bytes(a->db), fd_cuda_stream(ctx)));
    return none;
  }
  const group g = group_of(a->x, a->groups);
  cudaStream_t stream = fd_cuda_stream(ctx);
  fd_status st = FD_OK;
  if (a->dw || a->db)
    st = FD_CUDA(FD_LAUNCH(groupnorm_weights<T>, (unsigned)g.C, BLOCK, 0, stream, (const T *)a->dy->data, (const T *)a->x->data, a->w->data,
                           fd::is_bf16(a->w), a->b->data, fd::is_bf16(a->b), (const float *)a->stats->data, (float *)fd::data(a->dw),
                           (a->acc >> 6 & 1) != 0, (float *)fd::data(a->db), (a->acc >> 7 & 1) != 0, a->x->shape[0], g, a->act));
  if (st == FD_OK)
    st = FD_CUDA(FD_LAUNCH(groupnorm_backward<T>, (unsigned)(a->x->shape[0] * a->groups), BLOCK, 0, stream, (const T *)a->dy->data,
                           (const T *)a->x->data, a->w->data, fd::is_bf16(a->w), a->b->data, fd::is_bf16(a->b), (const float *)a->stats->data,
                           (T *)a->dx->data, (a->acc >> 5 & 1) != 0, g, a->act));
  return st;
}

}  // namespace

extern "C" fd_status cuda_groupnorm_fwd(fd_ctx *ctx, const struct fd_groupnorm_fwd_args *a) {
  return a->x->dtype == FD_BF16 ? forward<fd::bf16>(ctx, a) : forward<float>(ctx, a);
}

extern "C" fd_status cuda_groupnorm_bwd(fd_ctx *ctx, const struct fd_groupnorm_bwd_args *a) {
  return a->x->dtype == FD_BF16 ? backward<fd::bf16>(ctx, a) : backward<float>(ctx, a);
}
