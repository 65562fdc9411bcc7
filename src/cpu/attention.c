// SPDX-License-Identifier: Apache-2.0
// Attention over ranges of rows, forward and backward, in tiles with a running maximum (Dao et al. 2022). A task is one sequence and
// one kv head; the A / K query heads that read it are stacked, so that a tile has rows of several heads. Tasks write
// disjoint rows and each is done by one thread, so results do not depend on the number of threads.
//
// The products are our own register blocks (attention_kernel.h): a call of oneDNN costs 1 us, the whole of a small head less.
// bf16 operands are multiplied as they are where the CPU can; probabilities and their gradients are rounded to bf16 before they
// are multiplied, sums are f32. Elsewhere everything is widened to f32 (nothing is rounded then).
#include <math.h>
#include <stdlib.h>
#include <string.h>

#if defined __x86_64__
#include <immintrin.h>
#endif

/* gcc would stay with 256 bits; clang does not know the word and takes what the types say. */
#ifdef __clang__
#define WIDE ""
#else
#define WIDE ",prefer-vector-width=512"
#endif

#include "cpu/dnnl.h"
#include "cpu/vmath.h"

enum {
  TILE_KEYS = 512, /* most keys of a tile: all of a 256 px picture and its text */
};

struct kernel {
  bool bf16; /* operands are pairs of bf16 */
  void (*product)(int64_t M, int64_t N, int64_t K, const uint32_t *A, int64_t ai, int64_t ak, const uint32_t *B, int64_t panel, int64_t skip,
                  float *C, int64_t ldc, bool add);
  void (*cap)(float *s, int64_t lo, int64_t hi, float softcap, float scale);
  float (*softmax)(float *s, int64_t n, int64_t lo, int64_t hi, float c, float *m, float *sum, void *p);
  void (*scale_row)(float *x, int64_t n, float by);
  void (*finish)(const float *most, float *sum, float *lse, int64_t rows);
  void (*dsoftmax)(float *s, float *dp, int64_t n, int64_t lo, int64_t hi, float c, float lse, float delta, float scale, float softcap);
  void (*pair_rows)(const float *a, const float *b, int64_t n, uint32_t *words);
  void (*to_words)(const float *a, int64_t n, uint32_t *words);
  void (*pack_rows)(const void *src, bool bf16, const int64_t *row, int64_t rows, int64_t pad_rows, int64_t E, uint32_t *out);
  void (*pack_columns)(const void *src, bool bf16, const int64_t *row, int64_t rows, int64_t E, uint32_t *out);
  void (*pack_inner)(const void *src, bool bf16, const int64_t *row, int64_t rows, int64_t pad_rows, int64_t E, uint32_t *out);
  void (*put_row)(void *dst, bool bf16, int64_t at, const float *x, int64_t E, float by, bool add);
  float (*dot_rows)(const void *a, const void *b, bool bf16, int64_t at, int64_t E);
};

/* ---- the levels ------------------------------------------------------------------------------------------------------ */

#if defined __x86_64__

#define TARGET __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma" WIDE)))
#define V __m512
#define VL 16
#define V_LOAD(p) _mm512_loadu_ps(p)
#define V_STORE(p, v) _mm512_storeu_ps(p, v)
#define V_SET(x) _mm512_set1_ps(x)
#define V_WORD(p) _mm512_set1_ps(*(const float *)(p))
#define V_MAX(a, b) _mm512_max_ps(a, b)
#define V_FMA(a, b, c) _mm512_fmadd_ps(a, b, c)
#define V_DOT(a, b, c) _mm512_fmadd_ps(a, b, c)
#define V_KEEP(v, a, b) keep_512(v, a, b)
#define V_TOP(v) _mm512_reduce_max_ps(v)
#define V_SUM(v) _mm512_reduce_add_ps(v)
#define MR 12
#define NV 2
#define BF16 0
#define WORDS(n) (n)
#define VI vi_512
#define NAME(x) x##_avx512
typedef uint32_t vi_512 __attribute__((vector_size(64)));
TARGET CPU_INLINE __m512 keep_512(__m512 v, int64_t a, int64_t b) {
  unsigned below = b >= 16 ? 0xffffu : (1u << b) - 1, under = a <= 0 ? 0 : (1u << a) - 1;
  return _mm512_mask_mov_ps(_mm512_set1_ps(-INFINITY), (__mmask16)(below & ~under), v);
}
#include "cpu/attention_kernel.h"
#undef TARGET
#undef V_DOT
#undef BF16
#undef WORDS
#undef NAME

#define TARGET __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,avx2,fma" WIDE)))
#define V_DOT(a, b, c) _mm512_dpbf16_ps(c, (__m512bh)(a), (__m512bh)(b))
#define BF16 1
#define WORDS(n) (((n) + 1) / 2)
#define NAME(x) x##_avx512_bf16
#include "cpu/attention_kernel.h"
#undef TARGET
#undef V
#undef VL
#undef V_LOAD
#undef V_STORE
#undef V_SET
#undef V_WORD
#undef V_MAX
#undef V_KEEP
#undef V_TOP
#undef V_SUM
#undef V_FMA
#undef V_DOT
#undef MR
#undef BF16
#undef WORDS
#undef VI
#undef NAME

#define TARGET __attribute__((target("avx2,fma")))
#define V __m256
#define VL 8
#define V_LOAD(p) _mm256_loadu_ps(p)
#define V_STORE(p, v) _mm256_storeu_ps(p, v)
#define V_SET(x) _mm256_set1_ps(x)
#define V_WORD(p) _mm256_broadcast_ss((const float *)(p))
#define V_MAX(a, b) _mm256_max_ps(a, b)
#define V_FMA(a, b, c) _mm256_fmadd_ps(a, b, c)
#define V_DOT(a, b, c) _mm256_fmadd_ps(a, b, c)
#define V_KEEP(v, a, b) keep_256(v, a, b)
#define V_TOP(v) top_256(v)
#define V_SUM(v) sum_256(v)
#define MR 6
#define BF16 0
#define WORDS(n) (n)
#define VI vi_256
#define NAME(x) x##_avx2
typedef uint32_t vi_256 __attribute__((vector_size(32)));
TARGET CPU_INLINE __m256 keep_256(__m256 v, int64_t a, int64_t b) {
  const __m256 i = _mm256_setr_ps(0, 1, 2, 3, 4, 5, 6, 7);
  __m256 in = _mm256_and_ps(_mm256_cmp_ps(i, _mm256_set1_ps((float)a), _CMP_GE_OQ), _mm256_cmp_ps(i, _mm256_set1_ps((float)b), _CMP_LT_OQ));
  return _mm256_blendv_ps(_mm256_set1_ps(-INFINITY), v, in);
}
TARGET CPU_INLINE float top_256(__m256 v) {
  __m128 x = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  x = _mm_max_ps(x, _mm_movehl_ps(x, x));
  return _mm_cvtss_f32(_mm_max_ss(x, _mm_movehdup_ps(x)));
}
TARGET CPU_INLINE float sum_256(__m256 v) {
  __m128 x = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  x = _mm_add_ps(x, _mm_movehl_ps(x, x));
  return _mm_cvtss_f32(_mm_add_ss(x, _mm_movehdup_ps(x)));
}
#include "cpu/attention_kernel.h"
#undef TARGET
#undef V
#undef VL
#undef V_LOAD
#undef V_STORE
#undef V_SET
#undef V_WORD
#undef V_MAX
#undef V_KEEP
#undef V_TOP
#undef V_SUM
#undef V_FMA
#undef V_DOT
#undef MR
#undef NV
#undef BF16
#undef WORDS
#undef VI
#undef NAME

#endif

/* Any CPU: what the compiler makes of four floats. */
typedef float v_any __attribute__((vector_size(16)));
typedef uint32_t vi_any __attribute__((vector_size(16)));
CPU_INLINE v_any any_load(const float *p) {
  v_any v;
  memcpy(&v, p, sizeof v);
  return v;
}
CPU_INLINE v_any any_set(float x) { return (v_any){x, x, x, x}; }
CPU_INLINE v_any any_max(v_any a, v_any b) {
  for (int i = 0; i < 4; i++) b[i] = a[i] > b[i] ? a[i] : b[i];
  return b;
}
CPU_INLINE v_any any_keep(v_any v, int64_t a, int64_t b) {
  for (int i = 0; i < 4; i++) v[i] = i >= a && i < b ? v[i] : -INFINITY;
  return v;
}
CPU_INLINE float any_top(v_any v) {
  for (int i = 1; i < 4; i++) v[0] = v[i] > v[0] ? v[i] : v[0];
  return v[0];
}
#define TARGET
#define V v_any
#define VL 4
#define V_LOAD(p) any_load(p)
#define V_STORE(p, v) memcpy(p, &(v), sizeof(v))
#define V_SET(x) any_set(x)
#define V_WORD(p) any_set(*(const float *)(p))
#define V_MAX(a, b) any_max(a, b)
#define V_FMA(a, b, c) ((a) * (b) + (c))
#define V_DOT(a, b, c) ((a) * (b) + (c))
#define V_KEEP(v, a, b) any_keep(v, a, b)
#define V_TOP(v) any_top(v)
#define V_SUM(v) (((v)[0] + (v)[2]) + ((v)[1] + (v)[3]))
#define MR 4
#define NV 2
#define BF16 0
#define WORDS(n) (n)
#define VI vi_any
#define NAME(x) x##_any
#include "cpu/attention_kernel.h"

/* oneDNN's view of the CPU, so that DNNL_MAX_CPU_ISA limits these kernels too. */
static const struct kernel *kernel_for(fd_dtype type) {
#if defined __x86_64__
  unsigned isa = (unsigned)dnnl_get_effective_cpu_isa();
#define HAS(level) ((isa & (unsigned)(level)) == (unsigned)(level))
  if (type == FD_BF16 && HAS(dnnl_cpu_isa_avx512_core_bf16)) return &kernel_avx512_bf16;
  if (HAS(dnnl_cpu_isa_avx512_core)) return &kernel_avx512;
  if (HAS(dnnl_cpu_isa_avx2)) return &kernel_avx2;
#undef HAS
#endif
  (void)type;
  return &kernel_any;
}

/* ---- sizes ----------------------------------------------------------------------------------------------------------- */

static int64_t pad_to(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }
static int64_t words(const struct kernel *k, int64_t n) { return k->bf16 ? (n + 1) / 2 : n; }

/* Rows of a tile: as many as keep it in the second-level cache. Multiples of 12 (register blocks) and of 4. */
enum { MOST_ROWS = 96 };
static int64_t tile_rows(int64_t E) { return E <= 128 ? MOST_ROWS : 48; }

struct scratch { /* of one thread, in 4-byte words; every part a multiple of 16 */
  int64_t kt, vt, k, v, q, q2, d, d2, s, dp, p, ds, p2, ds2, o, dk, dv, rows, total;
};

static struct scratch scratch_of(const struct kernel *k, int64_t max_q, int64_t max_k, int64_t group, int64_t E, bool backward) {
  struct scratch z = {0};
  int64_t at = 0, keys = pad_to(max_k, 16), cols = pad_to(E, 16), R = tile_rows(E), T = keys < TILE_KEYS ? keys : TILE_KEYS;
  if (R > pad_to(max_q * group, 4)) R = pad_to(max_q * group, 4);
#define PART(name, n) z.name = at, at += pad_to((n), 16)
  PART(kt, keys * words(k, E));
  PART(q, R * words(k, E));
  PART(s, R * T);
  PART(o, R * cols);
  PART(rows, 4 * (R + keys)); /* element offsets (64 bits) and sums of rows */
  if (!backward) {
    PART(v, cols * words(k, keys));
    PART(p, R * words(k, T));
  } else {
    PART(vt, keys * words(k, E));
    PART(k, cols * words(k, keys));
    PART(q2, cols * words(k, R));
    PART(d, R * words(k, E));
    PART(d2, cols * words(k, R));
    PART(dp, R * T);
    PART(ds, k->bf16 ? R * words(k, T) : 0);
    PART(p2, k->bf16 ? words(k, R) * T : 0);
    PART(ds2, k->bf16 ? words(k, R) * T : 0);
    PART(dk, keys * cols);
    PART(dv, keys * cols);
  }
#undef PART
  z.total = at;
  return z;
}

/* What both directions need to know. */
struct job {
  const struct kernel *kernel;
  const fd_tensor *q, *k, *v, *ranges;
  int A, K;
  int64_t E, group, window, max_q, max_k;
  float scale, softcap;
  bool causal, bf16;
  struct scratch z;
};

#define ATTENTION_CHECKS(op)                                                                                                          \
  do {                                                                                                                                \
    CPU_CHECK_ARG(op, a->A >= 1 && a->K >= 1 && a->A % a->K == 0, "A = %d, expected a multiple of K = %d", a->A, a->K);               \
    CPU_CHECK_ARG(op, a->E >= 1, "E = %d, expected 1 or more", a->E);                                                                 \
    CPU_CHECK_ARG(op, a->scale > 0, "scale = %g, expected more than 0", (double)a->scale);                                            \
    CPU_CHECK_ARG(op, a->softcap >= 0 && a->window >= 0, "softcap = %g, window = %lld, expected 0 or more", (double)a->softcap,       \
                  (long long)a->window);                                                                                              \
    CPU_CHECK_ARG(op, a->max_q >= 0 && a->max_k >= 0, "max_q, max_k = %lld, %lld, expected 0 or more", (long long)a->max_q,           \
                  (long long)a->max_k);                                                                                               \
    CPU_CHECK_ARG(op, (a->q_stride == 0 && a->k_stride == 0) || (a->q_stride >= a->max_q && a->k_stride >= a->max_k && a->k_stride > 0), \
                  "q_stride, k_stride = %lld, %lld, expected 0, 0 or at least max_q, max_k", (long long)a->q_stride, (long long)a->k_stride); \
    CPU_CHECK(op, q, fd_tensor_numel(a->q) % ((int64_t)a->A * a->E) == 0 && a->q->ndim >= 1, "[rows, %d, %d]", a->A, a->E);           \
    CPU_CHECK(op, k, fd_tensor_numel(a->k) % ((int64_t)a->K * a->E) == 0 && a->k->ndim >= 1, "[rows, %d, %d]", a->K, a->E);           \
    CPU_CHECK(op, v, fd_tensor_numel(a->v) == fd_tensor_numel(a->k), "as many elements as k, %lld", (long long)fd_tensor_numel(a->k)); \
    CPU_CHECK(op, ranges, a->ranges->ndim >= 1 && fd_tensor_cols(a->ranges) == 4, "[S, 4]");                                          \
    CPU_CHECK(op, o, fd_tensor_numel(a->o) == fd_tensor_numel(a->q), "as many elements as q, %lld", (long long)fd_tensor_numel(a->q)); \
    CPU_CHECK(op, lse, fd_tensor_numel(a->lse) * a->E == fd_tensor_numel(a->q), "[rows, %d]", a->A);                                  \
  } while (0)

#define JOB(backward_)                                                                                                          \
  {                                                                                                                             \
    .kernel = kernel_for(a->q->dtype), .q = a->q, .k = a->k, .v = a->v, .ranges = a->ranges, .A = a->A, .K = a->K, .E = a->E,      \
    .group = a->A / a->K, .window = a->window, .max_q = a->max_q, .max_k = a->max_k, .scale = a->scale, .softcap = a->softcap,   \
    .causal = a->causal != 0, .bf16 = a->q->dtype == FD_BF16,                                                                   \
    .z = scratch_of(kernel_for(a->q->dtype), a->max_q, a->max_k, a->A / a->K, a->E, backward_)                                   \
  }

static fd_status check_ranges(enum fd_op op, const struct job *j) {
  int64_t q_rows = fd_tensor_numel(j->q) / (j->A * j->E), k_rows = fd_tensor_numel(j->k) / (j->K * j->E);
  const int32_t *r = j->ranges->data;
  for (int64_t s = 0; s < fd_tensor_rows(j->ranges); s++, r += 4)
    if (r[0] < 0 || r[1] < 0 || r[2] < 0 || r[3] < 0 || r[0] + (int64_t)r[1] > q_rows || r[2] + (int64_t)r[3] > k_rows ||
        r[1] > j->max_q || r[3] > j->max_k)
      return fd_op_wrong_arg(op, "ranges[%lld] = %d, %d, %d, %d, expected within %lld and %lld rows, at most %lld and %lld of them", (long long)s,
                           r[0], r[1], r[2], r[3], (long long)q_rows, (long long)k_rows, (long long)j->max_q, (long long)j->max_k);
  return FD_OK;
}

/* Keys that queries first .. last of a sequence of M keys may see: [lo, hi). */
static void keys_seen(const struct job *j, int64_t M, int64_t first, int64_t last, int64_t *lo, int64_t *hi) {
  *lo = j->window > 0 && first - j->window + 1 > 0 ? first - j->window + 1 : 0;
  *hi = j->causal && last + 1 < M ? last + 1 : M;
  if (*hi < *lo) *hi = *lo;
}

/* Columns of a tile of n keys, where `left` padded ones follow: whole panels, as they were packed. */
static int64_t tile_width(int64_t n, int64_t left) { return pad_to(n, 32) < left ? pad_to(n, 32) : left; }

/* What of keys [a, b) lies in the tile of n keys that begins at k0. */
static void clip(int64_t *a, int64_t *b, int64_t k0, int64_t n) {
  *a = *a < k0 ? 0 : *a - k0 > n ? n : *a - k0;
  *b = *b < k0 ? 0 : *b - k0 > n ? n : *b - k0;
  if (*b < *a) *b = *a;
}

#define LOG2E 1.44269504088896341f

/* Whether each query has keys of its own. */
static bool is_banded(const struct job *j) { return j->causal || j->window > 0; }

/* Offsets of `rows` stacked rows: queries from n0 on, the heads of group h of each; the first is row r0. */
static void query_rows(const struct job *j, const int32_t *range, int h, int64_t n0, int64_t r0, int64_t rows, int64_t *row) {
  int64_t g = r0 % j->group, at = ((range[0] + n0 + r0 / j->group) * j->A + h * j->group) * j->E;
  for (int64_t r = 0; r < rows; r++) {
    row[r] = at + g * j->E;
    if (++g == j->group) g = 0, at += j->A * j->E;
  }
}

/* ---- forward --------------------------------------------------------------------------------------------------------- */

/* Queries [n0, n1) of sequence `range`, kv head h. */
static void forward(const struct job *j, const int32_t *range, int h, int64_t n0, int64_t n1, uint32_t *mem, fd_tensor *o, float *lse) {
  const struct kernel *f = j->kernel;
  int64_t E = j->E, W = words(f, E), cols = pad_to(E, 16), R = tile_rows(E), lo, hi;
  float c = (j->softcap > 0 ? 1.0f : j->scale) * LOG2E;
  bool banded = is_banded(j);
  int64_t *key_row = (int64_t *)(mem + j->z.rows);
  keys_seen(j, range[3], n0, n1 - 1, &lo, &hi);
  lo = lo / 32 * 32; /* panels begin at the same keys whatever the block */
  int64_t M = hi - lo, keys = pad_to(M, 16), v_panel = 32 * words(f, keys);
  for (int64_t m = 0; m < M; m++) key_row[m] = ((range[2] + lo + m) * j->K + h) * E;
  f->pack_columns(j->k->data, j->bf16, key_row, M, E, mem + j->z.kt);
  f->pack_inner(j->v->data, j->bf16, key_row, M, keys, E, mem + j->z.v);
  int64_t *row = key_row + pad_to(j->max_k, 16);
  float *s = (float *)(mem + j->z.s), *out = (float *)(mem + j->z.o);
  uint32_t *p = mem + j->z.p;
  int64_t rows_all = (n1 - n0) * j->group;
  for (int64_t r0 = 0; r0 < rows_all; r0 += R) {
    int64_t rows = rows_all - r0 < R ? rows_all - r0 : R, pad = pad_to(rows, 4), tile_lo, tile_hi;
    float most[MOST_ROWS], sum[MOST_ROWS], logs[MOST_ROWS];
    query_rows(j, range, h, n0, r0, rows, row);
    for (int64_t r = 0; r < rows; r++) most[r] = -INFINITY, sum[r] = 0;
    f->pack_rows(j->q->data, j->bf16, row, rows, pad, E, mem + j->z.q);
    keys_seen(j, range[3], n0 + r0 / j->group, n0 + (r0 + rows - 1) / j->group, &tile_lo, &tile_hi);
    int64_t begin = (tile_lo - lo) / 32 * 32, end = tile_hi - lo;
    bool first = true;
    for (int64_t k0 = begin; k0 < end; k0 += TILE_KEYS, first = false) {
      int64_t n = end - k0 < TILE_KEYS ? end - k0 : TILE_KEYS, T = tile_width(n, keys - k0), pw = words(f, T);
      f->product(pad, T, W, mem + j->z.q, W, 1, mem + j->z.kt + k0 * W, 32 * W, 0, s, T, false);
      for (int64_t r = 0; r < rows; r++) {
        int64_t a = 0, b = n;
        if (banded) {
          int64_t i = n0 + (r0 + r) / j->group;
          keys_seen(j, range[3], i, i, &a, &b);
          clip(&a, &b, lo + k0, n);
        }
        if (a == b) {
          memset(p + r * pw, 0, (size_t)pw * 4);
          continue;
        }
        if (j->softcap > 0) f->cap(s + r * T, a, b, j->softcap, j->scale);
        float factor = f->softmax(s + r * T, T, a, b, c, &most[r], &sum[r], p + r * pw);
        if (!first && factor != 1.0f) f->scale_row(out + r * cols, cols, factor);
      }
      if (pad > rows) memset(p + rows * pw, 0, (size_t)((pad - rows) * pw) * 4);
      f->product(pad, cols, pw, p, pw, 1, mem + j->z.v, v_panel, words(f, k0), out, cols, !first);
    }
    if (first) memset(out, 0, (size_t)(pad * cols) * 4);
    f->finish(most, sum, logs, rows);
    for (int64_t r = 0, at = row[0] / E, g = r0 % j->group; r < rows; r++) {
      f->put_row(o->data, j->bf16, row[r], out + r * cols, E, sum[r], false);
      lse[at++] = logs[r];
      if (++g == j->group) g = 0, at += j->A - j->group;
    }
  }
}

enum { LEAST_ROWS = 128 };

/* Few sequences on many threads: each one's queries are cut into blocks of whole tiles, so that a tile has the same rows and
 * results have the same bits however many blocks there are. */
static int64_t block_start(const struct job *j, int64_t queries, int64_t blocks, int64_t block) {
  int64_t R = tile_rows(j->E), unit = R;
  for (int64_t a = j->group, b = R; b;) { /* unit = R / gcd(R, group): that many queries are whole tiles */
    int64_t rest = a % b;
    a = b, b = rest, unit = R / a;
  }
  int64_t start = cpu_cut((queries + unit - 1) / unit, blocks, block) * unit;
  return start < queries ? start : queries;
}

static int64_t blocks_of(const fd_ctx *ctx, const struct job *j, int64_t S) {
  int64_t most = (j->max_q * j->group + LEAST_ROWS - 1) / LEAST_ROWS, want = S > 0 ? (2 * ctx->n_threads + S * j->K - 1) / (S * j->K) : 1;
  if (ctx->n_threads == 1) want = 1;
  return want < 1 || most < 1 ? 1 : want < most ? want : most;
}

fd_status cpu_attention_fwd_prepare(fd_ctx *ctx, const struct fd_attention_fwd_args *a, size_t *scratch_bytes) {
  ATTENTION_CHECKS(attention_fwd);
  struct job j = JOB(false);
  *scratch_bytes = (size_t)(ctx->n_threads * j.z.total) * 4;
  return FD_OK;
}

fd_status cpu_attention_fwd(fd_ctx *ctx, const struct fd_attention_fwd_args *a) {
  struct job j = JOB(false);
  int64_t S = fd_tensor_rows(a->ranges), blocks = blocks_of(ctx, &j, S), tasks = S * a->K * blocks;
  const int32_t *ranges = a->ranges->data;
  uint32_t *scratch = ctx->scratch;
  fd_status st = check_ranges(FD_OP_attention_fwd, &j);
  if (st != FD_OK) return st;
  #pragma omp parallel for schedule(static, 1) num_threads(ctx->n_threads) if (tasks > 1)
  for (int64_t t = 0; t < tasks; t++) {
    const int32_t *range = ranges + t / blocks / a->K * 4;
    int64_t n0 = block_start(&j, range[1], blocks, t % blocks), n1 = block_start(&j, range[1], blocks, t % blocks + 1);
    if (n1 > n0)
      forward(&j, range, (int)(t / blocks % a->K), n0, n1, scratch + omp_get_thread_num() * j.z.total, a->o, a->lse->data);
  }
  return FD_OK;
}

/* ---- backward -------------------------------------------------------------------------------------------------------- */

static void backward(const struct job *j, const int32_t *range, int h, uint32_t *mem, const struct fd_attention_bwd_args *a) {
  const struct kernel *f = j->kernel;
  int64_t E = j->E, W = words(f, E), cols = pad_to(E, 16), R = tile_rows(E), M = range[3], keys = pad_to(M, 16);
  float c = (j->softcap > 0 ? 1.0f : j->scale) * LOG2E;
  int64_t *key_row = (int64_t *)(mem + j->z.rows), *row = key_row + pad_to(j->max_k, 16);
  float *s = (float *)(mem + j->z.s), *dp = (float *)(mem + j->z.dp), *out = (float *)(mem + j->z.o);
  float *dk = (float *)(mem + j->z.dk), *dv = (float *)(mem + j->z.dv);
  const float *lse = a->lse->data;
  bool banded = is_banded(j);
  for (int64_t m = 0; m < M; m++) key_row[m] = ((range[2] + m) * j->K + h) * E;
  f->pack_columns(j->k->data, j->bf16, key_row, M, E, mem + j->z.kt);
  f->pack_columns(j->v->data, j->bf16, key_row, M, E, mem + j->z.vt);
  f->pack_inner(j->k->data, j->bf16, key_row, M, keys, E, mem + j->z.k);
  memset(dk, 0, (size_t)(keys * cols) * 4);
  memset(dv, 0, (size_t)(keys * cols) * 4);
  int64_t rows_all = range[1] * j->group;
  for (int64_t r0 = 0; r0 < rows_all; r0 += R) {
    int64_t rows = rows_all - r0 < R ? rows_all - r0 : R, pad = pad_to(rows, 4), r_panel = 32 * words(f, pad), begin, end;
    float delta[MOST_ROWS], minus[MOST_ROWS];
    query_rows(j, range, h, 0, r0, rows, row);
    for (int64_t r = 0, at = row[0] / E, g = r0 % j->group; r < rows; r++) {
      delta[r] = f->dot_rows(a->d_o->data, a->o->data, j->bf16, row[r], E);
      minus[r] = lse[at++] * LOG2E;
      if (++g == j->group) g = 0, at += j->A - j->group;
    }
    f->pack_rows(j->q->data, j->bf16, row, rows, pad, E, mem + j->z.q);
    f->pack_rows(a->d_o->data, j->bf16, row, rows, pad, E, mem + j->z.d);
    f->pack_inner(j->q->data, j->bf16, row, rows, pad, E, mem + j->z.q2);
    f->pack_inner(a->d_o->data, j->bf16, row, rows, pad, E, mem + j->z.d2);
    keys_seen(j, M, r0 / j->group, (r0 + rows - 1) / j->group, &begin, &end);
    begin = begin / 32 * 32;
    bool first = true;
    for (int64_t k0 = begin; k0 < end; k0 += TILE_KEYS, first = false) {
      int64_t n = end - k0 < TILE_KEYS ? end - k0 : TILE_KEYS, T = tile_width(n, keys - k0), tw = words(f, T);
      f->product(pad, T, W, mem + j->z.q, W, 1, mem + j->z.kt + k0 * W, 32 * W, 0, s, T, false);
      f->product(pad, T, W, mem + j->z.d, W, 1, mem + j->z.vt + k0 * W, 32 * W, 0, dp, T, false);
      for (int64_t r = 0; r < pad; r++) {
        int64_t x = 0, y = r < rows ? n : 0;
        if (banded && y) {
          int64_t i = (r0 + r) / j->group;
          keys_seen(j, M, i, i, &x, &y);
          clip(&x, &y, k0, n);
        }
        if (x == y || minus[r] == -INFINITY) {
          memset(s + r * T, 0, (size_t)T * 4);
          memset(dp + r * T, 0, (size_t)T * 4);
          continue;
        }
        if (j->softcap > 0) f->cap(s + r * T, x, y, j->softcap, j->scale);
        f->dsoftmax(s + r * T, dp + r * T, T, x, y, c, minus[r], delta[r], j->scale, j->softcap);
      }
      const uint32_t *pt = mem + j->z.s, *dst = mem + j->z.dp, *ds = mem + j->z.dp; /* p and ds by columns, ds by rows */
      if (f->bf16) {
        for (int64_t r = 0; r < pad; r += 2) {
          f->pair_rows(s + r * T, s + (r + 1) * T, T, mem + j->z.p2 + r / 2 * T);
          f->pair_rows(dp + r * T, dp + (r + 1) * T, T, mem + j->z.ds2 + r / 2 * T);
          f->to_words(dp + r * T, T, mem + j->z.ds + r * tw);
          f->to_words(dp + (r + 1) * T, T, mem + j->z.ds + (r + 1) * tw);
        }
        pt = mem + j->z.p2, dst = mem + j->z.ds2, ds = mem + j->z.ds;
      }
      f->product(T, cols, words(f, pad), pt, 1, T, mem + j->z.d2, r_panel, 0, dv + k0 * cols, cols, true);
      f->product(T, cols, words(f, pad), dst, 1, T, mem + j->z.q2, r_panel, 0, dk + k0 * cols, cols, true);
      f->product(pad, cols, tw, ds, tw, 1, mem + j->z.k, 32 * words(f, keys), words(f, k0), out, cols, !first);
    }
    if (first) memset(out, 0, (size_t)(pad * cols) * 4);
    for (int64_t r = 0; r < rows; r++) f->put_row(a->dq->data, j->bf16, row[r], out + r * cols, E, 1.0f, a->acc >> 7 & 1);
  }
  for (int64_t m = 0; m < M; m++) {
    f->put_row(a->dk->data, j->bf16, key_row[m], dk + m * cols, E, 1.0f, a->acc >> 8 & 1);
    f->put_row(a->dv->data, j->bf16, key_row[m], dv + m * cols, E, 1.0f, a->acc >> 9 & 1);
  }
}

fd_status cpu_attention_bwd_prepare(fd_ctx *ctx, const struct fd_attention_bwd_args *a, size_t *scratch_bytes) {
  ATTENTION_CHECKS(attention_bwd);
  CPU_CHECK(attention_bwd, d_o, fd_tensor_numel(a->d_o) == fd_tensor_numel(a->q), "as many elements as q, %lld", (long long)fd_tensor_numel(a->q));
  CPU_CHECK(attention_bwd, dq, fd_tensor_numel(a->dq) == fd_tensor_numel(a->q), "as many elements as q, %lld", (long long)fd_tensor_numel(a->q));
  CPU_CHECK(attention_bwd, dk, fd_tensor_numel(a->dk) == fd_tensor_numel(a->k), "as many elements as k, %lld", (long long)fd_tensor_numel(a->k));
  CPU_CHECK(attention_bwd, dv, fd_tensor_numel(a->dv) == fd_tensor_numel(a->k), "as many elements as k, %lld", (long long)fd_tensor_numel(a->k));
  struct job j = JOB(true);
  *scratch_bytes = (size_t)(ctx->n_threads * j.z.total) * 4;
  return FD_OK;
}

fd_status cpu_attention_bwd(fd_ctx *ctx, const struct fd_attention_bwd_args *a) {
  struct job j = JOB(true);
  int64_t tasks = fd_tensor_rows(a->ranges) * a->K;
  const int32_t *ranges = a->ranges->data;
  uint32_t *scratch = ctx->scratch;
  fd_status st = check_ranges(FD_OP_attention_bwd, &j);
  if (st != FD_OK) return st;
  #pragma omp parallel for schedule(static, 1) num_threads(ctx->n_threads) if (tasks > 1)
  for (int64_t t = 0; t < tasks; t++)
    backward(&j, ranges + t / a->K * 4, (int)(t % a->K), scratch + omp_get_thread_num() * j.z.total, a);
  return FD_OK;
}
