// SPDX-License-Identifier: Apache-2.0
// Attention in bf16 through libraries: of regular batches, and (forward only) of packed sequences, which are laid out as one: 2 passes of q, k, v and o
// beside the product, 80 % of the bandwidth expected. Heads up to 256 wide: cuDNN, which never writes the scores to memory; what is here
// is small beside it (lengths; sums into gradients that are added to: 3 passes of dq, dk, dv, 80 % of the bandwidth expected).
// One head wider than that (the middle of a VAE): scores = scale q k' (f32), softmax, o = p v as batched matrix products, as many pictures or
// rows at a time as fit the scratch. 4 B N M E FLOP; beside the products 12 bytes per score move: half of the matrix peak expected for E = 512.
#include "cuda/attention.h"
#include "cuda/device.cuh"
#include "cuda/library.h"

size_t cuda_attention_most_bytes = (size_t)256 << 20;

namespace {

enum { WARPS = 8, BLOCK = 32 * WARPS, WIDEST = 256 /* head of cuDNN's backward */, V = fd::wide<fd::bf16>::V };

typedef struct fd_cuda_sdpa sdpa;
typedef struct fd_cuda_gemm gemm;

/* ---- kernels ----------------------------------------------------------------------------------------------------- */

/* Rows of each sequence, kept within its place and above 0, whatever ranges say: no plan holds against 0. */
__global__ void attention_lengths(const int *ranges, int *n, int *m, int S, int N, int M) {
  const int s = blockIdx.x * blockDim.x + threadIdx.x;
  if (s >= S) return;
  n[s] = min(N, max(1, ranges[4 * s + 1]));
  m[s] = min(M, max(1, ranges[4 * s + 3]));
}

/* to += from for the rows in use, V elements at a time; `stride` rows per sequence, `packs` per row */
__global__ void __launch_bounds__(BLOCK)
    attention_add_rows(fd::bf16 *to, const fd::bf16 *from, const int *length, int64_t stride, int64_t packs, int64_t total) {
  for (int64_t p = (int64_t)blockIdx.x * BLOCK + threadIdx.x; p < total; p += (int64_t)BLOCK * gridDim.x) {
    const int64_t row = p / packs;
    if (row % stride >= length[row / stride]) continue;
    fd::pack<V> x = fd::load_pack<V>(to + p * V);
    const fd::pack<V> y = fd::load_pack<V>(from + p * V);
    for (int i = 0; i < V; i++) x.f[i] += y.f[i];
    fd::store_pack<V>(to + p * V, x);
  }
}

/* to [S, per rows] = the rows of each sequence of `from`, zeros behind its last; `which`: 0 queries, 2 keys; `packs` per row */
__global__ void __launch_bounds__(BLOCK)
    attention_unpack(const fd::bf16 *from, const int *ranges, int which, fd::bf16 *to, int64_t per, int64_t packs, int64_t total) {
  for (int64_t p = (int64_t)blockIdx.x * BLOCK + threadIdx.x; p < total; p += (int64_t)BLOCK * gridDim.x) {
    const int64_t row = p / packs, s = row / per, i = row % per;
    const bool there = i < ranges[4 * s + which + 1];
    fd::store_pack<V>(to + p * V, there ? fd::load_pack<V>(from + ((ranges[4 * s + which] + i) * packs + p % packs) * V) : fd::same<V>(0.0f));
  }
}

/* The way back: o from [S, per, A E], lse from [S, A, per]. A sequence without keys was given one: its queries become 0. */
__global__ void __launch_bounds__(BLOCK)
    attention_pack(const fd::bf16 *from, const float *lse_from, const int *ranges, fd::bf16 *o, float *lse, int64_t per, int A, int64_t packs, int64_t total) {
  for (int64_t p = (int64_t)blockIdx.x * BLOCK + threadIdx.x; p < total; p += (int64_t)BLOCK * gridDim.x) {
    const int64_t row = p / packs, s = row / per, i = row % per, to = ranges[4 * s] + i, at = p % packs, per_head = packs / A;
    const bool keys = ranges[4 * s + 3] > 0;
    if (i >= ranges[4 * s + 1]) continue;
    fd::store_pack<V>(o + (to * packs + at) * V, keys ? fd::load_pack<V>(from + p * V) : fd::same<V>(0.0f));
    if (at % per_head == 0) lse[to * A + at / per_head] = keys ? lse_from[(s * A + at / per_head) * per + i] : -INFINITY;
  }
}

__device__ __forceinline__ float warp_max(float v) {
  for (int i = 16; i > 0; i /= 2) v = fmaxf(v, __shfl_xor_sync(0xffffffffu, v, i));
  return v;
}

/* One warp: the softmax of a row of M scores, of which the first m[s] count; p is 0 elsewhere.
   Grid: (tiles of WARPS rows of the chunk, sequences of the chunk). lse: [B, N]. */
__global__ void __launch_bounds__(BLOCK)
    attention_softmax(const float *scores, fd::bf16 *p, float *lse, const int *m, int64_t first, int64_t row0, int64_t rows, int64_t N, int64_t M) {
  const int lane = threadIdx.x % 32;
  const int64_t r = (int64_t)blockIdx.x * WARPS + threadIdx.x / 32, s = first + blockIdx.y;
  if (r >= rows) return; /* the whole warp */
  const int64_t at = ((int64_t)blockIdx.y * rows + r) * M, used = m[s];
  float top = -INFINITY, sum = 0;
  for (int64_t j = lane * V; j < used; j += 32 * V) {
    const fd::pack<V> x = fd::load_pack<V>(scores + at + j);
    for (int i = 0; i < V; i++)
      if (j + i < used) top = fmaxf(top, x.f[i]);
  }
  top = warp_max(top);
  for (int64_t j = lane * V; j < used; j += 32 * V) {
    const fd::pack<V> x = fd::load_pack<V>(scores + at + j);
    for (int i = 0; i < V; i++)
      if (j + i < used) sum += expf(x.f[i] - top);
  }
  sum = fd::warp_sum(sum);
  const float inverse = 1.0f / sum;
  for (int64_t j = lane * V; j < M; j += 32 * V) {
    fd::pack<V> y;
    for (int i = 0; i < V; i++) y.f[i] = 0;
    if (j < used) {
      const fd::pack<V> x = fd::load_pack<V>(scores + at + j);
      for (int i = 0; i < V; i++) y.f[i] = j + i < used ? expf(x.f[i] - top) * inverse : 0.0f;
    }
    fd::store_pack<V>(p + at + j, y);
  }
  if (lane == 0) lse[s * N + row0 + r] = top + logf(sum);
}

/* ---- which way, and what it needs -------------------------------------------------------------------------------- */

/* Both passes' args begin alike, but their slots differ: what the choice depends on. */
template <class Args> bool possible(const Args *a) {
  return a->q->dtype == FD_BF16 && !a->causal && a->window == 0 && !(a->softcap > 0) && a->E % V == 0 &&
         fd_attention_is_regular(a->q, a->k, a->ranges, a->A, a->K, a->E, a->q_stride, a->k_stride);
}

template <class Args> sdpa sdpa_of(const Args *a) {
  sdpa s = {};
  s.B = a->ranges->shape[0], s.N = a->q_stride, s.M = a->k_stride;
  s.A = a->A, s.K = a->K, s.E = a->E, s.scale = a->scale;
  s.q = a->q->data, s.k = a->k->data, s.v = a->v->data, s.o = a->o->data, s.lse = (float *)a->lse->data;
  return s;
}

sdpa sdpa_of_bwd(const struct fd_attention_bwd_args *a) {
  sdpa s = sdpa_of(a);
  s.backward = 1;
  s.d_o = a->d_o->data, s.dq = a->dq->data, s.dk = a->dk->data, s.dv = a->dv->data;
  return s;
}

/* cuDNN's deterministic backward keeps two bytes per score: as many sequences at a time as stay below 8 times the limit of above; they divide B,
   so that one plan serves all. Where a part of lse would not be aligned to 16 bytes, all at once. */
int64_t sequences_at_once(fd_ctx *ctx, const sdpa &s) {
  if (!s.backward || !ctx->deterministic || s.A * s.N % 4) return s.B;
  const size_t one = 2 * (size_t)(s.A * s.N * s.M);
  int64_t n = s.B;
  while (n > 1 && (s.B % n || (size_t)n * one > 8 * cuda_attention_most_bytes)) n--;
  return n;
}

/* The part of sequences b .. b + n - 1. */
sdpa part_of(const sdpa &s, int64_t b, int64_t n) {
  const int64_t q = b * s.N * s.A * s.E, k = b * s.M * s.K * s.E;
  sdpa p = s;
  p.B = n;
  p.q = (const fd::bf16 *)s.q + q, p.k = (const fd::bf16 *)s.k + k, p.v = (const fd::bf16 *)s.v + k, p.o = (fd::bf16 *)s.o + q;
  p.d_o = (const fd::bf16 *)s.d_o + q, p.dq = (fd::bf16 *)s.dq + q, p.dk = (fd::bf16 *)s.dk + k, p.dv = (fd::bf16 *)s.dv + k;
  p.lse = s.lse + b * s.A * s.N, p.n = s.n + b, p.m = s.m + b;
  return p;
}

size_t length_bytes(int64_t S) { return fd_cuda_aligned((size_t)S * sizeof(int)); }

fd_status write_lengths(fd_ctx *ctx, const fd_tensor *ranges, sdpa *s) {
  int *n = (int *)ctx->scratch, *m = (int *)((char *)ctx->scratch + length_bytes(s->B));
  s->n = n, s->m = m;
  return FD_CUDA(FD_LAUNCH(attention_lengths, fd::blocks(s->B, 128), 128, 0, fd_cuda_stream(ctx), (const int *)ranges->data, n, m, (int)s->B,
                           (int)s->N, (int)s->M));
}

/* ---- one wide head ----------------------------------------------------------------------------------------------- */

/* Scores [pictures, rows, M] at a time: all rows of some pictures, or some rows of one. */
struct chunk {
  int64_t pictures, rows;
};

chunk chunk_of(const sdpa &s) {
  const size_t row = (size_t)s.M * (sizeof(float) + sizeof(fd::bf16)), one = row * (size_t)s.N;
  chunk c = {1, s.N};
  if (one <= cuda_attention_most_bytes)
    c.pictures = min(s.B, (int64_t)(cuda_attention_most_bytes / one));
  else
    c.rows = max((int64_t)1, (int64_t)(cuda_attention_most_bytes / row));
  return c;
}

gemm scores_of(const sdpa &s, int64_t pictures, int64_t rows) {
  gemm g = {};
  g.M = rows, g.N = s.M, g.K = s.E, g.batch = pictures, g.trans_b = 1, g.ab = FD_BF16, g.c_type = FD_F32, g.alpha = s.scale;
  g.a_stride = s.N * s.E, g.b_stride = s.M * s.E, g.c_stride = rows * s.M;
  return g;
}

gemm output_of(const sdpa &s, int64_t pictures, int64_t rows) {
  gemm g = {};
  g.M = rows, g.N = s.E, g.K = s.M, g.batch = pictures, g.ab = FD_BF16, g.c_type = FD_BF16, g.alpha = 1;
  g.a_stride = rows * s.M, g.b_stride = s.M * s.E, g.c_stride = s.N * s.E;
  return g;
}

bool is_wide(const sdpa &s) { return s.A == 1 && s.K == 1 && s.E > WIDEST && s.M % V == 0; }

size_t score_bytes(const sdpa &s, const chunk &c) { return fd_cuda_aligned((size_t)(c.pictures * c.rows * s.M) * sizeof(float)); }
size_t p_bytes(const sdpa &s, const chunk &c) { return fd_cuda_aligned((size_t)(c.pictures * c.rows * s.M) * sizeof(fd::bf16)); }

fd_status wide_prepare(fd_ctx *ctx, const sdpa &s, size_t *scratch) {
  const chunk c = chunk_of(s);
  const int64_t pictures[2] = {c.pictures, s.B % c.pictures}, rows[2] = {c.rows, s.N % c.rows};
  size_t most = 0;
  for (int i = 0; i < 2; i++)
    for (int j = 0; j < 2; j++) {
      if (pictures[i] == 0 || rows[j] == 0) continue;
      const gemm g[2] = {scores_of(s, pictures[i], rows[j]), output_of(s, pictures[i], rows[j])};
      for (int k = 0; k < 2; k++) {
        size_t bytes;
        const fd_status st = fd_cuda_gemm_prepare(ctx, &g[k], &bytes);
        if (st != FD_OK) return st;
        most = max(most, bytes);
      }
    }
  *scratch = 2 * length_bytes(s.B) + score_bytes(s, c) + p_bytes(s, c) + most;
  return FD_OK;
}

fd_status wide_forward(fd_ctx *ctx, const sdpa &s) {
  const chunk c = chunk_of(s);
  char *at = (char *)ctx->scratch + 2 * length_bytes(s.B);
  float *scores = (float *)at;
  fd::bf16 *p = (fd::bf16 *)(at + score_bytes(s, c));
  void *rest = at + score_bytes(s, c) + p_bytes(s, c);
  for (int64_t b = 0; b < s.B; b += c.pictures)
    for (int64_t i = 0; i < s.N; i += c.rows) {
      const int64_t pictures = min(c.pictures, s.B - b), rows = min(c.rows, s.N - i);
      gemm g = scores_of(s, pictures, rows);
      g.a = (const fd::bf16 *)s.q + (b * s.N + i) * s.E, g.b = (const fd::bf16 *)s.k + b * s.M * s.E, g.c = scores;
      fd_status st = fd_cuda_gemm(ctx, &g, rest);
      if (st == FD_OK)
        st = FD_CUDA(FD_LAUNCH(attention_softmax, dim3(fd::blocks(rows, WARPS), (unsigned)pictures), BLOCK, 0, fd_cuda_stream(ctx),
                               (const float *)scores, p, s.lse, s.m, b, i, rows, s.N, s.M));
      g = output_of(s, pictures, rows);
      g.a = p, g.b = (const fd::bf16 *)s.v + b * s.M * s.E, g.c = (fd::bf16 *)s.o + (b * s.N + i) * s.E;
      if (st == FD_OK) st = fd_cuda_gemm(ctx, &g, rest);
      if (st != FD_OK) return st;
    }
  return FD_OK;
}

/* ---- backward ---------------------------------------------------------------------------------------------------- */

enum { DQ = 7, DK, DV }; /* slots */

/* A gradient that is added to is written to scratch first. */
size_t sum_bytes(const struct fd_attention_bwd_args *a, int slot, const fd_tensor *t) { return a->acc >> slot & 1 ? fd_cuda_aligned(fd_tensor_bytes(t)) : 0; }

size_t sums_bytes(const struct fd_attention_bwd_args *a) { return sum_bytes(a, DQ, a->dq) + sum_bytes(a, DK, a->dk) + sum_bytes(a, DV, a->dv); }

fd_status add_rows(fd_ctx *ctx, const fd_tensor *to, const void *from, const int *length, int64_t S, int64_t stride) {
  const int64_t total = fd_tensor_numel(to) / V;
  return FD_CUDA(FD_LAUNCH(attention_add_rows, fd::stride_blocks(ctx, total, BLOCK), BLOCK, 0, fd_cuda_stream(ctx), (fd::bf16 *)to->data,
                           (const fd::bf16 *)from, length, stride, total / (S * stride), total));
}

/* ---- packed sequences -------------------------------------------------------------------------------------------- */

const size_t MOST_UNPACKED = (size_t)1 << 30; /* bytes; the own kernels need none */

/* Behind the lengths: q, k, v, o, lse as a batch, then cuDNN's scratch. */
struct unpacked {
  size_t q, k, lse, all; /* bytes: of q and o each, of k and v each */
};

unpacked unpacked_of(const sdpa &s) {
  unpacked u;
  u.q = fd_cuda_aligned((size_t)(s.B * s.N * s.A * s.E) * sizeof(fd::bf16));
  u.k = fd_cuda_aligned((size_t)(s.B * s.M * s.K * s.E) * sizeof(fd::bf16));
  u.lse = fd_cuda_aligned((size_t)(s.B * s.A * s.N) * sizeof(float));
  u.all = 2 * u.q + 2 * u.k + u.lse;
  return u;
}

sdpa packed_of(const struct fd_attention_fwd_args *a) {
  sdpa s = {};
  s.B = a->ranges->shape[0], s.N = a->max_q, s.M = a->max_k;
  s.A = a->A, s.K = a->K, s.E = a->E, s.scale = a->scale, s.causal = a->causal;
  return s;
}

bool packed_possible(const struct fd_attention_fwd_args *a) {
  const sdpa s = packed_of(a);
  return a->q->dtype == FD_BF16 && a->q_stride == 0 && a->window == 0 && !(a->softcap > 0) && a->E % V == 0 && a->E <= WIDEST && s.B > 0 && s.N > 0 &&
         s.M > 0 && unpacked_of(s).all <= MOST_UNPACKED;
}

fd_status packed_prepare(fd_ctx *ctx, const struct fd_attention_fwd_args *a, int *found, size_t *scratch) {
  const sdpa s = packed_of(a);
  size_t bytes = 0;
  const fd_status st = fd_cuda_sdpa_prepare(ctx, &s, found, &bytes);
  if (*found) *scratch = 2 * length_bytes(s.B) + unpacked_of(s).all + bytes;
  return st;
}

fd_status unpack(fd_ctx *ctx, const fd_tensor *from, const fd_tensor *ranges, int which, void *to, int64_t S, int64_t per, int64_t width) {
  const int64_t packs = width / V, total = S * per * packs;
  return FD_CUDA(FD_LAUNCH(attention_unpack, fd::stride_blocks(ctx, total, BLOCK), BLOCK, 0, fd_cuda_stream(ctx), (const fd::bf16 *)from->data,
                           (const int *)ranges->data, which, (fd::bf16 *)to, per, packs, total));
}

fd_status packed_forward(fd_ctx *ctx, const struct fd_attention_fwd_args *a) {
  sdpa s = packed_of(a);
  const unpacked u = unpacked_of(s);
  const int64_t q_row = (int64_t)s.A * s.E, k_row = (int64_t)s.K * s.E, total = s.B * s.N * q_row / V;
  char *q = (char *)ctx->scratch + 2 * length_bytes(s.B), *o = q + u.q, *k = o + u.q, *v = k + u.k, *lse = v + u.k;
  fd_status st = write_lengths(ctx, a->ranges, &s);
  if (st == FD_OK) st = unpack(ctx, a->q, a->ranges, 0, q, s.B, s.N, q_row);
  if (st == FD_OK) st = unpack(ctx, a->k, a->ranges, 2, k, s.B, s.M, k_row);
  if (st == FD_OK) st = unpack(ctx, a->v, a->ranges, 2, v, s.B, s.M, k_row);
  s.q = q, s.k = k, s.v = v, s.o = o, s.lse = (float *)lse;
  if (st == FD_OK) st = fd_cuda_sdpa(ctx, &s, lse + u.lse);
  if (st == FD_OK)
    st = FD_CUDA(FD_LAUNCH(attention_pack, fd::stride_blocks(ctx, total, BLOCK), BLOCK, 0, fd_cuda_stream(ctx), (const fd::bf16 *)o, (const float *)lse,
                           (const int *)a->ranges->data, (fd::bf16 *)a->o->data, (float *)a->lse->data, s.N, s.A, q_row / V, total));
  return st;
}

}  // namespace

extern "C" fd_status cuda_attention_library_prepare(fd_ctx *ctx, enum fd_op op, const void *args, int *found, size_t *scratch) {
  sdpa s;
  size_t sums = 0, bytes = 0;
  *found = 0;
  if (op == FD_OP_attention_fwd) {
    const struct fd_attention_fwd_args *a = (const struct fd_attention_fwd_args *)args;
    if (packed_possible(a)) return packed_prepare(ctx, a, found, scratch);
    if (!possible(a)) return FD_OK;
    s = sdpa_of(a);
    if (is_wide(s)) {
      *found = 1;
      return wide_prepare(ctx, s, scratch);
    }
  } else {
    const struct fd_attention_bwd_args *a = (const struct fd_attention_bwd_args *)args;
    if (!possible(a)) return FD_OK;
    s = sdpa_of_bwd(a);
    sums = sums_bytes(a);
  }
  if (s.E > WIDEST) return FD_OK;
  const size_t lengths = 2 * length_bytes(s.B);
  s.B = sequences_at_once(ctx, s);
  const fd_status st = fd_cuda_sdpa_prepare(ctx, &s, found, &bytes);
  if (*found) *scratch = lengths + sums + bytes;
  return st;
}

extern "C" fd_status cuda_attention_library_fwd(fd_ctx *ctx, const struct fd_attention_fwd_args *a, int *found) {
  size_t bytes;
  fd_status st = cuda_attention_library_prepare(ctx, FD_OP_attention_fwd, a, found, &bytes);
  if (st != FD_OK || !*found) return st;
  if (packed_possible(a)) return packed_forward(ctx, a);
  sdpa s = sdpa_of(a);
  st = write_lengths(ctx, a->ranges, &s);
  if (st != FD_OK) return st;
  return is_wide(s) ? wide_forward(ctx, s) : fd_cuda_sdpa(ctx, &s, (char *)ctx->scratch + 2 * length_bytes(s.B));
}

extern "C" fd_status cuda_attention_library_bwd(fd_ctx *ctx, const struct fd_attention_bwd_args *a, int *found) {
  size_t bytes;
  fd_status st = cuda_attention_library_prepare(ctx, FD_OP_attention_bwd, a, found, &bytes);
  if (st != FD_OK || !*found) return st;
  sdpa s = sdpa_of_bwd(a);
  st = write_lengths(ctx, a->ranges, &s);
  char *at = (char *)ctx->scratch + 2 * length_bytes(s.B);
  const struct {
    int slot;
    const fd_tensor *t;
    void **target;
    const int *length;
    int64_t stride;
  } out[3] = {{DQ, a->dq, &s.dq, s.n, s.N}, {DK, a->dk, &s.dk, s.m, s.M}, {DV, a->dv, &s.dv, s.m, s.M}};
  for (int i = 0; i < 3; i++) {
    const size_t n = sum_bytes(a, out[i].slot, out[i].t);
    if (n) *out[i].target = at;
    at += n;
  }
  const int64_t part = sequences_at_once(ctx, s);
  for (int64_t b = 0; b < s.B && st == FD_OK; b += part) {
    const sdpa p = part_of(s, b, part);
    st = fd_cuda_sdpa(ctx, &p, at);
  }
  for (int i = 0; i < 3 && st == FD_OK; i++)
    if (sum_bytes(a, out[i].slot, out[i].t)) st = add_rows(ctx, out[i].t, *out[i].target, out[i].length, s.B, out[i].stride);
  return st;
}
