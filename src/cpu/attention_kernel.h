// SPDX-License-Identifier: Apache-2.0
// The inner loops of attention, compiled once per CPU level: attention.c includes this file several times, each time with
//   NAME(x)   the function's name at this level       TARGET  its target attribute
//   BF16      1: operands are pairs of bf16 in 32-bit words (multiplied by one instruction); 0: f32
//   V, VI, VL a vector of floats, of 32-bit integers, its length; V_LOAD, V_STORE, V_SET, V_WORD (broadcast a word), V_MAX,
//             V_KEEP(v, a, b) (elements a <= i < b, else -infinity), V_TOP and V_SUM of all elements,
//             V_DOT(a, b, c) = a b + c of operands, V_FMA of floats; MR rows and NV vectors of a register block
//
// All matrix products are one function: C [M, N] = A B, A read by two strides, B in panels of 32 columns (the last may have
// 16). So a matrix of scores serves as it is and transposed. M is a multiple of 4, N of 16.

TARGET CPU_INLINE void NAME(block)(int m, int nv, int64_t K, const uint32_t *A, int64_t ai, int64_t ak, const uint32_t *B, int64_t ldb,
                                   float *C, int64_t ldc, bool add) {
  V c[MR][NV];
#pragma GCC unroll 16
  for (int i = 0; i < m; i++)
#pragma GCC unroll 4
    for (int j = 0; j < nv; j++) c[i][j] = add ? V_LOAD(C + i * ldc + j * VL) : V_SET(0.0f);
  for (int64_t k = 0; k < K; k++) {
    V b[NV];
#pragma GCC unroll 4
    for (int j = 0; j < nv; j++) b[j] = V_LOAD((const float *)(B + k * ldb + j * VL));
#pragma GCC unroll 16
    for (int i = 0; i < m; i++) {
      V a = V_WORD(A + i * ai + k * ak);
#pragma GCC unroll 4
      for (int j = 0; j < nv; j++) c[i][j] = V_DOT(a, b[j], c[i][j]);
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < m; i++)
#pragma GCC unroll 4
    for (int j = 0; j < nv; j++) V_STORE(C + i * ldc + j * VL, c[i][j]);
}

TARGET CPU_INLINE void NAME(column)(int nv, int64_t M, int64_t K, const uint32_t *A, int64_t ai, int64_t ak, const uint32_t *B, int64_t ldb,
                                    float *C, int64_t ldc, bool add) {
  int64_t i = 0;
  for (; i + MR <= M; i += MR) NAME(block)(MR, nv, K, A + i * ai, ai, ak, B, ldb, C + i * ldc, ldc, add);
  for (; i + 4 <= M; i += 4) NAME(block)(4, nv, K, A + i * ai, ai, ak, B, ldb, C + i * ldc, ldc, add);
  for (; i + 2 <= M; i += 2) NAME(block)(2, nv, K, A + i * ai, ai, ak, B, ldb, C + i * ldc, ldc, add);
}

/* `panel` words lie between the starts of B's panels; the first `skip` rows of each are left out. */
TARGET static void NAME(product)(int64_t M, int64_t N, int64_t K, const uint32_t *A, int64_t ai, int64_t ak, const uint32_t *B,
                                 int64_t panel, int64_t skip, float *C, int64_t ldc, bool add) {
  for (int64_t n = 0; n < N; n += 32, B += panel) {
    int64_t width = N - n < 32 ? 16 : 32;
    for (int64_t w = 0; w < width;) {
      if (width - w >= NV * VL) {
        NAME(column)(NV, M, K, A, ai, ak, B + skip * width + w, width, C + n + w, ldc, add);
        w += NV * VL;
      } else {
        NAME(column)(1, M, K, A, ai, ak, B + skip * width + w, width, C + n + w, ldc, add);
        w += VL;
      }
    }
  }
}

/* 2^t, 0 below 2^-126.5; NaN stays NaN. Relative error 2e-7. */
TARGET CPU_INLINE V NAME(exp2)(V t) {
  t = V_MAX(V_SET(-127.0f), t);
  V r = t + V_SET(12582912.0f);
  V f = t - (r - V_SET(12582912.0f));
  V p = V_SET(1.5353362e-4f);
  p = V_FMA(p, f, V_SET(1.3398874e-3f));
  p = V_FMA(p, f, V_SET(9.6184374e-3f));
  p = V_FMA(p, f, V_SET(5.5503324e-2f));
  p = V_FMA(p, f, V_SET(2.4022648e-1f));
  p = V_FMA(p, f, V_SET(6.9314720e-1f));
  p = V_FMA(p, f, V_SET(1.0f));
  VI n = ((VI)r << 23) + 0x3f800000u;
  return p * (V)n;
}

/* s[lo, hi) = softcap tanh(s scale / softcap) */
TARGET static void NAME(cap)(float *s, int64_t lo, int64_t hi, float softcap, float scale) {
  for (int64_t j = lo; j < hi; j++) s[j] = softcap * cpu_tanhf(s[j] * scale / softcap);
}

/* Row of operands: floats, or bf16 pairs. */
TARGET CPU_INLINE void NAME(put)(void *to, int64_t j, V v) {
#if BF16
  _mm256_storeu_si256((__m256i *)((fd_bf16 *)to + j), (__m256i)_mm512_cvtneps_pbh(v));
#else
  V_STORE((float *)to + j, v);
#endif
}

/* One row of n scores of a tile, keys [lo, hi) of which are seen (lo < hi): p = 2^(s c - m) with the running maximum m, 0 where not
 * seen; returns what earlier sums are multiplied by. */
TARGET static float NAME(softmax)(float *s, int64_t n, int64_t lo, int64_t hi, float c, float *m, float *sum, void *p) {
  V most = V_SET(-INFINITY), total = V_SET(0.0f);
  int64_t first = lo / VL * VL, last = (hi + VL - 1) / VL * VL;
  for (int64_t j = first; j < last; j += VL) {
    V x = V_LOAD(s + j);
    if (j < lo || j + VL > hi) {
      x = V_KEEP(x, lo - j, hi - j);
      V_STORE(s + j, x);
    }
    most = V_MAX(most, x);
  }
  float now = V_TOP(most) * c, old = *m;
  if (!(now > old)) now = old;
  V scale = V_SET(c), minus = V_SET(-now);
  for (int64_t j = 0; j < first; j += VL) NAME(put)(p, j, V_SET(0.0f));
  for (int64_t j = first; j < last; j += VL) {
    V e = NAME(exp2)(V_FMA(V_LOAD(s + j), scale, minus));
    total = total + e;
    NAME(put)(p, j, e);
  }
  for (int64_t j = last; j < n; j += VL) NAME(put)(p, j, V_SET(0.0f));
  float factor = old == -INFINITY ? 0.0f : old == now ? 1.0f : exp2f(old - now);
  *m = now;
  *sum = *sum * factor + V_SUM(total);
  return factor;
}

TARGET static void NAME(scale_row)(float *x, int64_t n, float by) {
  for (int64_t j = 0; j < n; j++) x[j] *= by;
}

/* Of rows: 1 / sum (0 if nothing was seen), and lse = ln 2 most + ln sum. */
TARGET static void NAME(finish)(const float *most, float *sum, float *lse, int64_t rows) {
  for (int64_t r = 0; r < rows; r++) {
    float l = cpu_fma(most[r], 0.69314718055994531f, cpu_logf(sum[r]));
    lse[r] = sum[r] == 0.0f ? -INFINITY : l;
    sum[r] = sum[r] == 0.0f ? 0.0f : 1.0f / sum[r];
  }
}

/* Backward of one row: p = 2^(s c - lse), ds = p (dp - delta) scale, with the derivative of the cap; 0 where not seen. In place. */
TARGET static void NAME(dsoftmax)(float *s, float *dp, int64_t n, int64_t lo, int64_t hi, float c, float lse, float delta, float scale,
                                  float softcap) {
  V cv = V_SET(c), minus = V_SET(-lse), d = V_SET(delta), sc = V_SET(scale), one = V_SET(1.0f);
  V inv = V_SET(softcap > 0 ? 1.0f / softcap : 0.0f);
  int64_t first = lo / VL * VL, last = (hi + VL - 1) / VL * VL;
  if (first > 0) memset(s, 0, (size_t)first * 4), memset(dp, 0, (size_t)first * 4);
  if (last < n) memset(s + last, 0, (size_t)(n - last) * 4), memset(dp + last, 0, (size_t)(n - last) * 4);
  for (int64_t j = first; j < last; j += VL) {
    V x = V_LOAD(s + j);
    if (j < lo || j + VL > hi) x = V_KEEP(x, lo - j, hi - j);
    V e = NAME(exp2)(V_FMA(x, cv, minus)), g = (V_LOAD(dp + j) - d) * sc * e;
    if (softcap > 0) {
      V th = V_MAX(V_SET(-1.0f), x * inv); /* x is -infinity where not seen; e is 0 there */
      g = g * (one - th * th);
    }
    V_STORE(s + j, e);
    V_STORE(dp + j, g);
  }
}

#if BF16
/* Two rows of floats as one row of words (row a low, row b high): an operand whose inner dimension runs over rows. */
TARGET static void NAME(pair_rows)(const float *a, const float *b, int64_t n, uint32_t *words) {
  for (int64_t j = 0; j < n; j += 16) {
    __m512i lo = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(_mm512_loadu_ps(a + j)));
    __m512i hi = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(_mm512_loadu_ps(b + j)));
    _mm512_storeu_si512(words + j, _mm512_or_si512(lo, _mm512_slli_epi32(hi, 16)));
  }
}
TARGET static void NAME(to_words)(const float *a, int64_t n, uint32_t *words) {
  for (int64_t j = 0; j < n; j += 16) NAME(put)(words, j, _mm512_loadu_ps(a + j));
}
#endif

/* ---- packing: rows of E numbers of either type, `row[r]` elements behind src -------------------------------------------- */

/* A: words of each row, one row behind the other. */
TARGET static void NAME(pack_rows)(const void *src, bool bf16, const int64_t *row, int64_t rows, int64_t pad_rows, int64_t E, uint32_t *out) {
  int64_t W = WORDS(E);
  for (int64_t r = 0; r < rows; r++) {
#if BF16
    fd_bf16 *to = (fd_bf16 *)(out + r * W);
    memcpy(to, (const fd_bf16 *)src + row[r], (size_t)E * 2);
    if (E & 1) to[E] = 0;
    (void)bf16;
#else
    float *to = (float *)(out + r * W);
    if (bf16)
      for (int64_t e = 0; e < E; e++) to[e] = cpu_load(src, true, row[r] + e);
    else memcpy(to, (const float *)src + row[r], (size_t)E * 4);
#endif
  }
  memset(out + rows * W, 0, (size_t)((pad_rows - rows) * W) * 4);
}

/* B with a column per row of src, inner dimension E: [panel][word of E][32]. */
TARGET static void NAME(pack_columns)(const void *src, bool bf16, const int64_t *row, int64_t rows, int64_t E, uint32_t *out) {
  int64_t W = WORDS(E);
  for (int64_t p = 0; p < rows; p += 32, out += 32 * W) {
    int64_t n = rows - p < 32 ? rows - p : 32, width = n > 16 ? 32 : 16;
    for (int64_t j = 0; j < n; j++) {
#if BF16
      const fd_bf16 *from = (const fd_bf16 *)src + row[p + j];
      for (int64_t e = 0; e < E / 2; e++) {
        uint32_t word;
        memcpy(&word, from + 2 * e, 4);
        out[e * width + j] = word;
      }
      if (E & 1) out[E / 2 * width + j] = from[E - 1];
      (void)bf16;
#else
      float *to = (float *)out;
      if (bf16)
        for (int64_t e = 0; e < E; e++) to[e * width + j] = cpu_load(src, true, row[p + j] + e);
      else
        for (int64_t e = 0; e < E; e++) to[e * width + j] = ((const float *)src)[row[p + j] + e];
#endif
    }
    for (int64_t e = 0; e < W; e++)
      for (int64_t j = n; j < width; j++) out[e * width + j] = 0;
  }
}

/* B with a column per element of E, inner dimension the rows: [panel][word of rows][32], rows padded to pad_rows (even). */
TARGET static void NAME(pack_inner)(const void *src, bool bf16, const int64_t *row, int64_t rows, int64_t pad_rows, int64_t E, uint32_t *out) {
  int64_t K = WORDS(pad_rows);
  for (int64_t p = 0; p < E; p += 32, out += 32 * K) {
    int64_t n = E - p < 32 ? E - p : 32, width = n > 16 ? 32 : 16;
    for (int64_t k = 0; k < K; k++) {
      uint32_t *to = out + k * width;
#if BF16
      const fd_bf16 *a = 2 * k < rows ? (const fd_bf16 *)src + row[2 * k] + p : NULL;
      const fd_bf16 *b = 2 * k + 1 < rows ? (const fd_bf16 *)src + row[2 * k + 1] + p : NULL;
      if (b)
        for (int64_t j = 0; j < n; j++) to[j] = a[j] | (uint32_t)b[j] << 16;
      else
        for (int64_t j = 0; j < n; j++) to[j] = a ? a[j] : 0;
      (void)bf16;
#else
      float *f = (float *)to;
      if (k >= rows) memset(to, 0, (size_t)n * 4);
      else if (bf16)
        for (int64_t j = 0; j < n; j++) f[j] = cpu_load(src, true, row[k] + p + j);
      else memcpy(to, (const float *)src + row[k] + p, (size_t)n * 4);
#endif
      for (int64_t j = n; j < width; j++) to[j] = 0;
    }
  }
}

/* dst (E numbers of either type) = (add ? dst : 0) + x by */
TARGET static void NAME(put_row)(void *dst, bool bf16, int64_t at, const float *x, int64_t E, float by, bool add) {
  if (bf16)
    for (int64_t e = 0; e < E; e++) cpu_store(dst, true, at + e, x[e] * by + (add ? cpu_load(dst, true, at + e) : 0.0f));
  else
    for (int64_t e = 0; e < E; e++) cpu_store(dst, false, at + e, x[e] * by + (add ? cpu_load(dst, false, at + e) : 0.0f));
}

/* sum of a b over E */
TARGET static float NAME(dot_rows)(const void *a, const void *b, bool bf16, int64_t at, int64_t E) {
  float lane[CPU_LANES] = {0};
  if (bf16) CPU_LANES_ADD(lane, E, cpu_load(a, true, at + i) * cpu_load(b, true, at + i));
  else CPU_LANES_ADD(lane, E, cpu_load(a, false, at + i) * cpu_load(b, false, at + i));
  return cpu_lanes_sum(lane);
}

static const struct kernel NAME(kernel) = {
    .bf16 = BF16,
    .product = NAME(product),
    .cap = NAME(cap),
    .softmax = NAME(softmax),
    .scale_row = NAME(scale_row),
    .finish = NAME(finish),
    .dsoftmax = NAME(dsoftmax),
#if BF16
    .pair_rows = NAME(pair_rows),
    .to_words = NAME(to_words),
#endif
    .pack_rows = NAME(pack_rows),
    .pack_columns = NAME(pack_columns),
    .pack_inner = NAME(pack_inner),
    .put_row = NAME(put_row),
    .dot_rows = NAME(dot_rows),
};
