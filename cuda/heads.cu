// SPDX-License-Identifier: Apache-2.0
// From the joint projection to what attention reads: split, norm over E, rotation, text keys and values behind the image's; and its gradient.
// Forward moves 2 elements an element of q, k, v, backward 3 (4 if added to): memory bound. About 300 instructions find and turn the 16 elements of
// a lane, of 550 that fit under the memory time in bf16: 75 % of the bandwidth expected. E/16 lanes handle one head of one row.
#include "cuda/device.cuh"

namespace {

enum { WARPS = 8, BLOCK = fd::TILE, MOST_E = 512, MOST_BLOCKS = 512 /* of the backward: as many partial sums of the norms' gradients */ };
static_assert(BLOCK == 32 * WARPS, "a block is a tile");

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

__device__ __forceinline__ bool find_item(const geometry &g, unsigned index, const int *text, int64_t rows, item *it) {
  const unsigned heads = g.A + 2 * g.K, n_image = (unsigned)(g.B * g.N) * heads, N = (unsigned)g.N, L = (unsigned)g.L, A = g.A, K = g.K;
  unsigned head_row;
  if (index < n_image) {
    const unsigned row = index / heads, h = index - row * heads;
    if (row >= rows) return false;
    it->kind = h < A ? 0 : h < A + K ? 1 : 2;
    const unsigned head = it->kind == 0 ? h : it->kind == 1 ? h - A : h - A - K;
    head_row = it->kind == 0 ? row * A + head : (row + row / N * L) * K + head;
    it->from = (int64_t)index * g.E;
    it->image_row = row;
    it->text = it->nobodys = false;
  } else {
    index -= n_image;
    const unsigned slot = index / (2 * K), h = index - slot * 2 * K, b = slot / L, l = slot - b * L;
    it->nobodys = (int)l >= text[2 * b + 1];
    it->kind = h < K ? 1 : 2;
    it->from = ((int64_t)(text[2 * b] + (int)l) * 2 * K + h) * g.E;
    head_row = (b * (N + L) + N + l) * K + (h < K ? h : h - K);
    it->image_row = -1;
    it->text = true;
  }
  it->head_row = head_row;
  it->to = (int64_t)head_row * g.E;
  return true;
}

/* One head of one row over `lanes` lanes: each has N vectors of V elements. Either V = 8, N = 2 and E = 16 lanes, so that a lane has both partners of
 * each rotation; or V = 1 and 32 lanes. */
template <int V, int N> struct part_of_head {
  fd::pack<V> v[N];
};
#define FD_HEAD(i, e)       \
  _Pragma("unroll") for (int i = 0; i < N; i++) \
    if (const int e = V * (lane + lanes * i); V > 1 || e < E)

__device__ __forceinline__ float lanes_sum(float v, int lanes) {
  for (int i = lanes / 2; i > 0; i /= 2) v += __shfl_xor_sync(0xffffffffu, v, i);
  return v;
}

/* Element e pairs with e +- E/2: in the lane's other vector, or, with V = 1, anywhere (through `shared`, E floats of this warp's own). Called by
 * whole warps; `turn` says whether this head is turned. */
template <int V, int N>
__device__ __forceinline__ void rotate(part_of_head<V, N> &h, const float *table, int E, int lane, int lanes, bool turn, int64_t position, bool inverse,
                                       float *shared) {
  const int half = E / 2;
  table += turn ? position * E : 0;
  if constexpr (V == 1) {
    __syncwarp();
    FD_HEAD(i, e) shared[e] = h.v[i].f[0];
    __syncwarp();
    if (turn) FD_HEAD(i, e) {
        const int k = e < half ? e : e - half;
        const float c = table[k], s = (e < half) != inverse ? -table[half + k] : table[half + k];
        h.v[i].f[0] = fmaf(h.v[i].f[0], c, s * shared[e < half ? e + half : k]);
      }
    __syncwarp();
  } else if (turn) {
    const fd::pack<V> c = fd::load_pack<V>(table + V * lane), s = fd::load_pack<V>(table + half + V * lane);
    for (int k = 0; k < V; k++) {
      const float a = h.v[0].f[k], b = h.v[1].f[k], sine = inverse ? -s.f[k] : s.f[k];
      h.v[0].f[k] = fmaf(a, c.f[k], -sine * b);
      h.v[1].f[k] = fmaf(b, c.f[k], sine * a);
    }
  }
}

template <class T, int V, int N>
__global__ void __launch_bounds__(BLOCK)
    heads_forward(const T *qkv, const T *text_kv, const void *q_norm, int q_bf16, const void *k_norm, int k_bf16, const float *rope, const int *pos,
                  const int *text, const int *count, T *q, T *k, T *v, float *q_rstd, float *k_rstd, geometry g, int64_t items, int lanes) {
  FD_SMEM(float, shared);
  const int lane = threadIdx.x % lanes, E = g.E;
  const unsigned index = blockIdx.x * (BLOCK / lanes) + threadIdx.x / lanes; /* fewer than 2^31: few_items */
  item it;
  const bool found = index < items && find_item(g, index, text, image_rows(g, count), &it);
  const bool live = found && !it.nobodys; /* the other lanes take part in the shuffles; a row of nobody becomes 0 */
  part_of_head<V, N> h;
  float sum = 0;
  FD_HEAD(i, e) h.v[i] = live ? fd::load_pack<V>((it.text ? text_kv : qkv) + it.from + e) : fd::same<V>(0.0f);
  FD_HEAD(i, e) for (int j = 0; j < V; j++) sum = fmaf(h.v[i].f[j], h.v[i].f[j], sum);
  sum = lanes_sum(sum, lanes);
  const void *w = !live ? NULL : it.kind == 0 ? q_norm : it.kind == 1 ? k_norm : NULL;
  if (w) {
    const float r = rsqrtf(sum / (float)E + g.eps);
    float *rstd = it.kind == 0 ? q_rstd : k_rstd;
    FD_HEAD(i, e) {
      const fd::pack<V> weight = fd::load_pack_any<V>(w, it.kind == 0 ? q_bf16 : k_bf16, e);
      for (int j = 0; j < V; j++) h.v[i].f[j] *= r * (1.0f + weight.f[j]);
    }
    if (lane == 0 && rstd) rstd[it.head_row] = r;
  }
  if (rope) {
    const bool turn = live && it.kind != 2 && !it.text;
    rotate<V, N>(h, rope, E, lane, lanes, turn, !turn ? 0 : pos ? pos[it.image_row] : it.image_row % g.N, false, shared + threadIdx.x / 32 * E);
  }
  if (!found) return;
  T *y = (it.kind == 0 ? q : it.kind == 1 ? k : v) + it.to;
  FD_HEAD(i, e) fd::store_pack<V>(y + e, h.v[i]);
}

/* Each group of lanes walks items by the number of groups in the grid, which depends on shapes only; a block adds up its sums of the norms'
 * gradients: part_q and part_k [blocks, E]. */
template <class T, int V, int N>
__global__ void __launch_bounds__(BLOCK)
    heads_backward(const T *dq, const T *dk, const T *dv, const T *qkv, const T *text_kv, const void *q_norm, int q_bf16, const void *k_norm,
                   int k_bf16, const float *rope, const int *pos, const int *text, const int *count, const float *q_rstd, const float *k_rstd, T *dqkv,
                   bool acc_qkv, T *dtext, bool acc_text, float *part_q, float *part_k, geometry g, int64_t items, int lanes) {
  FD_SMEM(float, shared);
  __shared__ float slots[V * BLOCK];
  const int lane = threadIdx.x % lanes, E = g.E;
  const int64_t each = BLOCK / lanes, rows = image_rows(g, count);
  part_of_head<V, N> dwq, dwk;
  for (int i = 0; i < N; i++) dwq.v[i] = dwk.v[i] = fd::same<V>(0.0f);
  for (int64_t first = blockIdx.x * each; first < items; first += gridDim.x * each) { /* the same for the whole block */
    const unsigned index = (unsigned)first + threadIdx.x / lanes;
    item it;
    const bool live = index < items && find_item(g, index, text, rows, &it) && !it.nobodys;
    const T *dy = !live ? NULL : (it.kind == 0 ? dq : it.kind == 1 ? dk : dv) + it.to;
    const void *w = !live ? NULL : it.kind == 0 ? q_norm : it.kind == 1 ? k_norm : NULL;
    part_of_head<V, N> grad, n;
    FD_HEAD(i, e) {
      grad.v[i] = live ? fd::load_pack<V>(dy + e) : fd::same<V>(0.0f);
      n.v[i] = w ? fd::load_pack<V>((it.text ? text_kv : qkv) + it.from + e) : fd::same<V>(0.0f);
    }
    if (rope) {
      const bool turn = live && it.kind != 2 && !it.text;
      rotate<V, N>(grad, rope, E, lane, lanes, turn, !turn ? 0 : pos ? pos[it.image_row] : it.image_row % g.N, true, shared + threadIdx.x / 32 * E);
    }
    const float r = w ? (it.kind == 0 ? q_rstd : k_rstd)[it.head_row] : 0.0f;
    float dot = 0;
    if (w) FD_HEAD(i, e) {
        const fd::pack<V> weight = fd::load_pack_any<V>(w, it.kind == 0 ? q_bf16 : k_bf16, e);
        for (int j = 0; j < V; j++) {
          n.v[i].f[j] *= r;
          const float part = grad.v[i].f[j] * n.v[i].f[j];
          dwq.v[i].f[j] += it.kind == 0 ? part : 0.0f;
          dwk.v[i].f[j] += it.kind == 0 ? 0.0f : part;
          grad.v[i].f[j] *= 1.0f + weight.f[j];
          dot = fmaf(grad.v[i].f[j], n.v[i].f[j], dot);
        }
      }
    dot = lanes_sum(dot, lanes) / (float)E;
    T *dx = !live ? NULL : it.text ? dtext : dqkv;
    if (!dx) continue;
    const bool acc = it.text ? acc_text : acc_qkv;
    FD_HEAD(i, e) {
      fd::pack<V> out = acc ? fd::load_pack<V>(dx + it.from + e) : fd::same<V>(0.0f);
      for (int j = 0; j < V; j++) out.f[j] += w ? r * (grad.v[i].f[j] - n.v[i].f[j] * dot) : grad.v[i].f[j];
      fd::store_pack<V>(dx + it.from + e, out);
    }
  }
  if (!part_q) return;
#pragma unroll
  for (int i = 0; i < N; i++) {
    const int e = V * (lane + lanes * i);
    const fd::pack<V> a = fd::tile_sum<V>(dwq.v[i], lanes, slots), b = fd::tile_sum<V>(dwk.v[i], lanes, slots);
    if ((int)threadIdx.x >= lanes || e >= E) continue;
    fd::store_pack<V>(part_q + (int64_t)blockIdx.x * E + e, a);
    fd::store_pack<V>(part_k + (int64_t)blockIdx.x * E + e, b);
  }
}

/* Rows of dtext_kv that no sample names become 0. */
template <class T> __global__ void clear_rows(T *dtext, const int *text, int64_t B, int64_t rows, int64_t width) {
  const int64_t row = blockIdx.x;
  for (int64_t b = 0; b < B; b++)
    if (row >= text[2 * b] && row < (int64_t)text[2 * b] + text[2 * b + 1]) return; /* the whole block */
  for (int64_t c = threadIdx.x; c < width; c += blockDim.x) fd::store(dtext + row * width + c, 0.0f);
}

/* Blocks of the backward: by shapes only. */
unsigned walker_blocks(int64_t items) {
  const unsigned want = fd::blocks(items, WARPS);
  return want < MOST_BLOCKS ? want : (unsigned)MOST_BLOCKS;
}

template <class A> geometry geometry_of(const A *a) {
  return geometry{a->B, a->N, a->L, a->text_kv ? fd_tensor_rows(a->text_kv) : 0, a->A, a->K, a->E, a->eps};
}
template <class A> int64_t items_of(const A *a) {
  return a->B * a->N * (a->A + 2 * a->K) + (a->text_kv ? a->B * a->L * 2 * a->K : 0);
}

template <class T, int V, int N> fd_status forward(fd_ctx *ctx, const struct fd_heads_fwd_args *a, int lanes) {
  const int64_t items = items_of(a);
  if (items == 0) return FD_OK;
  return FD_CUDA(FD_LAUNCH((heads_forward<T, V, N>), fd::blocks(items, BLOCK / lanes), BLOCK, V == 1 ? WARPS * a->E * sizeof(float) : 0,
                           fd_cuda_stream(ctx), (const T *)a->qkv->data, (const T *)fd::data(a->text_kv), fd::data(a->q_norm), fd::is_bf16(a->q_norm),
                           fd::data(a->k_norm), fd::is_bf16(a->k_norm), (const float *)fd::data(a->rope), (const int *)fd::data(a->pos),
                           (const int *)fd::data(a->text), fd::count_of(a->count), (T *)a->q->data, (T *)a->k->data, (T *)a->v->data,
                           (float *)fd::data(a->q_rstd), (float *)fd::data(a->k_rstd), geometry_of(a), items, lanes));
}

template <class T, int V, int N> fd_status backward(fd_ctx *ctx, const struct fd_heads_bwd_args *a, int lanes) {
  const geometry g = geometry_of(a);
  const int64_t items = items_of(a);
  const bool norms = a->dq_norm || a->dk_norm;
  const unsigned grid = walker_blocks(items);
  float *part_q = norms ? (float *)ctx->scratch : NULL, *part_k = norms ? part_q + (int64_t)grid * a->E : NULL;
  cudaStream_t stream = fd_cuda_stream(ctx);
  fd_status st = FD_OK;
  if (a->dtext_kv && g.text_rows > 0 && !(a->acc >> 14 & 1))
    st = FD_CUDA(FD_LAUNCH(clear_rows<T>, (unsigned)g.text_rows, 128, 0, stream, (T *)a->dtext_kv->data, (const int *)a->text->data, a->B,
                           g.text_rows, fd_tensor_cols(a->dtext_kv)));
  if (st == FD_OK && items > 0)
    st = FD_CUDA(FD_LAUNCH((heads_backward<T, V, N>), grid, BLOCK, V == 1 ? WARPS * a->E * sizeof(float) : 0, stream, (const T *)a->dq->data,
                           (const T *)a->dk->data, (const T *)a->dv->data, (const T *)a->qkv->data, (const T *)fd::data(a->text_kv),
                           fd::data(a->q_norm), fd::is_bf16(a->q_norm), fd::data(a->k_norm), fd::is_bf16(a->k_norm), (const float *)fd::data(a->rope),
                           (const int *)fd::data(a->pos), (const int *)fd::data(a->text), fd::count_of(a->count), (const float *)fd::data(a->q_rstd),
                           (const float *)fd::data(a->k_rstd), (T *)a->dqkv->data, (a->acc >> 13 & 1) != 0, (T *)fd::data(a->dtext_kv),
                           (a->acc >> 14 & 1) != 0, part_q, part_k, g, items, lanes));
  if (st == FD_OK && a->dq_norm)
    st = FD_CUDA((fd::sum_columns<float, 1>(ctx, part_q, (float *)a->dq_norm->data, (a->acc >> 15 & 1) != 0, NULL, grid, grid, a->E)));
  if (st == FD_OK && a->dk_norm)
    st = FD_CUDA((fd::sum_columns<float, 1>(ctx, part_k, (float *)a->dk_norm->data, (a->acc >> 16 & 1) != 0, NULL, grid, grid, a->E)));
  return st;
}

/* The kernels count items in 32 bits. */
template <class A> bool few_items(const A *a) { return items_of(a) < INT32_MAX; }

/* E is 16, 32, .. 512: two vectors of 8 a lane. */
bool by_eights(enum fd_op op, const void *args, int E) { return E >= 16 && E <= MOST_E && (E & (E - 1)) == 0 && fd::aligned(op, args); }

}  // namespace

extern "C" size_t cuda_heads_bwd_scratch(const struct fd_heads_bwd_args *a) {
  return a->dq_norm || a->dk_norm ? (size_t)walker_blocks(items_of(a)) * 2 * (size_t)a->E * sizeof(float) : 0;
}

extern "C" fd_status cuda_heads_fwd(fd_ctx *ctx, const struct fd_heads_fwd_args *a) {
  if (a->E > MOST_E) return FD_FAIL(FD_ERR_UNSUPPORTED, "heads_fwd: head_dim %d, at most %d on CUDA", a->E, MOST_E);
  if (!few_items(a)) return FD_FAIL(FD_ERR_UNSUPPORTED, "heads_fwd: more than 2^31 heads of rows on CUDA");
  const bool bf16 = a->qkv->dtype == FD_BF16;
  if (by_eights(FD_OP_heads_fwd, a, a->E)) return bf16 ? forward<fd::bf16, 8, 2>(ctx, a, a->E / 16) : forward<float, 8, 2>(ctx, a, a->E / 16);
  return bf16 ? forward<fd::bf16, 1, MOST_E / 32>(ctx, a, 32) : forward<float, 1, MOST_E / 32>(ctx, a, 32);
}

extern "C" fd_status cuda_heads_bwd(fd_ctx *ctx, const struct fd_heads_bwd_args *a) {
  if (a->E > MOST_E) return FD_FAIL(FD_ERR_UNSUPPORTED, "heads_bwd: head_dim %d, at most %d on CUDA", a->E, MOST_E);
  if (!few_items(a)) return FD_FAIL(FD_ERR_UNSUPPORTED, "heads_bwd: more than 2^31 heads of rows on CUDA");
  const bool bf16 = a->qkv->dtype == FD_BF16;
  if (by_eights(FD_OP_heads_bwd, a, a->E)) return bf16 ? backward<fd::bf16, 8, 2>(ctx, a, a->E / 16) : backward<float, 8, 2>(ctx, a, a->E / 16);
  return bf16 ? backward<fd::bf16, 1, MOST_E / 32>(ctx, a, 32) : backward<float, 1, MOST_E / 32>(ctx, a, 32);
}
