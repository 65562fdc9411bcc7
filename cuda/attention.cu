// SPDX-License-Identifier: Apache-2.0
// Attention for any type, head width and ranges, without a matrix of scores in memory: a warp owns a row of queries (of keys, for dk and
// dv) and meets 32 rows of the other side at a time, one per lane. Deterministic.
// Bound by arithmetic of the plain cores and by L1: some 10 % of what tensor cores reach; it serves fp32 runs, text, and what no library does.
#include "cuda/attention.h"
#include "cuda/device.cuh"

namespace {

enum { WARPS = 4, BLOCK = 32 * WARPS, PER_LANE = 16 /* E <= 512 */ };

struct shape {
  int A, K, E;
  float scale, softcap;
  int causal;
  int64_t window;
  int64_t regular; /* rows of q per sequence, if lse is [S, A, regular]; 0: it is [Tq, A] */
};

struct range {
  int64_t q, nq, k, nk;
};

__device__ __forceinline__ range range_of(const int *ranges, int64_t s) {
  return range{ranges[4 * s], ranges[4 * s + 1], ranges[4 * s + 2], ranges[4 * s + 3]};
}

/* Where lse of query i of sequence s is. */
__device__ __forceinline__ int64_t lse_at(const shape &a, const range &r, int64_t s, int head, int64_t i) {
  return a.regular ? (s * a.A + head) * a.regular + i : (r.q + i) * a.A + head;
}

/* Keys [first, last) that query i may see. */
__device__ __forceinline__ int64_t first_key(const shape &a, int64_t i) { return a.window > 0 ? max((int64_t)0, i - a.window + 1) : 0; }
__device__ __forceinline__ int64_t last_key(const shape &a, const range &r, int64_t i) { return a.causal ? min(i + 1, r.nk) : r.nk; }

template <class T> __device__ __forceinline__ float dot_row(const float *mine, const T *row, int E) {
  float sum = 0;
  for (int e = 0; e < E; e++) sum = fmaf(mine[e], fd::load(row + e), sum);
  return sum;
}

__device__ __forceinline__ float warp_max(float v) {
  for (int i = 16; i > 0; i /= 2) v = fmaxf(v, __shfl_xor_sync(0xffffffffu, v, i));
  return v;
}

__device__ __forceinline__ float capped(const shape &a, float s) { return a.softcap > 0 ? a.softcap * tanhf(s / a.softcap) : s; }
/* d capped / d s, from the capped score */
__device__ __forceinline__ float cap_slope(const shape &a, float capped) {
  const float t = a.softcap > 0 ? capped / a.softcap : 0.0f;
  return 1.0f - t * t;
}

/* Grid: (tiles of WARPS rows, heads, sequences). Every warp of a block passes every barrier: none is used, only warps' own memory. */
template <class T>
__global__ void __launch_bounds__(BLOCK)
    attention_forward(const T *q, const T *k, const T *v, const int *ranges, T *o, float *lse, shape a) {
  FD_SMEM(float, shared);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, head = blockIdx.y, kv = head / (a.A / a.K);
  const range r = range_of(ranges, blockIdx.z);
  const int64_t i = (int64_t)blockIdx.x * WARPS + warp;
  if (i >= r.nq) return; /* the whole warp */
  float *mine = shared + warp * a.E;
  const int64_t row = (r.q + i) * a.A + head;
  for (int e = lane; e < a.E; e += 32) mine[e] = fd::load(q + row * a.E + e);
  __syncwarp();
  float top = -INFINITY, total = 0, out[PER_LANE] = {0};
  const int64_t first = first_key(a, i), last = last_key(a, r, i);
  for (int64_t j0 = first; j0 < last; j0 += 32) {
    const int64_t j = j0 + lane;
    const float s = j < last ? capped(a, a.scale * dot_row(mine, k + ((r.k + j) * a.K + kv) * a.E, a.E)) : -INFINITY;
    const float now = fmaxf(top, warp_max(s)), shrink = expf(top - now), p = expf(s - now);
    total = total * shrink + fd::warp_sum(p);
    top = now;
    const int n = (int)min((int64_t)32, last - j0);
    for (int c = 0; c < PER_LANE && c * 32 < a.E; c++) out[c] *= shrink;
    for (int m = 0; m < n; m++) {
      const float pm = __shfl_sync(0xffffffffu, p, m);
      const T *vr = v + ((r.k + j0 + m) * a.K + kv) * a.E;
      for (int c = 0, e = lane; e < a.E; e += 32, c++) out[c] = fmaf(pm, fd::load(vr + e), out[c]);
    }
  }
  const float inverse = total > 0 ? 1.0f / total : 0.0f;
  for (int c = 0, e = lane; e < a.E; e += 32, c++) fd::store(o + row * a.E + e, out[c] * inverse);
  if (lane == 0) lse[lse_at(a, r, blockIdx.z, head, i)] = total > 0 ? top + logf(total) : -INFINITY;
}

/* delta = sum over e of do o, per row and head: one warp each */
template <class T> __global__ void __launch_bounds__(BLOCK) attention_delta(const T *d_o, const T *o, const int *ranges, float *delta, shape a) {
  const int lane = threadIdx.x % 32, head = blockIdx.y;
  const range r = range_of(ranges, blockIdx.z);
  const int64_t i = (int64_t)blockIdx.x * WARPS + threadIdx.x / 32;
  if (i >= r.nq) return;
  const int64_t row = (r.q + i) * a.A + head;
  float sum = 0;
  for (int e = lane; e < a.E; e += 32) sum = fmaf(fd::load(d_o + row * a.E + e), fd::load(o + row * a.E + e), sum);
  sum = fd::warp_sum(sum);
  if (lane == 0) delta[row] = sum;
}

template <class T>
__global__ void __launch_bounds__(BLOCK)
    attention_dq(const T *d_o, const T *q, const T *k, const T *v, const float *lse, const float *delta, const int *ranges, T *dq, bool acc, shape a) {
  FD_SMEM(float, shared);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, head = blockIdx.y, kv = head / (a.A / a.K);
  const range r = range_of(ranges, blockIdx.z);
  const int64_t i = (int64_t)blockIdx.x * WARPS + warp;
  if (i >= r.nq) return;
  float *mine = shared + warp * 2 * a.E, *grad = mine + a.E;
  const int64_t row = (r.q + i) * a.A + head;
  for (int e = lane; e < a.E; e += 32) {
    mine[e] = fd::load(q + row * a.E + e);
    grad[e] = fd::load(d_o + row * a.E + e);
  }
  __syncwarp();
  float out[PER_LANE] = {0};
  const float l = lse[lse_at(a, r, blockIdx.z, head, i)], d = delta[row];
  const int64_t first = first_key(a, i), last = last_key(a, r, i);
  for (int64_t j0 = first; j0 < last; j0 += 32) {
    const int64_t j = j0 + lane;
    float ds = 0;
    if (j < last) {
      const int64_t at = ((r.k + j) * a.K + kv) * a.E;
      const float s = capped(a, a.scale * dot_row(mine, k + at, a.E));
      ds = expf(s - l) * (dot_row(grad, v + at, a.E) - d) * cap_slope(a, s) * a.scale;
    }
    const int n = (int)min((int64_t)32, last - j0);
    for (int m = 0; m < n; m++) {
      const float w = __shfl_sync(0xffffffffu, ds, m);
      const T *kr = k + ((r.k + j0 + m) * a.K + kv) * a.E;
      for (int c = 0, e = lane; e < a.E; e += 32, c++) out[c] = fmaf(w, fd::load(kr + e), out[c]);
    }
  }
  for (int c = 0, e = lane; e < a.E; e += 32, c++) fd::store(dq + row * a.E + e, acc ? fd::load(dq + row * a.E + e) + out[c] : out[c]);
}

/* Grid: (tiles of WARPS keys, kv heads, sequences); the query heads of the group are met one after the other. */
template <class T>
__global__ void __launch_bounds__(BLOCK)
    attention_dkv(const T *d_o, const T *q, const T *k, const T *v, const float *lse, const float *delta, const int *ranges, T *dk, bool acc_k, T *dv,
                  bool acc_v, shape a) {
  FD_SMEM(float, shared);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, kv = blockIdx.y, group = a.A / a.K;
  const range r = range_of(ranges, blockIdx.z);
  const int64_t j = (int64_t)blockIdx.x * WARPS + warp;
  if (j >= r.nk) return;
  float *key = shared + warp * 2 * a.E, *value = key + a.E;
  const int64_t at = ((r.k + j) * a.K + kv) * a.E;
  for (int e = lane; e < a.E; e += 32) {
    key[e] = fd::load(k + at + e);
    value[e] = fd::load(v + at + e);
  }
  __syncwarp();
  float outk[PER_LANE] = {0}, outv[PER_LANE] = {0};
  const int64_t first = a.causal ? j : 0, last = a.window > 0 ? min(r.nq, j + a.window) : r.nq;
  for (int h = 0; h < group; h++) {
    const int head = kv * group + h;
    for (int64_t i0 = first; i0 < last; i0 += 32) {
      const int64_t i = i0 + lane;
      float p = 0, ds = 0;
      if (i < last) {
        const int64_t row = (r.q + i) * a.A + head;
        const float s = capped(a, a.scale * dot_row(key, q + row * a.E, a.E));
        p = expf(s - lse[lse_at(a, r, blockIdx.z, head, i)]);
        ds = p * (dot_row(value, d_o + row * a.E, a.E) - delta[row]) * cap_slope(a, s) * a.scale;
      }
      const int n = (int)min((int64_t)32, last - i0);
      for (int m = 0; m < n; m++) {
        const float pm = __shfl_sync(0xffffffffu, p, m), dm = __shfl_sync(0xffffffffu, ds, m);
        const int64_t from = ((r.q + i0 + m) * a.A + head) * a.E;
        for (int c = 0, e = lane; e < a.E; e += 32, c++) {
          outk[c] = fmaf(dm, fd::load(q + from + e), outk[c]);
          outv[c] = fmaf(pm, fd::load(d_o + from + e), outv[c]);
        }
      }
    }
  }
  for (int c = 0, e = lane; e < a.E; e += 32, c++) {
    fd::store(dk + at + e, acc_k ? fd::load(dk + at + e) + outk[c] : outk[c]);
    fd::store(dv + at + e, acc_v ? fd::load(dv + at + e) + outv[c] : outv[c]);
  }
}

template <class Args> int64_t regular(const Args *a) {
  return fd_attention_is_regular(a->q, a->k, a->ranges, a->A, a->K, a->E, a->q_stride, a->k_stride) ? a->q_stride : 0;
}

template <class T> fd_status forward(fd_ctx *ctx, const struct fd_attention_fwd_args *a) {
  const shape s = {a->A, a->K, a->E, a->scale, a->softcap, a->causal, a->window, regular(a)};
  const int64_t S = a->ranges->shape[0];
  if (S == 0 || a->max_q == 0) return FD_OK;
  return FD_CUDA(FD_LAUNCH(attention_forward<T>, dim3(fd::blocks(a->max_q, WARPS), (unsigned)a->A, (unsigned)S), BLOCK, WARPS * a->E * sizeof(float),
                           fd_cuda_stream(ctx), (const T *)a->q->data, (const T *)a->k->data, (const T *)a->v->data, (const int *)a->ranges->data,
                           (T *)a->o->data, (float *)a->lse->data, s));
}

template <class T> fd_status backward(fd_ctx *ctx, const struct fd_attention_bwd_args *a) {
  const shape s = {a->A, a->K, a->E, a->scale, a->softcap, a->causal, a->window, regular(a)};
  const int64_t S = a->ranges->shape[0];
  const dim3 queries(fd::blocks(a->max_q, WARPS), (unsigned)a->A, (unsigned)S), keys(fd::blocks(a->max_k, WARPS), (unsigned)a->K, (unsigned)S);
  const size_t smem = WARPS * 2 * a->E * sizeof(float);
  const int *ranges = (const int *)a->ranges->data;
  const T *d_o = (const T *)a->d_o->data, *q = (const T *)a->q->data, *k = (const T *)a->k->data, *v = (const T *)a->v->data;
  const float *lse = (const float *)a->lse->data;
  float *delta = (float *)ctx->scratch;
  cudaStream_t stream = fd_cuda_stream(ctx);
  fd_status st = FD_OK;
  if (S == 0) return FD_OK;
  if (a->max_q > 0) {
    st = FD_CUDA(FD_LAUNCH(attention_delta<T>, queries, BLOCK, 0, stream, d_o, (const T *)a->o->data, ranges, delta, s));
    if (st == FD_OK)
      st = FD_CUDA(FD_LAUNCH(attention_dq<T>, queries, BLOCK, smem, stream, d_o, q, k, v, lse, (const float *)delta, ranges, (T *)a->dq->data,
                             (a->acc >> 7 & 1) != 0, s));
  }
  if (st == FD_OK && a->max_k > 0)
    st = FD_CUDA(FD_LAUNCH(attention_dkv<T>, keys, BLOCK, smem, stream, d_o, q, k, v, lse, (const float *)delta, ranges, (T *)a->dk->data,
                           (a->acc >> 8 & 1) != 0, (T *)a->dv->data, (a->acc >> 9 & 1) != 0, s));
  return st;
}

fd_status check(enum fd_op op, const fd_tensor *q, const fd_tensor *k, const fd_tensor *ranges, int A, int K, int E) {
  if (A < 1 || K < 1 || A % K) return fd_op_wrong_arg(op, "A = %d heads, K = %d kv heads: K must divide A", A, K);
  if (E < 1 || E > 32 * PER_LANE) return fd_op_wrong_arg(op, "E = %d, expected 1 to %d", E, 32 * PER_LANE);
  if (ranges->ndim != 2 || ranges->shape[1] != 4) return fd_op_wrong_slot(op, "ranges", ranges, "[S, 4]");
  if (fd_tensor_numel(q) % ((int64_t)A * E)) return fd_op_wrong_slot(op, "q", q, "[Tq, %d, %d]", A, E);
  if (fd_tensor_numel(k) % ((int64_t)K * E)) return fd_op_wrong_slot(op, "k", k, "[Tk, %d, %d]", K, E);
  return FD_OK;
}

}  // namespace

extern "C" fd_status cuda_attention_prepare(fd_ctx *ctx, enum fd_op op, const void *args, size_t *scratch_bytes) {
  size_t own = 0;
  int found = 0;
  fd_status st;
  *scratch_bytes = 0;
  if (op == FD_OP_attention_fwd) {
    const struct fd_attention_fwd_args *a = (const struct fd_attention_fwd_args *)args;
    st = check(op, a->q, a->k, a->ranges, a->A, a->K, a->E);
  } else {
    const struct fd_attention_bwd_args *a = (const struct fd_attention_bwd_args *)args;
    st = check(op, a->q, a->k, a->ranges, a->A, a->K, a->E);
    own = (size_t)fd_tensor_numel(a->lse) * sizeof(float);
  }
  if (st == FD_OK) st = cuda_attention_library_prepare(ctx, op, args, &found, scratch_bytes);
  if (!found) *scratch_bytes = own;
  return st;
}

extern "C" fd_status cuda_attention_fwd(fd_ctx *ctx, const struct fd_attention_fwd_args *a) {
  int found;
  const fd_status st = cuda_attention_library_fwd(ctx, a, &found);
  if (st != FD_OK || found) return st;
  return a->q->dtype == FD_BF16 ? forward<fd::bf16>(ctx, a) : forward<float>(ctx, a);
}

extern "C" fd_status cuda_attention_bwd(fd_ctx *ctx, const struct fd_attention_bwd_args *a) {
  int found;
  const fd_status st = cuda_attention_library_bwd(ctx, a, &found);
  if (st != FD_OK || found) return st;
  return a->q->dtype == FD_BF16 ? backward<fd::bf16>(ctx, a) : backward<float>(ctx, a);
}
