// SPDX-License-Identifier: Apache-2.0
// From the joint projection to what attention reads: split, norm over E, rotation, text keys and values behind the image's; and its gradient.
// Forward: 2 passes of q, k, v; backward: 3: memory bound, at least 75 % of the bandwidth expected. One warp handles one head of one row.
#include "cuda/device.cuh"

namespace {

enum { WARPS = 8, BLOCK = 32 * WARPS, PER_LANE = 16 /* E <= 512 */, SLOTS = 256 /* partial sums of the norms' gradients */ };

struct geometry {
  int64_t B, N, L, text_rows;
  int A, K, E;
  float eps;
};

/* A row of one head: where it comes from, where it goes. Items: image rows x (A + 2K), then texts B L x 2K. */
struct item {
  int64_t from;      /* element in qkv or text_kv */
  int64_t to;        /* element in q, k or v */
  int64_t head_row;  /* row of q_rstd or k_rstd */
  int64_t image_row; /* -1: text */
  int kind;          /* 0 q, 1 k, 2 v */
  bool text;
  bool nobodys;      /* a place of k or v behind the sample's last text row: cleared, so that a library may multiply it by 0 */
};

__device__ __forceinline__ int64_t image_rows(const geometry &g, const int *count) { return fd::rows_in_use(count, g.B * g.N); }

__device__ bool find_item(const geometry &g, int64_t index, const int *text, int64_t rows, item *it) {
  const int heads = g.A + 2 * g.K;
  const int64_t n_image = g.B * g.N * heads;
  if (index < n_image) {
    const int64_t row = index / heads, h = index % heads;
    if (row >= rows) return false;
    it->kind = h < g.A ? 0 : h < g.A + g.K ? 1 : 2;
    const int64_t head = it->kind == 0 ? h : it->kind == 1 ? h - g.A : h - g.A - g.K;
    const int64_t b = row / g.N, out_row = it->kind == 0 ? row : b * (g.N + g.L) + row % g.N;
    it->from = index * g.E;
    it->head_row = out_row * (it->kind == 0 ? g.A : g.K) + head;
    it->image_row = row;
    it->text = it->nobodys = false;
  } else {
    index -= n_image;
    const int64_t slot = index / (2 * g.K), h = index % (2 * g.K), b = slot / g.L, l = slot % g.L;
    it->nobodys = l >= text[2 * b + 1];
    it->kind = h < g.K ? 1 : 2;
    it->from = ((text[2 * b] + l) * 2 * g.K + h) * g.E;
    it->head_row = (b * (g.N + g.L) + g.N + l) * g.K + (it->kind == 1 ? h : h - g.K);
    it->image_row = -1;
    it->text = true;
  }
  it->to = it->head_row * g.E;
  return true;
}

__device__ __forceinline__ void rotate(float *v, const float *table, int E, int lane, int64_t position, bool inverse, float *shared) {
  /* element e pairs with e +- E/2, which another lane may hold: through shared memory of this warp */
  const int half = E / 2;
  __syncwarp();
  for (int i = 0, e = lane; e < E; e += 32, i++) shared[e] = v[i];
  __syncwarp();
  for (int i = 0, e = lane; e < E; e += 32, i++) {
    const int k = e < half ? e : e - half;
    const float c = table[position * E + k], s = inverse ? -table[position * E + half + k] : table[position * E + half + k];
    v[i] = e < half ? shared[e] * c - shared[e + half] * s : shared[e] * c + shared[e - half] * s;
  }
  __syncwarp();
}

template <class T>
__global__ void __launch_bounds__(BLOCK)
    heads_forward(const T *qkv, const T *text_kv, const void *q_norm, int q_bf16, const void *k_norm, int k_bf16, const float *rope, const int *pos,
                  const int *text, const int *count, T *q, T *k, T *v, float *q_rstd, float *k_rstd, geometry g, int64_t items) {
  FD_SMEM(float, shared);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t index = (int64_t)blockIdx.x * WARPS + warp;
  item it;
  if (index >= items || !find_item(g, index, text, image_rows(g, count), &it)) return; /* the whole warp */
  T *y = (it.kind == 0 ? q : it.kind == 1 ? k : v) + it.to;
  if (it.nobodys) {
    for (int e = lane; e < g.E; e += 32) fd::store(y + e, 0.0f);
    return;
  }
  const T *x = (it.text ? text_kv : qkv) + it.from;
  float value[PER_LANE], sum = 0;
  for (int i = 0, e = lane; e < g.E; e += 32, i++) {
    value[i] = fd::load(x + e);
    sum = fmaf(value[i], value[i], sum);
  }
  const void *w = it.kind == 0 ? q_norm : it.kind == 1 ? k_norm : NULL;
  if (w) {
    const float r = rsqrtf(fd::warp_sum(sum) / (float)g.E + g.eps);
    float *rstd = it.kind == 0 ? q_rstd : k_rstd;
    for (int i = 0, e = lane; e < g.E; e += 32, i++) value[i] *= r * (1.0f + fd::load_any(w, it.kind == 0 ? q_bf16 : k_bf16, e));
    if (lane == 0 && rstd) rstd[it.head_row] = r;
  }
  if (rope && it.kind != 2 && !it.text) rotate(value, rope, g.E, lane, pos ? pos[it.image_row] : it.image_row % g.N, false, shared + warp * g.E);
  for (int i = 0, e = lane; e < g.E; e += 32, i++) fd::store(y + e, value[i]);
}

/* One warp walks items slot, slot + SLOTS * ..: its sums of dw go to a fixed slot, so their order is fixed. */
template <class T>
__global__ void __launch_bounds__(BLOCK)
    heads_backward(const T *dq, const T *dk, const T *dv, const T *qkv, const T *text_kv, const void *q_norm, int q_bf16, const void *k_norm,
                   int k_bf16, const float *rope, const int *pos, const int *text, const int *count, const float *q_rstd, const float *k_rstd, T *dqkv,
                   bool acc_qkv, T *dtext, bool acc_text, float *part, geometry g, int64_t items) {
  FD_SMEM(float, shared);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t walker = (int64_t)blockIdx.x * WARPS + warp, walkers = (int64_t)gridDim.x * WARPS, rows = image_rows(g, count);
  float dwq[PER_LANE] = {0}, dwk[PER_LANE] = {0};
  for (int64_t index = walker; index < items; index += walkers) {
    item it;
    if (!find_item(g, index, text, rows, &it) || it.nobodys) continue;
    const T *dy = (it.kind == 0 ? dq : it.kind == 1 ? dk : dv) + it.to;
    const T *x = (it.text ? text_kv : qkv) + it.from;
    T *dx = it.text ? dtext : dqkv;
    const bool acc = it.text ? acc_text : acc_qkv;
    float grad[PER_LANE];
    for (int i = 0, e = lane; e < g.E; e += 32, i++) grad[i] = fd::load(dy + e);
    if (rope && it.kind != 2 && !it.text) rotate(grad, rope, g.E, lane, pos ? pos[it.image_row] : it.image_row % g.N, true, shared + warp * g.E);
    const void *w = it.kind == 0 ? q_norm : it.kind == 1 ? k_norm : NULL;
    if (w) {
      const float r = (it.kind == 0 ? q_rstd : k_rstd)[it.head_row];
      float dot = 0;
      for (int i = 0, e = lane; e < g.E; e += 32, i++) {
        const float n = fd::load(x + e) * r;
        if (it.kind == 0)
          dwq[i] = fmaf(grad[i], n, dwq[i]);
        else
          dwk[i] = fmaf(grad[i], n, dwk[i]);
        grad[i] *= 1.0f + fd::load_any(w, it.kind == 0 ? q_bf16 : k_bf16, e);
        dot = fmaf(grad[i], n, dot);
      }
      dot = fd::warp_sum(dot) / (float)g.E;
      for (int i = 0, e = lane; e < g.E; e += 32, i++) grad[i] = r * (grad[i] - fd::load(x + e) * r * dot);
    }
    if (dx)
      for (int i = 0, e = lane; e < g.E; e += 32, i++) fd::store(dx + it.from + e, acc ? fd::load(dx + it.from + e) + grad[i] : grad[i]);
  }
  if (part)
    for (int i = 0, e = lane; e < g.E; e += 32, i++) {
      part[walker * 2 * g.E + e] = dwq[i];
      part[walker * 2 * g.E + g.E + e] = dwk[i];
    }
}

__global__ void heads_dw(const float *part, float *dq_norm, bool acc_q, float *dk_norm, bool acc_k, int walkers, int E) {
  const int e = blockIdx.x * blockDim.x + threadIdx.x;
  if (e >= 2 * E) return;
  float *dw = e < E ? dq_norm : dk_norm;
  if (!dw) return;
  const int at = e % E;
  float sum = (e < E ? acc_q : acc_k) ? dw[at] : 0.0f;
  for (int w = 0; w < walkers; w++) sum += part[(int64_t)w * 2 * E + e];
  dw[at] = sum;
}

/* Rows of dtext_kv that no sample names become 0. */
template <class T> __global__ void clear_rows(T *dtext, const int *text, int64_t B, int64_t rows, int64_t width) {
  const int64_t row = blockIdx.x;
  for (int64_t b = 0; b < B; b++)
    if (row >= text[2 * b] && row < (int64_t)text[2 * b] + text[2 * b + 1]) return; /* the whole block */
  for (int64_t c = threadIdx.x; c < width; c += blockDim.x) fd::store(dtext + row * width + c, 0.0f);
}

int64_t items_of(int64_t B, int64_t N, int64_t L, int A, int K, bool has_text) { return B * N * (A + 2 * K) + (has_text ? B * L * 2 * K : 0); }

unsigned walker_blocks(int64_t items) {
  const int64_t want = (items + WARPS - 1) / WARPS;
  return (unsigned)(want < SLOTS ? want : SLOTS);
}

template <class T> fd_status forward(fd_ctx *ctx, const struct fd_heads_fwd_args *a) {
  const geometry g = {a->B, a->N, a->L, a->text_kv ? fd_tensor_rows(a->text_kv) : 0, a->A, a->K, a->E, a->eps};
  const int64_t items = items_of(a->B, a->N, a->L, a->A, a->K, a->text_kv != NULL);
  if (items == 0) return FD_OK;
  return FD_CUDA(FD_LAUNCH(heads_forward<T>, fd::blocks(items, WARPS), BLOCK, WARPS * a->E * sizeof(float), fd_cuda_stream(ctx),
                           (const T *)a->qkv->data, (const T *)fd::data(a->text_kv), fd::data(a->q_norm), fd::is_bf16(a->q_norm),
                           fd::data(a->k_norm), fd::is_bf16(a->k_norm), (const float *)fd::data(a->rope), (const int *)fd::data(a->pos),
                           (const int *)fd::data(a->text), fd::count_of(a->count), (T *)a->q->data, (T *)a->k->data, (T *)a->v->data,
                           (float *)fd::data(a->q_rstd), (float *)fd::data(a->k_rstd), g, items));
}

template <class T> fd_status backward(fd_ctx *ctx, const struct fd_heads_bwd_args *a) {
  const geometry g = {a->B, a->N, a->L, a->text_kv ? fd_tensor_rows(a->text_kv) : 0, a->A, a->K, a->E, a->eps};
  const int64_t items = items_of(a->B, a->N, a->L, a->A, a->K, a->text_kv != NULL);
  const bool norms = a->dq_norm || a->dk_norm;
  const unsigned grid = walker_blocks(items);
  cudaStream_t stream = fd_cuda_stream(ctx);
  fd_status st = FD_OK;
  if (a->dtext_kv && g.text_rows > 0 && !(a->acc >> 14 & 1))
    st = FD_CUDA(FD_LAUNCH(clear_rows<T>, (unsigned)g.text_rows, 128, 0, stream, (T *)a->dtext_kv->data, (const int *)a->text->data, a->B,
                           g.text_rows, fd_tensor_cols(a->dtext_kv)));
  if (st == FD_OK && items > 0)
    st = FD_CUDA(FD_LAUNCH(heads_backward<T>, grid, BLOCK, WARPS * a->E * sizeof(float), stream, (const T *)a->dq->data, (const T *)a->dk->data,
                           (const T *)a->dv->data, (const T *)a->qkv->data, (const T *)fd::data(a->text_kv), fd::data(a->q_norm),
                           fd::is_bf16(a->q_norm), fd::data(a->k_norm), fd::is_bf16(a->k_norm), (const float *)fd::data(a->rope),
                           (const int *)fd::data(a->pos), (const int *)fd::data(a->text), fd::count_of(a->count),
                           (const float *)fd::data(a->q_rstd), (const float *)fd::data(a->k_rstd), (T *)a->dqkv->data, (a->acc >> 13 & 1) != 0,
                           (T *)fd::data(a->dtext_kv), (a->acc >> 14 & 1) != 0, norms ? (float *)ctx->scratch : NULL, g, items));
  if (st == FD_OK && norms)
    st = FD_CUDA(FD_LAUNCH(heads_dw, fd::blocks(2 * a->E, 128), 128, 0, stream, (const float *)ctx->scratch, (float *)fd::data(a->dq_norm),
                           (a->acc >> 15 & 1) != 0, (float *)fd::data(a->dk_norm), (a->acc >> 16 & 1) != 0, (int)(grid * WARPS), a->E));
  return st;
}

}  // namespace

extern "C" size_t cuda_heads_bwd_scratch(const struct fd_heads_bwd_args *a) {
  if (!a->dq_norm && !a->dk_norm) return 0;
  return (size_t)walker_blocks(items_of(a->B, a->N, a->L, a->A, a->K, a->text_kv != NULL)) * WARPS * 2 * (size_t)a->E * sizeof(float);
}

extern "C" fd_status cuda_heads_fwd(fd_ctx *ctx, const struct fd_heads_fwd_args *a) {
  if (a->E > 32 * PER_LANE) return FD_FAIL(FD_ERR_UNSUPPORTED, "heads_fwd: head_dim %d, at most %d on CUDA", a->E, 32 * PER_LANE);
  return a->qkv->dtype == FD_BF16 ? forward<fd::bf16>(ctx, a) : forward<float>(ctx, a);
}

extern "C" fd_status cuda_heads_bwd(fd_ctx *ctx, const struct fd_heads_bwd_args *a) {
  if (a->E > 32 * PER_LANE) return FD_FAIL(FD_ERR_UNSUPPORTED, "heads_bwd: head_dim %d, at most %d on CUDA", a->E, 32 * PER_LANE);
  return a->qkv->dtype == FD_BF16 ? backward<fd::bf16>(ctx, a) : backward<float>(ctx, a);
}
