// SPDX-License-Identifier: Apache-2.0
// ImagingResample of Pillow 13.0.0 for 8 bit, triangle filter: weights in double, rounded to 22 bits; columns first, then rows
// (tall pictures the other way round, rows_come_first), rounded to 8 bits after each; an axis that keeps its size is left out.
// Integer sums: no order of summing can matter.
//
// The pass along a row works on 16 rows at a time, transposed, so that lanes are rows and the taps of a lane lie 16 bytes apart.
// Only what the crop needs is computed.
#include <math.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>

#include "io/image.h"

#define CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#if !defined(__x86_64__)
#undef CLONES
#define CLONES
#endif

typedef uint8_t u8x16 __attribute__((vector_size(16)));
typedef int32_t i32x8 __attribute__((vector_size(32)));

enum { BITS = 22, ROWS = 16 };

/* Output positions first .. first + n - 1 of an axis: position o is sum k[o][x] * in[a[o] + x], x < taps[o]. */
struct axis {
  int n, ksize;
  int lo, hi; /* inputs that are needed: lo <= i < hi */
  int *a, *taps;
  int32_t *k; /* [n, ksize] */
  void *memory; /* owned */
};

static fd_status axis_make(int n_in, int n_out, int first, int n, struct axis *ax) {
  const double scale = (double)n_in / n_out, fs = scale < 1.0 ? 1.0 : scale;
  const double support = 1.0 * fs, inverse = 1.0 / fs;
  const int ksize = (int)ceil(support) * 2 + 1;
  const size_t count = (size_t)n, width = (size_t)ksize;
  char *memory = malloc(width * sizeof(double) + count * 2 * sizeof(int) + count * width * sizeof(int32_t));
  if (!memory) return FD_FAIL(FD_ERR_NOMEM, "resize: no memory for the weights of %d positions, %d each", n, ksize);
  double *w = (double *)memory;
  *ax = (struct axis){.n = n, .ksize = ksize, .lo = n_in, .hi = 0, .memory = memory};
  ax->a = (int *)(w + width);
  ax->taps = ax->a + count;
  ax->k = ax->taps + count;
  for (int i = 0; i < n; i++) {
    const double center = (first + i + 0.5) * scale;
    int a = (int)(center - support + 0.5), b = (int)(center + support + 0.5);
    if (a < 0) a = 0;
    if (b > n_in) b = n_in;
    double sum = 0.0;
    for (int x = 0; x < b - a; x++) {
      double t = fabs((x + a - center + 0.5) * inverse);
      w[x] = t < 1.0 ? 1.0 - t : 0.0;
      sum += w[x];
    }
    for (int x = 0; x < b - a; x++) {
      if (sum != 0.0) w[x] /= sum;
      const double scaled = w[x] * (1 << BITS);
      ax->k[(size_t)i * width + (size_t)x] = (int32_t)(scaled < 0 ? scaled - 0.5 : scaled + 0.5);
    }
    ax->a[i] = a;
    ax->taps[i] = b - a;
    if (a < ax->lo) ax->lo = a;
    if (b > ax->hi) ax->hi = b;
  }
  return FD_OK;
}

/* four rounds of interleaving the first half of the vectors with the second transpose a 16 x 16 matrix of bytes */
static inline __attribute__((always_inline)) void transpose16(const uint8_t *const src[ROWS], uint8_t *dst, size_t dst_stride) {
  u8x16 m[ROWS], t[ROWS];
  for (int i = 0; i < ROWS; i++) memcpy(&m[i], src[i], sizeof m[i]);
  for (int round = 0; round < 4; round++) {
    for (int i = 0; i < ROWS / 2; i++) {
      t[2 * i] = __builtin_shufflevector(m[i], m[i + 8], 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
      t[2 * i + 1] = __builtin_shufflevector(m[i], m[i + 8], 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
    }
    for (int i = 0; i < ROWS; i++) m[i] = t[i];
  }
  for (int i = 0; i < ROWS; i++) memcpy(dst + (size_t)i * dst_stride, &m[i], sizeof m[i]);
}

/* Loops, since gcc 12 converts vectors of bytes (__builtin_convertvector) element by element. */
static inline __attribute__((always_inline)) void add_product(i32x8 *sum, const uint8_t *p, int32_t k) {
  i32x8 v;
  for (int i = 0; i < 8; i++) v[i] = p[i];
  *sum += v * k;
}

static inline __attribute__((always_inline)) void clip_store(const i32x8 *sum, uint8_t *dst) {
  for (int i = 0; i < 8; i++) {
    const int32_t v = (*sum)[i] >> BITS;
    dst[i] = (uint8_t)(v < 0 ? 0 : v > 255 ? 255 : v);
  }
}

/* 16 rows (pointers to their pixel ax->lo) -> 16 rows of ax->n pixels at `out`. t: (hi - lo) * 3 rounded up to 16 vectors;
 * o: n * 3 rounded up to 16 vectors. May read 15 bytes behind the last needed byte of a row. */
CLONES static void columns_16_rows(const uint8_t *const row[ROWS], const struct axis *ax, uint8_t *t, uint8_t *o, uint8_t *out,
                                   size_t out_stride) {
  const int bytes_in = (ax->hi - ax->lo) * 3, bytes_out = ax->n * 3;
  for (int b = 0; b < bytes_in; b += 16) {
    const uint8_t *src[ROWS];
    for (int i = 0; i < ROWS; i++) src[i] = row[i] + b;
    transpose16(src, t + (size_t)b * 16, 16);
  }
  for (int i = 0; i < ax->n; i++) {
    const int32_t *k = ax->k + (size_t)i * (size_t)ax->ksize;
    const uint8_t *p = t + (size_t)(ax->a[i] - ax->lo) * 48;
    const int taps = ax->taps[i];
    i32x8 sum[6];
    for (int c = 0; c < 6; c++) sum[c] = (i32x8){} + (1 << (BITS - 1));
    for (int x = 0; x < taps; x++, p += 48)
      for (int c = 0; c < 6; c++) add_product(&sum[c], p + 8 * c, k[x]);
    for (int c = 0; c < 6; c++) clip_store(&sum[c], o + (size_t)i * 48 + 8 * c);
  }
  for (int b = 0; b < bytes_out; b += 16) { /* rows of `out` are padded to 16 bytes */
    const uint8_t *src[ROWS];
    for (int i = 0; i < ROWS; i++) src[i] = o + (size_t)(b + i) * 16;
    transpose16(src, out + b, out_stride);
  }
}

/* One output row: sum of `taps` rows. Whole groups of 16 bytes; the rest goes through a buffer. */
CLONES static void rows_1(const uint8_t *in, size_t in_stride, const int32_t *k, int taps, size_t bytes, uint8_t *out) {
  size_t x = 0;
  for (; x < bytes; x += 32) { /* may read 31 bytes behind the row's end */
    i32x8 sum[4];
    for (int c = 0; c < 4; c++) sum[c] = (i32x8){} + (1 << (BITS - 1));
    const uint8_t *p = in + x;
    for (int y = 0; y < taps; y++, p += in_stride)
      for (int c = 0; c < 4; c++) add_product(&sum[c], p + 8 * c, k[y]);
    uint8_t done[32];
    for (int c = 0; c < 4; c++) clip_store(&sum[c], done + 8 * c);
    if (x + 32 <= bytes)
      memcpy(out + x, done, 32);
    else
      memcpy(out + x, done, bytes - x);
  }
}

/* n rows, padded to a multiple of 16 at `out`. t, o: as for columns_16_rows. */
static void columns_pass(const uint8_t *in, size_t in_stride, int n, const struct axis *ax, uint8_t *t, uint8_t *o, uint8_t *out,
                         size_t out_stride) {
  for (int y = 0; y < n; y += ROWS) {
    const uint8_t *row[ROWS];
    for (int i = 0; i < ROWS; i++) row[i] = in + (size_t)(y + i < n ? y + i : n - 1) * in_stride;
    columns_16_rows(row, ax, t, o, out + (size_t)y * out_stride, out_stride);
  }
}

/* `in`: row ay->lo */
static void rows_pass(const uint8_t *in, size_t in_stride, const struct axis *ay, size_t bytes, uint8_t *out, size_t out_stride) {
  for (int y = 0; y < ay->n; y++)
    rows_1(in + (size_t)(ay->a[y] - ay->lo) * in_stride, in_stride, ay->k + (size_t)y * (size_t)ay->ksize, ay->taps[y], bytes,
           out + (size_t)y * out_stride);
}

/* As Pillow 13.0.0 decides. 9.5.0, which the original asks for, never does: there such pictures differ by a level at most. */
static bool rows_come_first(const fd_image *img, int new_w, int new_h) {
  const int64_t less_w = (int64_t)img->w - new_w, less_h = (int64_t)img->h - new_h;
  return less_h > 0 && less_h > 2 * less_w;
}

/* The part [off_x, off_x + out_w) x [off_y, off_y + out_h) of `img` resized to new_w x new_h. */
static fd_status resample(const fd_image *img, int new_w, int new_h, int off_x, int off_y, int out_w, int out_h, uint8_t *out) {
  fd_status st = FD_OK;
  struct axis ax = {0}, ay = {0};
  uint8_t *memory = NULL;
  const bool columns = new_w != img->w, rows = new_h != img->h;
  const bool rows_first = columns && rows_come_first(img, new_w, new_h);
  const size_t out_stride = (size_t)out_w * 3;
  if (columns) FD_TRY(axis_make(img->w, new_w, off_x, out_w, &ax));
  if (rows) FD_TRY(axis_make(img->h, new_h, off_y, out_h, &ay));
  const int x0 = columns ? ax.lo : off_x, y0 = rows ? ay.lo : off_y; /* first input that is needed */

  size_t in_stride = (size_t)img->w * 3;
  const uint8_t *in = img->rgb + (size_t)y0 * in_stride + (size_t)x0 * 3;
  if (columns) {
    const int n = rows && !rows_first ? ay.hi - ay.lo : out_h; /* rows whose columns are summed */
    const size_t in_bytes = (size_t)(ax.hi - ax.lo) * 3, padded = (out_stride + 15) & ~(size_t)15;
    const size_t t_bytes = ((in_bytes + 15) & ~(size_t)15) * 16, o_bytes = padded * 16;
    const size_t m_bytes = padded * (size_t)((n + ROWS - 1) / ROWS * ROWS) + FD_IMAGE_SLACK; /* [n, out_w, 3] after the columns */
    const size_t r_bytes = rows_first ? in_bytes * (size_t)n + FD_IMAGE_SLACK : 0; /* [n, ax.hi - ax.lo, 3] before them */
    memory = malloc(t_bytes + o_bytes + m_bytes + r_bytes);
    if (!memory) FD_TRY(FD_FAIL(FD_ERR_NOMEM, "resize: no memory for %d rows of %d pixels", n, out_w));
    uint8_t *t = memory, *o = t + t_bytes, *m = o + o_bytes, *r = m + m_bytes;
    memset(o + out_stride * 16, 0, o_bytes - out_stride * 16); /* padding that is transposed along */
    if (rows_first) {
      memset(r + r_bytes - FD_IMAGE_SLACK, 0, FD_IMAGE_SLACK);
      rows_pass(in, in_stride, &ay, in_bytes, r, in_bytes);
      in = r;
      in_stride = in_bytes;
    }
    columns_pass(in, in_stride, n, &ax, t, o, m, padded);
    in = m;
    in_stride = padded;
  }
  if (rows && !rows_first)
    rows_pass(in, in_stride, &ay, out_stride, out, out_stride);
  else
    for (int y = 0; y < out_h; y++) memcpy(out + (size_t)y * out_stride, in + (size_t)y * in_stride, out_stride);
done:
  free(memory);
  free(ax.memory);
  free(ay.memory);
  return st;
}

void fd_image_resized(int w, int h, int R, int *new_w, int *new_h) {
  *new_w = w <= h ? R : (int)((int64_t)R * w / h);
  *new_h = w <= h ? (int)((int64_t)R * h / w) : R;
}

/* (size - R) / 2, halves to the even number */
static int centre_offset(int size, int R) {
  const int d = size - R, half = d / 2;
  return d % 2 == 0 ? half : half + (half & 1);
}

fd_status fd_image_fit(const fd_image *img, int R, const float crop[2], uint8_t *out) {
  if (R < 1 || R > FD_IMAGE_MAX_SIDE || img->w < 1 || img->h < 1)
    return FD_FAIL(FD_ERR_ARG, "resize: %d x %d pixels to resolution %d", img->w, img->h, R);
  int new_w, new_h, x, y;
  fd_image_resized(img->w, img->h, R, &new_w, &new_h);
  if (crop) {
    x = (int)(crop[0] * (float)(new_w - R + 1)), y = (int)(crop[1] * (float)(new_h - R + 1));
    if (x > new_w - R) x = new_w - R; /* rounding of a draw next to 1 */
    if (y > new_h - R) y = new_h - R;
  } else {
    x = centre_offset(new_w, R), y = centre_offset(new_h, R);
  }
  return resample(img, new_w, new_h, x, y, R, R, out);
}

fd_status fd_image_resize(const fd_image *img, int new_w, int new_h, fd_image *out) {
  fd_status st = FD_OK;
  if (img->w < 1 || img->h < 1 || img == out)
    return FD_FAIL(FD_ERR_ARG, "resize: %d x %d pixels to %d x %d", img->w, img->h, new_w, new_h);
  FD_TRY(fd_image_reserve(out, new_w, new_h));
  FD_TRY(resample(img, new_w, new_h, 0, 0, new_w, new_h, out->rgb));
done:
  return st;
}
