// SPDX-License-Identifier: Apache-2.0
// Data path: pictures per CPU second from tars of JPEGs (quality 90, made here) to tokens and pixels, with its parts.
// bench_data [SIDE [RESOLUTION [SECONDS]]]; built by `make tests/bench_data`.
#include <time.h>

#include "base/rng.h"
#include "datatest.h"
#include "io/loader.h"

enum { N = 64, BATCH = 16 };

static double cpu_s(void) {
  struct timespec t;
  clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &t);
  return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

/* Smooth shapes with texture: about 0.4 bytes a pixel, as photographs have at this quality. */
static void draw(uint8_t *rgb, int side, int i) {
  for (int y = 0; y < side; y++)
    for (int x = 0; x < side; x++) {
      uint32_t r[4];
      const int shape = ((x + 13 * i) / 37 + (y + 7 * i) / 53) % 5;
      if ((x & 3) == 0) fd_rng_block(1, FD_RNG_SYNTHETIC, (uint64_t)i, (uint32_t)(y * side + x), r);
      for (int c = 0; c < 3; c++) rgb[((size_t)y * (size_t)side + (size_t)x) * 3 + (size_t)c] = (uint8_t)(60 + 30 * shape + 10 * c + (int)(r[x & 3] >> (8 * c) & 31));
    }
}

int main(int argc, char **argv) {
  const int side = argc > 1 ? atoi(argv[1]) : 512, R = argc > 2 ? atoi(argv[2]) : 256;
  const double seconds = argc > 3 ? atof(argv[3]) : 2.0;
  static const char caption[] = "a large red circle on a blue background, left; a small green star on a white background, top; a large yellow ring on a black "
                                "background, center; a small purple cross on an orange background, bottom; a large white square on a green background, right.";
  fd_comm *comm = NULL;
  fd_tokenizer *t = NULL;
  fd_prompt *prompt = NULL;
  fd_dataset *d = NULL;
  fd_loader *l = NULL;
  char folder[4096];
  const char *top = getenv("top_srcdir");
  if (side < 16 || R < 1 || fd_comm_create(&comm) != FD_OK) return 1;
  dt_open(comm);
  uint8_t *rgb = malloc((size_t)side * (size_t)side * 3);
  fd_tar_writer *w = NULL;
  int64_t total = 0;
  CHECK(rgb && fd_tar_writer_create(dt_path("bench.tar"), &w) == FD_OK);
  for (int i = 0; i < N && !failed; i++) {
    char name[32];
    void *bytes;
    size_t n;
    draw(rgb, side, i);
    CHECK(fd_image_encode_jpeg(rgb, side, side, 90, &bytes, &n) == FD_OK);
    snprintf(name, sizeof name, "%03d.jpg", i);
    CHECK(fd_tar_writer_add(w, name, bytes, n) == FD_OK);
    snprintf(name, sizeof name, "%03d.txt", i);
    dt_add_text(w, name, caption);
    total += (int64_t)n;
    free(bytes);
  }
  free(rgb);
  CHECK(fd_tar_writer_close(&w) == FD_OK);
  snprintf(folder, sizeof folder, "%s/input/demo/tokenizer", top ? top : ".");
  CHECK(fd_tokenizer_open(folder, &t) == FD_OK);
  CHECK(t && fd_prompt_create(t, &(struct fd_prompt_config){.max_prompt_length = 256}, &prompt) == FD_OK);
  const char *path = dt_path("bench.tar");
  const struct fd_dataset_config config = {.paths = &path, .n_paths = 1, .image_column = "jpg", .caption_columns = {"txt", ""}, .index_path = dt_path("bench.h5")};
  CHECK(fd_dataset_open(comm, &config, &d) == FD_OK);

  printf("%d JPEGs of %d x %d, %.0f KiB each, to %d x %d and tokens, one thread\n", N, side, side, (double)total / N / 1024, R, R);
  for (int fast = 0; fast < 2 && !failed; fast++) {
    const struct fd_loader_config c = {.dataset = d, .prompt = prompt, .resolution = R, .micros = 1, .global_batch = BATCH, .count = BATCH, .center_crop = true,
                                       .fast_jpeg = fast, .max_bad_fraction = 0};
    struct fd_batch b;
    int64_t step = 0, tokens = 0;
    CHECK(fd_loader_create(&c, &l) == FD_OK && fd_loader_get(l, step, 0, &b, NULL) == FD_OK); /* warm */
    const double t0 = cpu_s();
    double used = 0;
    while (!failed && used < seconds) {
      CHECK(fd_loader_get(l, ++step, 0, &b, NULL) == FD_OK);
      tokens += b.total;
      used = cpu_s() - t0;
    }
    printf("%-22s %8.1f images per CPU second (%.2f ms each, %.0f tokens)\n", fast ? "data.fast_jpeg = true" : "exact", (double)(step * BATCH) / used,
           1e3 * used / (double)(step * BATCH), (double)tokens / (double)(step * BATCH));
    fd_loader_destroy(&l);
  }
  /* the parts */
  struct fd_sample s = {0};
  fd_image img = {0};
  uint8_t *out = malloc((size_t)R * (size_t)R * 3);
  int32_t ids[512];
  double part[4] = {0};
  int64_t n = 0;
  for (double used = 0; !failed && out && used < seconds; n++) {
    const double t0 = cpu_s();
    CHECK(fd_dataset_read(d, n % N, 1, &s) == FD_BAD_NONE);
    const double t1 = cpu_s();
    CHECK(fd_image_decode(s.image, s.image_bytes, 0, &img) == FD_IMAGE_KEPT);
    const double t2 = cpu_s();
    CHECK(fd_image_fit(&img, R, NULL, out) == FD_OK);
    const double t3 = cpu_s();
    CHECK(fd_prompt_encode(prompt, s.caption[0], (size_t)s.caption_bytes[0], ids) > 0);
    const double t4 = cpu_s();
    part[0] += t1 - t0, part[1] += t2 - t1, part[2] += t3 - t2, part[3] += t4 - t3;
    used += t4 - t0;
  }
  printf("parts in ms: read %.3f, decode %.3f, resize %.3f, tokenize %.3f\n", 1e3 * part[0] / (double)n, 1e3 * part[1] / (double)n, 1e3 * part[2] / (double)n,
         1e3 * part[3] / (double)n);
  free(out);
  fd_sample_free(&s);
  fd_image_free(&img);
  fd_dataset_destroy(&d);
  fd_prompt_destroy(&prompt);
  fd_tokenizer_destroy(&t);
  dt_close(comm);
  fd_comm_destroy(&comm);
  return failed;
}
