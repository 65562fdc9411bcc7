// SPDX-License-Identifier: Apache-2.0
// Device-side helpers that the kernels share: elements as floats, sums over a warp, launch sizes, choice by type.
// Invariant: every sum has a fixed order, so the same launch gives the same bits.
#ifndef FD_CUDA_DEVICE_CUH
#define FD_CUDA_DEVICE_CUH

#include "cuda/cuda.h"

namespace fd {

/* ---- elements ---- */

typedef uint16_t bf16; /* as the host has it */

static __device__ __forceinline__ float load(const float *p) { return *p; }
static __device__ __forceinline__ float load(const bf16 *p) { return __uint_as_float((unsigned)*p << 16); }
static __device__ __forceinline__ void store(float *p, float v) { *p = v; }
static __device__ __forceinline__ void store(bf16 *p, float v) { *p = __bfloat16_as_ushort(__float2bfloat16_rn(v)); }
/* Either type, chosen at run time: for small operands (weights of norms, biases). */
static __device__ __forceinline__ float load_any(const void *p, int is_bf16, int64_t i) {
  return is_bf16 ? load((const bf16 *)p + i) : load((const float *)p + i);
}

static __device__ __forceinline__ void store_any(void *p, int is_bf16, int64_t i, float v) {
  if (is_bf16)
    store((bf16 *)p + i, v);
  else
    store((float *)p + i, v);
}

/* V elements at once as they lie in memory (8, 16 or 32 bytes; V = 1: one element), and as floats. */
template <int V> struct pack {
  float f[V];
};
struct float8 {
  float4 a, b;
};
template <class T, int V> struct raw;
template <class T> struct raw<T, 1> { typedef T type; };
template <> struct raw<float, 4> { typedef float4 type; };
template <> struct raw<float, 8> { typedef float8 type; };
template <> struct raw<bf16, 4> { typedef uint2 type; };
template <> struct raw<bf16, 8> { typedef uint4 type; };

/* The width of 16 bytes. */
template <class T> struct wide { enum { V = 16 / sizeof(T) }; };

static __device__ __forceinline__ float low_half(unsigned w) { return __uint_as_float(w << 16); }
static __device__ __forceinline__ float high_half(unsigned w) { return __uint_as_float(w & 0xffff0000u); }
static __device__ __forceinline__ pack<1> unpack(float r) { return pack<1>{{r}}; }
static __device__ __forceinline__ pack<1> unpack(bf16 r) { return pack<1>{{low_half(r)}}; }
static __device__ __forceinline__ pack<4> unpack(float4 r) { return pack<4>{{r.x, r.y, r.z, r.w}}; }
static __device__ __forceinline__ pack<8> unpack(float8 r) { return pack<8>{{r.a.x, r.a.y, r.a.z, r.a.w, r.b.x, r.b.y, r.b.z, r.b.w}}; }
static __device__ __forceinline__ pack<4> unpack(uint2 r) { return pack<4>{{low_half(r.x), high_half(r.x), low_half(r.y), high_half(r.y)}}; }
static __device__ __forceinline__ pack<8> unpack(uint4 r) {
  return pack<8>{{low_half(r.x), high_half(r.x), low_half(r.y), high_half(r.y), low_half(r.z), high_half(r.z), low_half(r.w), high_half(r.w)}};
}

template <int V, class T> static __device__ __forceinline__ typename raw<T, V>::type load_raw(const T *p) {
  return *(const typename raw<T, V>::type *)p;
}
template <int V> static __device__ __forceinline__ typename raw<float, V>::type load_raw(const float *p) {
  if constexpr (V == 8)
    return float8{*(const float4 *)p, *(const float4 *)(p + 4)};
  else
    return *(const typename raw<float, V>::type *)p;
}
template <int V, class T> static __device__ __forceinline__ pack<V> load_pack(const T *p) { return unpack(load_raw<V>(p)); }
/* Either type, chosen at run time: norm weights and columns of mod. */
template <int V> static __device__ __forceinline__ pack<V> load_pack_any(const void *p, int is_bf16, int64_t i) {
  return is_bf16 ? load_pack<V>((const bf16 *)p + i) : load_pack<V>((const float *)p + i);
}
template <int V> static __device__ __forceinline__ pack<V> same(float v) {
  pack<V> p;
  for (int k = 0; k < V; k++) p.f[k] = v;
  return p;
}

/* One store of 8 or 16 bytes. As an assignment nvcc 13.0 takes some of them apart into words, at four times the transactions. */
template <class R> static __device__ __forceinline__ void store_raw(R *p, R v) {
#ifdef FD_EMULATE
  *p = v;
#else
  if constexpr (sizeof(R) == 16) {
    const uint4 w = *(const uint4 *)&v;
    asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(p), "r"(w.x), "r"(w.y), "r"(w.z), "r"(w.w) : "memory");
  } else {
    const uint2 w = *(const uint2 *)&v;
    asm volatile("st.global.v2.b32 [%0], {%1, %2};" ::"l"(p), "r"(w.x), "r"(w.y) : "memory");
  }
#endif
}
static __device__ __forceinline__ unsigned two_halves(float a, float b) {
  return __bfloat16_as_ushort(__float2bfloat16_rn(a)) | (unsigned)__bfloat16_as_ushort(__float2bfloat16_rn(b)) << 16;
}
template <int V> static __device__ __forceinline__ void store_pack(float *p, const pack<V> &v) {
  if constexpr (V == 1)
    *p = v.f[0];
  else
    for (int i = 0; i < V; i += 4) store_raw((float4 *)(p + i), make_float4(v.f[i], v.f[i + 1], v.f[i + 2], v.f[i + 3]));
}
template <int V> static __device__ __forceinline__ void store_pack(bf16 *p, const pack<V> &v) {
  if constexpr (V == 1)
    store(p, v.f[0]);
  else if constexpr (V == 4)
    store_raw((uint2 *)p, make_uint2(two_halves(v.f[0], v.f[1]), two_halves(v.f[2], v.f[3])));
  else
    store_raw((uint4 *)p,
              make_uint4(two_halves(v.f[0], v.f[1]), two_halves(v.f[2], v.f[3]), two_halves(v.f[4], v.f[5]), two_halves(v.f[6], v.f[7])));
}
template <int V> static __device__ __forceinline__ void store_pack_any(void *p, int is_bf16, int64_t i, const pack<V> &v) {
  if (is_bf16)
    store_pack<V>((bf16 *)p + i, v);
  else
    store_pack<V>((float *)p + i, v);
}

/* ---- sums ---- */

static __device__ __forceinline__ float warp_sum(float v) {
  for (int i = 16; i > 0; i /= 2) v += __shfl_xor_sync(0xffffffffu, v, i);
  return v;
}
static __device__ __forceinline__ double warp_sum(double v) {
  for (int i = 16; i > 0; i /= 2) v += __shfl_xor_sync(0xffffffffu, v, i);
  return v;
}

/* Sum over a block of at most 1024 threads (whole warps); every thread gets it. `slots` is shared memory of 32 values. */
template <class F> static __device__ __forceinline__ F block_sum(F v, F *slots) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = (blockDim.x + 31) / 32;
  v = warp_sum(v);
  __syncthreads(); /* slots may still be read from the sum before */
  if (lane == 0) slots[warp] = v;
  __syncthreads();
  F sum = 0;
  for (int w = 0; w < warps; w++) sum += slots[w];
  return sum;
}

/* ---- rows in use ---- */

static __device__ __forceinline__ int64_t rows_in_use(const int *count, int64_t capacity) {
  return count ? min((int64_t)*count, capacity) : capacity;
}

/* ---- tiles: sums over the rows of a matrix ---- */

/* A block of TILE threads as `lanes` vectors of V columns by TILE / lanes rows: full warps' loads are contiguous where the matrix is
 * wide, and no thread is idle where it is narrow. */
enum { TILE = 256 };

/* Sum over the threads of a column (those of equal threadIdx.x % lanes), as a tree; the first `lanes` threads get it.
 * `slots` is shared memory of V TILE floats. */
template <int V> static __device__ __forceinline__ pack<V> tile_sum(pack<V> v, int lanes, float *slots) {
  const int t = threadIdx.x;
  __syncthreads(); /* slots may still be read from the sum before */
  for (int k = 0; k < V; k++) slots[k * TILE + t] = v.f[k];
  for (int h = TILE / 2; h >= lanes; h /= 2) {
    __syncthreads();
    if (t < h)
      for (int k = 0; k < V; k++) slots[k * TILE + t] += slots[k * TILE + t + h];
  }
  if (t < lanes)
    for (int k = 0; k < V; k++) v.f[k] = slots[k * TILE + t];
  return v;
}

/* y[chunk, c] = (acc: y +) sum of x[r, c] over the chunk's rows. Grid: blocks of columns (there may be more than 65535), chunks. */
template <class T, int V>
static __global__ void __launch_bounds__(TILE)
    column_sums(const T *x, float *y, bool acc, const int *count, int64_t rows, int64_t per_chunk, int64_t cols, int lanes) {
  __shared__ float slots[V * TILE];
  const int64_t chunk = blockIdx.y, d = V * ((int64_t)blockIdx.x * lanes + threadIdx.x % lanes);
  const int64_t last = min((chunk + 1) * per_chunk, rows_in_use(count, rows));
  pack<V> sum = same<V>(0.0f);
  if (d < cols) {
#pragma unroll 4
    for (int64_t r = chunk * per_chunk + threadIdx.x / lanes; r < last; r += TILE / lanes) {
      const pack<V> v = load_pack<V>(x + r * cols + d);
      for (int k = 0; k < V; k++) sum.f[k] += v.f[k];
    }
  }
  sum = tile_sum<V>(sum, lanes, slots);
  if ((int)threadIdx.x < lanes && d < cols) {
    if (acc) {
      const pack<V> old = load_pack<V>(y + chunk * cols + d);
      for (int k = 0; k < V; k++) sum.f[k] += old.f[k];
    }
    store_pack<V>(y + chunk * cols + d, sum);
  }
}

/* ---- activations: derivative beside value ---- */

/* 2^x and 1 / x as the multiprocessor has them: off by 2^-22 of the result at most, so for what is rounded to bf16. */
static __device__ __forceinline__ float rough_exp2(float x) {
#ifdef FD_EMULATE
  return exp2f(x);
#else
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#endif
}
static __device__ __forceinline__ float rough_inverse(float x) {
#ifdef FD_EMULATE
  return 1.0f / x;
#else
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#endif
}

static __device__ __forceinline__ float gelu_inner(float x) { return 0.7978845608028654f * (x + 0.044715f * x * x * x); }

/* Value and derivative of an activation: one exponential and one division for both. T: the type that results are rounded to. */
struct value_slope {
  float value, slope;
};
template <class T> static __device__ __forceinline__ value_slope act_both(int act, float x) {
  if (act == FD_ACT_SILU || act == FD_ACT_GELU_TANH) {
    /* x sigmoid(u), u = x; gelu: 1 + tanh(z) = 2 sigmoid(2 z), u = 2 z */
    const bool gelu = act == FD_ACT_GELU_TANH;
    if constexpr (sizeof(T) == 2) {
      const float log2e = 1.4426950408889634f, a = 2.0f * 0.7978845608028654f, b = 0.044715f * a, square = gelu ? x * x : 0.0f;
      const float s = rough_inverse(1.0f + rough_exp2(x * (gelu ? fmaf(square, -b * log2e, -a * log2e) : -log2e)));
      return value_slope{x * s, fmaf(x * fmaf(-s, s, s), gelu ? fmaf(square, 3.0f * b, a) : 1.0f, s)};
    }
    /* and sigmoid(-u) without cancellation */
    const float u = gelu ? 2.0f * gelu_inner(x) : x, slope = gelu ? 2.0f * 0.7978845608028654f * (1.0f + 3.0f * 0.044715f * x * x) : 1.0f;
    const float e = expf(-fabsf(u)), r = __fdividef(1.0f, 1.0f + e), small = e * r, s = u > 0 ? r : small;
    return value_slope{x * s, s * (1.0f + x * (u > 0 ? small : r) * slope)};
  }
  if (act == FD_ACT_GELU_ERF) {
    const float half = 0.5f * erfcf(x * -0.7071067811865476f);
    return value_slope{x * half, half + x * 0.3989422804014327f * expf(-0.5f * x * x)};
  }
  return value_slope{x, 1.0f};
}
template <class T> static __device__ __forceinline__ float act_value(int act, float x) { return act_both<T>(act, x).value; }
template <class T> static __device__ __forceinline__ float act_slope(int act, float x) { return act_both<T>(act, x).slope; }

/* ---- host side ---- */

static inline const void *data(const fd_tensor *t) { return t ? t->data : NULL; }
static inline int is_bf16(const fd_tensor *t) { return t && t->dtype == FD_BF16; }
static inline const int *count_of(const fd_tensor *t) { return t ? (const int *)t->data : NULL; }
static inline unsigned blocks(int64_t n, int64_t per_block) { return (unsigned)((n + per_block - 1) / per_block); }
/* Grid of a loop over n items that strides by the grid: enough blocks to fill the device, no more. */
static inline unsigned stride_blocks(fd_ctx *ctx, int64_t n, int per_block) {
  const int64_t want = (n + per_block - 1) / per_block, most = 8 * (int64_t)fd_cuda_of(ctx)->sm_count;
  return (unsigned)(want < most ? want : most);
}
/* Every float tensor of an op begins at a multiple of 16 bytes. */
static inline bool aligned(enum fd_op op, const void *args) {
  const struct fd_op_info *info = fd_op_info(op);
  fd_tensor *const *slot = (fd_tensor *const *)args;
  for (int s = 0; s < info->n_slots; s++)
    if (slot[s] && (slot[s]->dtype == FD_F32 || slot[s]->dtype == FD_BF16) && (uintptr_t)slot[s]->data % 16 != 0) return false;
  return true;
}

/* Calls f<T, V>(...) for the tensor's type, with V of 16 bytes if `lengths` allow it: lengths of rows and first columns that must be multiples
 * of V, joined by |, which keeps the bits that matter. */
#define FD_BY_TYPE(op, args, tensor, lengths, f, ...)                                                                        \
  ((tensor)->dtype == FD_BF16 ? ((lengths) % 8 == 0 && fd::aligned(op, args) ? f<fd::bf16, 8>(__VA_ARGS__) : f<fd::bf16, 1>(__VA_ARGS__)) \
                              : ((lengths) % 4 == 0 && fd::aligned(op, args) ? f<float, 4>(__VA_ARGS__) : f<float, 1>(__VA_ARGS__)))

/* A tile's lanes for rows of `vectors` vectors: a power of two, at most a warp. */
static inline int tile_lanes(int64_t vectors) {
  int lanes = 1;
  while (lanes < 32 && lanes < vectors) lanes *= 2;
  return lanes;
}
/* Rows of one partial sum: at least `least`, and few enough sums that they cost nothing. By shape only: the same bits on every device. */
static inline int64_t chunk_rows(int64_t rows, int64_t cols, int64_t least) {
  const int64_t most = 1 + 1024 * 256 / (cols + 256), even = (rows + most - 1) / most;
  return even > least ? even : least;
}
/* Rows in n groups that have sums of their own (the samples of a batch), each split so that the device is full: 512 blocks of 256 columns, if a
 * split has `least` rows then. */
struct groups {
  int64_t n, splits, per_split;
};
static inline groups groups_of(int64_t rows, int64_t per_group, int64_t cols, int64_t least) {
  const int64_t n = per_group > 0 ? (rows + per_group - 1) / per_group : 0;
  const int64_t tiles = n * ((cols + 255) / 256), want = tiles > 0 ? (512 + tiles - 1) / tiles : 1;
  int64_t splits = (per_group + least - 1) / least;
  if (splits > want) splits = want;
  if (splits < 1) splits = 1;
  const int64_t per_split = (per_group + splits - 1) / splits;
  return groups{n, splits, per_split};
}
/* y [chunks, cols] = column sums of x [rows, cols], per_chunk rows each. */
template <class T, int V>
static inline cudaError_t sum_columns(fd_ctx *ctx, const T *x, float *y, bool acc, const int *count, int64_t rows, int64_t per_chunk,
                                      int64_t cols) {
  const unsigned chunks = rows > 0 ? blocks(rows, per_chunk) : 1 /* the sum of nothing */;
  int lanes = tile_lanes(cols / V);
  while (lanes * V * (int)sizeof(T) > 32 && blocks(cols, V * lanes) * (int64_t)chunks < 64) lanes /= 2; /* a narrow matrix: more blocks, of whole sectors */
  const dim3 grid(blocks(cols, V * lanes), chunks);
  return FD_LAUNCH((column_sums<T, V>), grid, TILE, 0, fd_cuda_stream(ctx), x, y, acc, count, rows, per_chunk, cols, lanes);
}

}  // namespace fd

#endif
