// SPDX-License-Identifier: Apache-2.0
// Patchify and back, upsampling: against index formulas, with acc, and each as the other's gradient.
#include "optest.h"

static void patches(struct ot *t, int64_t B, int64_t H, int64_t W, int64_t C, int P, int last, fd_dtype dt, bool acc) {
  ot_reset(t);
  ot_what(t, "patches B %d H %d W %d C %d P %d last %d %s acc %d", (int)B, (int)H, (int)W, (int)C, P, last, fd_dtype_name(dt), acc);
  const int64_t h = H / P, w = W / P, N = h * w, size = C * P * P, n = B * H * W * C;
  fd_tensor *x = OT_RAND(t, dt, B, H, W, C), *y = acc ? OT_RAND(t, dt, B, N, size) : OT_NEW(t, dt, B, N, size),
            *z = acc ? OT_RAND(t, dt, B, H, W, C) : OT_NEW(t, dt, B, H, W, C);
  double *ref = calloc((size_t)n + 1, sizeof *ref), *back = calloc((size_t)n + 1, sizeof *back), *z0 = ot_doubles(z);
  for (int64_t b = 0; b < B; b++)
    for (int64_t i = 0; i < H; i++)
      for (int64_t j = 0; j < W; j++)
        for (int64_t c = 0; c < C; c++) {
          int64_t token = b * N + i / P * w + j / P, p = i % P, q = j % P;
          int64_t at = token * size + (last ? (p * P + q) * C + c : (c * P + p) * P + q), from = ((b * H + i) * W + j) * C + c;
          ref[at] = ot_get(x, from) + (acc ? ot_get(y, at) : 0);
        }
  OT_RUN(t, patchify, .x = x, .y = y, .P = P, .channel_last = last, .acc = acc ? 2 : 0);
  OT_COMPARE(t, y, ref, 1);
  double *yv = ot_doubles(y);
  OT_RUN(t, unpatchify, .x = y, .y = z, .P = P, .channel_last = last, .acc = acc ? 2 : 0);
  if (!acc)
    for (int64_t i = 0; i < n; i++) OT_CHECK(t, ot_get(z, i) == ot_get(x, i)); /* the inverse */
  else { /* the transpose: <unpatchify(y) + z0 - z0, r> = <y, patchify(r)> is the permutation checked above */
    for (int64_t i = 0; i < n; i++) back[i] = z0[i];
    for (int64_t b = 0; b < B; b++)
      for (int64_t k = 0; k < N * size; k++) {
        int64_t token = k / size, e = k % size, c = last ? e % C : e / (P * P), p = last ? e / C / P : e / P % P, q = last ? e / C % P : e % P;
        back[((b * H + token / w * P + p) * W + token % w * P + q) * C + c] += yv[b * N * size + k];
      }
    OT_COMPARE_SIZE(t, z, back, 1, 1);
  }
  free(ref), free(back), free(z0), free(yv);
}

static void upsample(struct ot *t, int64_t B, int64_t H, int64_t W, int64_t C, fd_dtype dt, bool acc) {
  ot_reset(t);
  ot_what(t, "upsample B %d H %d W %d C %d %s acc %d", (int)B, (int)H, (int)W, (int)C, fd_dtype_name(dt), acc);
  fd_tensor *x = OT_RAND(t, dt, B, H, W, C), *y = OT_NEW(t, dt, B, 2 * H, 2 * W, C), *dy = OT_RAND(t, dt, B, 2 * H, 2 * W, C),
            *dx = acc ? OT_RAND(t, dt, B, H, W, C) : OT_NEW(t, dt, B, H, W, C);
  double *ref = calloc((size_t)(B * H * W * C) + 1, sizeof *ref);
  OT_RUN(t, upsample2x_fwd, .x = x, .y = y);
  for (int64_t i = 0; acc && i < B * H * W * C; i++) ref[i] = ot_get(dx, i);
  for (int64_t b = 0; b < B; b++)
    for (int64_t i = 0; i < 2 * H; i++)
      for (int64_t j = 0; j < 2 * W; j++)
        for (int64_t c = 0; c < C; c++) {
          int64_t large = ((b * 2 * H + i) * 2 * W + j) * C + c, small = ((b * H + i / 2) * W + j / 2) * C + c;
          OT_CHECK(t, ot_get(y, large) == ot_get(x, small));
          ref[small] += ot_get(dy, large);
        }
  OT_RUN(t, upsample2x_bwd, .dy = dy, .dx = dx, .acc = acc ? 2 : 0);
  OT_COMPARE_SIZE(t, dx, ref, 4, 1);
  free(ref);
}

static void misuse(struct ot *t) {
  ot_reset(t);
  ot_what(t, "misuse");
  fd_tensor *x = OT_RAND(t, FD_F32, 1, 4, 6, 3), *y = OT_NEW(t, FD_F32, 1, 6, 12), *y5 = OT_NEW(t, FD_F32, 1, 5, 12), *b = OT_NEW(t, FD_BF16, 1, 6, 12);
  OT_MISUSE(t, "P = 0", patchify, .x = x, .y = y);
  OT_MISUSE(t, "x is f32 [1, 4, 6, 3]", patchify, .x = x, .y = y, .P = 4);
  OT_MISUSE(t, "x is f32 [1, 6, 12]", patchify, .x = y, .y = y, .P = 2);
  OT_MISUSE(t, "y is f32 [1, 5, 12]", patchify, .x = x, .y = y5, .P = 2);
  OT_MISUSE(t, "y is bf16", patchify, .x = x, .y = b, .P = 2);
  OT_MISUSE(t, "x is f32 [1, 5, 12]", unpatchify, .x = y5, .y = x, .P = 2);
  OT_MISUSE(t, "y is f32 [1, 4, 6, 3]", upsample2x_fwd, .x = x, .y = x);
  OT_MISUSE(t, "x is f32 [1, 6, 12]", upsample2x_fwd, .x = y, .y = x);
  OT_MISUSE(t, "dy is f32 [1, 4, 6, 3]", upsample2x_bwd, .dy = x, .dx = x);
}

static void body(struct ot *t) {
  for (int dt = FD_F32; dt <= FD_BF16; dt++)
    for (int acc = 0; acc < 2; acc++) {
      for (int last = 0; last < 2; last++) {
        patches(t, 2, 4, 6, 3, 2, last, dt, acc);
        patches(t, 1, 3, 3, 1, 3, last, dt, acc);
        patches(t, 1, 2, 5, 17, 1, last, dt, acc);
        patches(t, 2, 8, 4, 16, 2, last, dt, acc);
        patches(t, 0, 4, 4, 2, 2, last, dt, acc);
      }
      upsample(t, 2, 3, 5, 7, dt, acc);
      upsample(t, 1, 1, 1, 1, dt, acc);
      upsample(t, 1, 2, 2, 32, dt, acc);
      upsample(t, 0, 2, 2, 4, dt, acc);
    }
  misuse(t);
}

int main(void) { return ot_main_same_bits(body); }
