// SPDX-License-Identifier: Apache-2.0
// Pictures: the vectorised resize against Pillow's formula written out, crops, round trips, damage, misuse.
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "base/rng.h"
#include "io/image.h"

static int failed;
#define CHECK(c)                                                                                            \
  do {                                                                                                      \
    if (!(c)) failed = 1, fprintf(stderr, "%s:%d: %s (%s)\n", __FILE__, __LINE__, #c, fd_status_message()); \
  } while (0)

static void draw(fd_image *img, int w, int h, uint64_t seed) {
  CHECK(fd_image_reserve(img, w, h) == FD_OK);
  for (size_t i = 0; i < (size_t)w * (size_t)h * 3; i++)
    img->rgb[i] = (uint8_t)(255 * fd_rng_uniform(seed, FD_RNG_SYNTHETIC, 0, (uint32_t)i) + (i % 7 == 0 ? 0.5 : 0));
}

/* One axis of one channel, element by element; n_other lines that lie `line` apart, elements `step` apart. */
static void resample_axis(const uint8_t *in, int n_in, int n_out, uint8_t *out, int lines, size_t in_line, size_t in_step, size_t out_line, size_t out_step) {
  const double scale = (double)n_in / n_out, fs = scale > 1 ? scale : 1, support = fs;
  for (int o = 0; o < n_out; o++) {
    const double center = (o + 0.5) * scale;
    int a = (int)(center - support + 0.5), b = (int)(center + support + 0.5);
    if (a < 0) a = 0;
    if (b > n_in) b = n_in;
    double w[4096], sum = 0;
    for (int x = a; x < b; x++) {
      const double t = fabs((x - center + 0.5) * (1.0 / fs));
      w[x - a] = t < 1 ? 1 - t : 0;
      sum += w[x - a];
    }
    for (int l = 0; l < lines; l++) {
      int32_t total = 1 << 21;
      for (int x = a; x < b; x++) total += (int32_t)(w[x - a] / sum * (1 << 22) + 0.5) * in[(size_t)l * in_line + (size_t)x * in_step];
      total >>= 22;
      out[(size_t)l * out_line + (size_t)o * out_step] = (uint8_t)(total < 0 ? 0 : total > 255 ? 255 : total);
    }
  }
}

static void scale_w(const uint8_t *in, int w, int h, int new_w, uint8_t *out) {
  for (size_t c = 0; c < 3; c++) resample_axis(in + c, w, new_w, out + c, h, (size_t)w * 3, 3, (size_t)new_w * 3, 3);
}

static void scale_h(const uint8_t *in, int w, int h, int new_h, uint8_t *out) {
  for (size_t c = 0; c < 3; c++) resample_axis(in + c, h, new_h, out + c, w, 3, (size_t)w * 3, 3, (size_t)w * 3);
}

static uint8_t *reference(const fd_image *img, int w, int h) {
  uint8_t *mid = malloc((size_t)(w > img->w ? w : img->w) * (size_t)img->h * 3), *out = malloc((size_t)w * (size_t)h * 3);
  if (img->h > h && img->h - h > 2 * (img->w - w)) {
    scale_h(img->rgb, img->w, img->h, h, mid);
    scale_w(mid, img->w, h, w, out);
  } else {
    scale_w(img->rgb, img->w, img->h, w, mid);
    scale_h(mid, w, img->h, h, out);
  }
  free(mid);
  return out;
}

static void test_resize(void) {
  static const int sizes[][3] = {/* w, h, R */
                                 {1, 1, 1}, {1, 1, 7}, {5, 3, 3}, {3, 5, 3}, {16, 16, 8}, {17, 33, 16}, {33, 17, 5}, {64, 48, 48}, {48, 64, 64}, {100, 31, 64},
                                 {31, 100, 17}, {9, 300, 20}, {300, 9, 20}, {200, 200, 199}, {130, 67, 64}, {67, 130, 65}, {512, 384, 128}, {17, 34, 16}, {17, 35, 16}, {61, 150, 20}};
  for (size_t k = 0; k < sizeof sizes / sizeof *sizes; k++) {
    const int w = sizes[k][0], h = sizes[k][1], R = sizes[k][2];
    fd_image img = {0}, out = {0};
    draw(&img, w, h, k);
    int nw, nh;
    fd_image_resized(w, h, R, &nw, &nh);
    CHECK((w <= h ? nw : nh) == R && (w <= h ? nh : nw) == (int)((double)R * (w <= h ? h : w) / (w <= h ? w : h)));
    uint8_t *ref = reference(&img, nw, nh);
    CHECK(fd_image_resize(&img, nw, nh, &out) == FD_OK && out.w == nw && out.h == nh);
    CHECK(memcmp(out.rgb, ref, (size_t)nw * (size_t)nh * 3) == 0);

    uint8_t *cut = malloc((size_t)R * (size_t)R * 3);
    for (int trial = 0; trial < 3; trial++) {
      const float crop[2] = {trial == 1 ? 0.0f : 0.99999994f, trial == 1 ? 0.99999994f : 0.4f};
      CHECK(fd_image_fit(&img, R, trial ? crop : NULL, cut) == FD_OK);
      const double half_x = (nw - R) / 2.0, half_y = (nh - R) / 2.0;
      const int x = trial ? (crop[0] > 0 ? nw - R : 0) : (int)nearbyint(half_x);
      const int y = trial ? (crop[1] > 0.5f ? nh - R : (int)(crop[1] * (float)(nh - R + 1))) : (int)nearbyint(half_y);
      int same = 1;
      for (int r = 0; r < R; r++) same &= memcmp(cut + (size_t)r * (size_t)R * 3, ref + ((size_t)(y + r) * (size_t)nw + (size_t)x) * 3, (size_t)R * 3) == 0;
      CHECK(same);
    }
    free(cut);
    free(ref);
    fd_image_free(&img);
    fd_image_free(&out);
  }
  /* sides that have nothing to do with each other */
  static const int pairs[][4] = {{5, 40, 9, 10}, {40, 5, 10, 9}, {40, 90, 21, 50}, {40, 90, 20, 50}, {40, 90, 40, 50}, {40, 90, 20, 90}, {40, 90, 57, 120}};
  for (size_t k = 0; k < sizeof pairs / sizeof *pairs; k++) {
    const int nw = pairs[k][2], nh = pairs[k][3];
    fd_image img = {0}, out = {0};
    draw(&img, pairs[k][0], pairs[k][1], 40 + k);
    uint8_t *ref = reference(&img, nw, nh);
    CHECK(fd_image_resize(&img, nw, nh, &out) == FD_OK && memcmp(out.rgb, ref, (size_t)nw * (size_t)nh * 3) == 0);
    free(ref);
    fd_image_free(&img);
    fd_image_free(&out);
  }
}

static void test_files(void) {
  fd_image img = {0}, back = {0}, sheet = {0};
  void *bytes = NULL;
  size_t n = 0;
  draw(&img, 37, 21, 5);
  CHECK(fd_image_encode_png(img.rgb, 37, 21, &bytes, &n) == FD_OK);
  CHECK(fd_image_decode(bytes, n, 0, &back) == FD_IMAGE_KEPT && back.w == 37 && back.h == 21 && memcmp(back.rgb, img.rgb, 37 * 21 * 3) == 0);
  /* a PNG cut anywhere: lost before its data, kept after, with rows from the top and black below */
  int kept = 0;
  for (size_t cut = 0; cut < n; cut += 7) {
    const enum fd_image_loss loss = fd_image_decode(bytes, cut, 0, &back);
    CHECK(kept ? loss == FD_IMAGE_KEPT : loss != FD_IMAGE_NOMEM);
    if (loss) continue;
    kept++;
    int y = 0;
    while (y < 21 && memcmp(back.rgb + y * 37 * 3, img.rgb + y * 37 * 3, 37 * 3) == 0) y++;
    for (int i = y * 37 * 3; i < 21 * 37 * 3; i++)
      if (back.rgb[i]) {
        CHECK(!"rows below the cut are black");
        break;
      }
  }
  CHECK(kept > 5);
  free(bytes);

  for (size_t i = 0; i < 37 * 21 * 3; i++) img.rgb[i] = (uint8_t)(100 + i / 111); /* smooth, so that a JPEG is near */
  CHECK(fd_image_encode_jpeg(img.rgb, 37, 21, 95, &bytes, &n) == FD_OK);
  CHECK(fd_image_decode(bytes, n, 0, &back) == FD_IMAGE_KEPT && back.w == 37 && back.h == 21);
  int worst = 0;
  for (size_t i = 0; i < 37 * 21 * 3; i++) worst = abs(back.rgb[i] - img.rgb[i]) > worst ? abs(back.rgb[i] - img.rgb[i]) : worst;
  CHECK(worst <= 6);
  CHECK(fd_image_decode(bytes, 100, 0, &back) == FD_IMAGE_DAMAGED); /* within the tables */
  CHECK(fd_image_decode(bytes, n - 40, 0, &back) == FD_IMAGE_KEPT);
  free(bytes);
  CHECK(fd_image_decode("", 0, 0, &back) == FD_IMAGE_UNKNOWN);
  CHECK(fd_image_decode("RIFF\x10\0\0\0WEBPVP8 ", 16, 0, &back) == FD_IMAGE_DAMAGED);

  /* a scaled decode keeps the short side at the resolution or above */
  draw(&img, 640, 512, 9);
  CHECK(fd_image_encode_jpeg(img.rgb, 640, 512, 80, &bytes, &n) == FD_OK);
  CHECK(fd_image_decode(bytes, n, 256, &back) == FD_IMAGE_KEPT && back.w == 320 && back.h == 256);
  CHECK(fd_image_decode(bytes, n, 257, &back) == FD_IMAGE_KEPT && back.h >= 257 && back.h < 512);
  CHECK(fd_image_decode(bytes, n, 600, &back) == FD_IMAGE_KEPT && back.h == 512);
  free(bytes);

  /* header says 60000 x 60000: refused before memory is asked for */
  static const unsigned char huge[] = {0xff, 0xd8, 0xff, 0xc0, 0, 11, 8, 0xea, 0x60, 0xea, 0x60, 1, 1, 0x11, 0, 0xff, 0xda, 0, 8, 1, 1, 0, 0, 63, 0};
  CHECK(fd_image_decode(huge, sizeof huge, 0, &back) == FD_IMAGE_TOO_LARGE);

  char path[] = "/tmp/fdhpc-image-XXXXXX", file[64];
  CHECK(mkdtemp(path) != NULL);
  snprintf(file, sizeof file, "%s/x.png", path);
  CHECK(fd_image_write(file, img.rgb, 640, 512) == FD_OK && fd_image_read(file, &back) == FD_OK && back.w == 640 && memcmp(back.rgb, img.rgb, 640 * 512 * 3) == 0);
  unlink(file);
  snprintf(file, sizeof file, "%s/x.bmp", path);
  CHECK(fd_image_write(file, img.rgb, 640, 512) == FD_ERR_ARG);
  CHECK(fd_image_read(file, &back) == FD_ERR_IO);
  snprintf(file, sizeof file, "%s/none/x.png", path);
  CHECK(fd_image_write(file, img.rgb, 640, 512) == FD_ERR_IO);
  rmdir(path);

  const uint8_t a[12] = {1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12}, *pictures[3] = {a, a, a};
  CHECK(fd_image_sheet(pictures, 3, 2, 2, 0, 1, &sheet) == FD_OK && sheet.w == 7 && sheet.h == 7);
  CHECK(sheet.rgb[0] == 255 && memcmp(sheet.rgb + (1 * 7 + 1) * 3, a, 6) == 0 && memcmp(sheet.rgb + (2 * 7 + 4) * 3, a + 6, 6) == 0);
  CHECK(sheet.rgb[(4 * 7 + 4) * 3] == 255); /* no fourth picture */
  CHECK(fd_image_fit(&img, 0, NULL, sheet.rgb) == FD_ERR_ARG);
  CHECK(fd_image_reserve(&img, 0, 3) == FD_ERR_ARG);
  fd_image_free(&img);
  fd_image_free(&back);
  fd_image_free(&sheet);
}

int main(void) {
  test_resize();
  test_files();
  return failed;
}
