// SPDX-License-Identifier: Apache-2.0
// The data path on one thread: a JPEG of 512 x 512 (quality 90, about 100 KiB) to 256 x 256 pixels, a caption of some 60 words to ids.
// bench_data [TOKENIZER FOLDER]. Prints pictures per second of processor time. Not a test.
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "base/rng.h"
#include "io/image.h"
#include "io/tokenizer.h"

enum { SIDE = 512, R = 256, PICTURES = 16, ROUNDS = 12 };

static double cpu_s(void) {
  struct timespec t;
  clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &t);
  return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

/* Smooth shapes with texture, so that the file is about as large as a photograph's. */
static void draw(int seed, unsigned char *rgb) {
  for (int y = 0; y < SIDE; y++)
    for (int x = 0; x < SIDE; x++) {
      float z[4];
      fd_rng_normal4((uint64_t)seed, FD_RNG_SYNTHETIC, (uint64_t)y, (uint32_t)x, z);
      for (int k = 0; k < 3; k++) {
        double v = 128 + 60 * sin(0.01 * x * (seed + 1) + k) + 40 * cos(0.023 * y + 0.01 * x) + 9 * (double)z[k];
        rgb[(y * SIDE + x) * 3 + k] = (unsigned char)fmin(255, fmax(0, v));
      }
    }
}

int main(int argc, char **argv) {
  static const char caption[] =
      "A wide view over a quiet harbour at dusk, where small wooden boats with red and blue hulls lie beside a stone pier, their ropes loose on "
      "the water; behind them low white houses climb a hill under a sky of orange and violet clouds, and a single lamp at the end of the pier "
      "throws a long reflection towards the camera.";
  const char *folder = argc > 1 ? argv[1] : "input/demo/tokenizer";
  unsigned char *rgb = malloc(SIDE * SIDE * 3), *out = malloc(R * R * 3);
  void *jpeg[PICTURES];
  size_t bytes[PICTURES], all = 0;
  fd_tokenizer *tokenizer = NULL;
  fd_image image = {0};
  double decode = 0, fit = 0, tokens = 0, best = 1e30;
  int32_t ids[1024];
  if (!rgb || !out) return 7;
  if (fd_tokenizer_open(folder, &tokenizer) != FD_OK) {
    fprintf(stderr, "bench_data: %s\n", fd_status_message());
    return 3;
  }
  for (int i = 0; i < PICTURES; i++) {
    draw(i, rgb);
    if (fd_image_encode_jpeg(rgb, SIDE, SIDE, 90, &jpeg[i], &bytes[i]) != FD_OK) return 4;
    all += bytes[i];
  }
  for (int round = 0; round < ROUNDS; round++) {
    double t0 = cpu_s(), d = 0, f = 0, k = 0;
    for (int i = 0; i < PICTURES; i++) {
      double a = cpu_s();
      if (fd_image_decode(jpeg[i], bytes[i], 0, &image) != FD_IMAGE_KEPT) return 4;
      double b = cpu_s();
      if (fd_image_fit(&image, R, NULL, out) != FD_OK) return 4;
      double c = cpu_s();
      fd_tokenizer_encode(tokenizer, caption, sizeof caption - 1, true, ids, 1024);
      d += b - a, f += c - b, k += cpu_s() - c;
    }
    const double s = cpu_s() - t0;
    if (s < best) best = s, decode = d, fit = f, tokens = k;
  }
  printf("%.0f pictures per second of processor time (best of %d rounds of %d; %zu KiB each)\n", PICTURES / best, ROUNDS, PICTURES, all / PICTURES / 1024);
  printf("ms per picture: decode %.2f, resize and crop %.2f, tokens %.2f\n", 1e3 * decode / PICTURES, 1e3 * fit / PICTURES, 1e3 * tokens / PICTURES);
  for (int i = 0; i < PICTURES; i++) free(jpeg[i]);
  fd_image_free(&image);
  fd_tokenizer_destroy(&tokenizer);
  free(rgb);
  free(out);
  return 0;
}
