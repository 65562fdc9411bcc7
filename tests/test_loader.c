// SPDX-License-Identifier: Apache-2.0
// The loader: what a position sees does not depend on how the positions are shared out, on threads, or on where a run
// resumes; each sample once per epoch; bad samples replaced, counted, and too many of them an error. One process plays
// all ranks: nothing in a loader communicates.
#include <math.h>

#include "datatest.h"
#include "io/loader.h"

enum { N = 30, R = 16, GLOBAL = 12, STEPS = 7, MICROS = 2, LENGTH = 24 };

struct seen {
  int64_t sample;
  uint64_t pixels;
  int32_t len, ids[LENGTH];
  char text[64];
};

static uint64_t hash(const void *data, size_t n) {
  uint64_t h = 1469598103934665603u;
  for (size_t i = 0; i < n; i++) h = (h ^ ((const uint8_t *)data)[i]) * 1099511628211u;
  return h;
}

static void keep(const struct fd_batch *b, struct seen *all) {
  int32_t total = 0;
  for (int i = 0; i < b->B; i++) {
    struct seen *s = &all[b->position[i]];
    *s = (struct seen){.sample = b->sample[i], .pixels = hash(b->pixels + (size_t)i * R * R * 3, R * R * 3), .len = b->len[i]};
    CHECK(b->first[i] == total && b->len[i] >= 1 && b->len[i] <= LENGTH);
    memcpy(s->ids, b->ids + b->first[i], (size_t)b->len[i] * sizeof *s->ids);
    snprintf(s->text, sizeof s->text, "%s", b->text[i]);
    total += b->len[i];
  }
  CHECK(total == b->total);
}

/* all positions of the run, as `ranks` ranks with `threads` threads see them, from step `from` on */
static void collect(struct fd_loader_config c, int ranks, int threads, int64_t from, struct seen *all, int64_t counts[FD_BAD_COUNT]) {
  memset(counts, 0, FD_BAD_COUNT * sizeof *counts);
  for (int r = 0; r < ranks; r++) {
    fd_loader *l = NULL;
    struct fd_batch b;
    c.first = r * GLOBAL / ranks;
    c.count = GLOBAL / ranks;
    c.threads = threads;
    CHECK(fd_loader_create(&c, &l) == FD_OK);
    if (!l) return;
    CHECK(fd_loader_token_capacity(l) == c.count * LENGTH);
    for (int64_t step = from; step < STEPS; step++)
      for (int m = 0; m < MICROS; m++) {
        double wait = -1;
        CHECK(fd_loader_get(l, step, m, &b, &wait) == FD_OK && wait >= 0);
        CHECK(b.B == c.count && b.R == R && b.position[0] == (step * MICROS + m) * GLOBAL + c.first);
        keep(&b, all);
      }
    int64_t mine[FD_BAD_COUNT];
    fd_loader_counts(l, mine);
    for (int k = 0; k < FD_BAD_COUNT; k++) counts[k] += mine[k];
    fd_loader_destroy(&l);
  }
}

static bool same(const struct seen *a, const struct seen *b, int64_t from) {
  const size_t first = (size_t)from * MICROS * GLOBAL;
  return memcmp(a + first, b + first, ((size_t)STEPS * MICROS * GLOBAL - first) * sizeof *a) == 0;
}

static void test_order(fd_dataset *d, const fd_prompt *prompt) {
  enum { ALL = STEPS * MICROS * GLOBAL };
  static struct seen one[ALL], other[ALL];
  int64_t counts[FD_BAD_COUNT], again[FD_BAD_COUNT];
  struct fd_loader_config c = {.dataset = d, .prompt = prompt, .seed = 5, .resolution = R, .micros = MICROS, .global_batch = GLOBAL, .center_crop = true,
                               .random_dropping_rate = 0.25, .max_bad_fraction = 0.05};
  memset(one, 0, sizeof one);
  collect(c, 1, 0, 0, one, counts);
  CHECK(counts[FD_BAD_NONE] == ALL);
  static const int ways[][2] = {{1, 1}, {1, 3}, {2, 1}, {3, 0}, {3, 2}};
  for (size_t i = 0; i < sizeof ways / sizeof *ways; i++) {
    memset(other, 0, sizeof other);
    collect(c, ways[i][0], ways[i][1], 0, other, again);
    CHECK(same(one, other, 0) && memcmp(counts, again, sizeof counts) == 0);
  }
  /* resumed at step 3 on other ranks */
  memset(other, 0, sizeof other);
  collect(c, 2, 1, 3, other, again);
  CHECK(same(one, other, 3));
  /* each sample once in each whole epoch, in another order in the next; the text belongs to the sample */
  int dropped = 0, moved = 0;
  for (int epoch = 0; epoch < ALL / N; epoch++) {
    int visits[N] = {0};
    for (int i = 0; i < N; i++) {
      const struct seen *s = &one[epoch * N + i];
      char text[64];
      visits[s->sample]++;
      snprintf(text, sizeof text, "a large red circle %lld", (long long)s->sample);
      CHECK(s->text[0] == 0 ? s->len == 1 : strcmp(s->text, text) == 0 && s->len > 1);
      dropped += s->text[0] == 0;
      if (epoch && one[i].sample != s->sample) moved++;
    }
    for (int i = 0; i < N; i++) CHECK(visits[i] == 1);
  }
  CHECK(moved > N);
  CHECK(fabs(dropped / (double)(ALL / N * N) - 0.25) < 0.12); /* 150 draws: 0.035 is a standard deviation */
  /* another seed, another order; the same step again, and steps out of order */
  c.seed = 6;
  collect(c, 1, 1, 0, other, again);
  CHECK(!same(one, other, 0));
  c.seed = 5;
  c.count = GLOBAL;
  c.threads = 2;
  fd_loader *l = NULL;
  struct fd_batch b;
  CHECK(fd_loader_create(&c, &l) == FD_OK);
  static const int steps[][2] = {{4, 1}, {4, 1}, {0, 0}, {0, 1}, {6, 0}, {5, 1}, {1, 0}, {1, 1}, {2, 0}, {2, 1}};
  for (size_t i = 0; i < sizeof steps / sizeof *steps; i++) {
    memset(other, 0, sizeof other);
    CHECK(fd_loader_get(l, steps[i][0], steps[i][1], &b, NULL) == FD_OK);
    keep(&b, other);
    const size_t first = (size_t)(steps[i][0] * MICROS + steps[i][1]) * GLOBAL;
    CHECK(memcmp(one + first, other + first, GLOBAL * sizeof *one) == 0);
  }
  CHECK(fd_loader_get(l, 0, MICROS, &b, NULL) == FD_ERR_ARG && fd_loader_get(l, -1, 0, &b, NULL) == FD_ERR_ARG);
  fd_loader_destroy(&l);
  /* a random crop moves with the position, not with the rank */
  c.center_crop = false;
  memset(one, 0, sizeof one);
  memset(other, 0, sizeof other);
  collect(c, 1, 0, 0, one, counts);
  collect(c, 3, 1, 0, other, counts);
  CHECK(same(one, other, 0));
  CHECK(fd_loader_create(&(struct fd_loader_config){.dataset = d, .prompt = prompt, .resolution = R, .micros = 1, .global_batch = 4, .first = 2, .count = 4}, &l) == FD_ERR_ARG);
  c.original_caption_rate = 0.5;
  c.first = 0;
  CHECK(fd_loader_create(&c, &l) == FD_ERR_CONFIG && strstr(fd_status_message(), "caption_column.original"));
}

/* 40 samples, 4 of them bad in different ways */
static void make_bad(void) {
  fd_tar_writer *w = NULL;
  char name[64];
  CHECK(fd_tar_writer_create(dt_path("bad.tar"), &w) == FD_OK);
  for (int i = 0; i < 40; i++) {
    snprintf(name, sizeof name, "%05d.jpg", i);
    if (i == 3)
      dt_add_text(w, name, "no picture at all");
    else if (i == 11)
      CHECK(fd_tar_writer_add(w, name, "\xff\xd8\xff\xe0\0\20JFIF", 10) == FD_OK);
    else
      dt_add_jpeg(w, name, i);
    snprintf(name, sizeof name, "%05d.txt", i);
    dt_add_text(w, name, i == 20 || i == 21 ? "caf\xe9" : "a red circle");
    snprintf(name, sizeof name, "%05d.long.txt", i);
    if (i % 2) dt_add_text(w, name, "an original caption");
  }
  CHECK(fd_tar_writer_close(&w) == FD_OK);
}

static void test_bad(fd_comm *comm, const fd_prompt *prompt) {
  enum { ALL = STEPS * MICROS * GLOBAL };
  static struct seen one[ALL], other[ALL];
  int64_t counts[FD_BAD_COUNT], again[FD_BAD_COUNT];
  const char *path = dt_path("bad.tar");
  const struct fd_dataset_config config = {.paths = &path, .n_paths = 1, .image_column = "jpg", .caption_columns = {"txt", "long.txt"}, .index_path = dt_path("bad.h5")};
  fd_dataset *d = NULL;
  CHECK(fd_dataset_open(comm, &config, &d) == FD_OK && fd_dataset_samples(d) == 40);
  if (!d) return;
  struct fd_loader_config c = {.dataset = d, .prompt = prompt, .seed = 9, .resolution = R, .micros = MICROS, .global_batch = GLOBAL, .center_crop = true, .max_bad_fraction = 0.5};
  memset(one, 0, sizeof one);
  memset(other, 0, sizeof other);
  collect(c, 1, 1, 0, one, counts);
  collect(c, 3, 2, 0, other, again);
  CHECK(same(one, other, 0) && memcmp(counts, again, sizeof counts) == 0);
  CHECK(counts[FD_BAD_NONE] == ALL);
  /* 168 positions: four whole epochs of 40 and 8 more, and what was drawn in place of bad ones */
  CHECK(counts[FD_BAD_IMAGE_UNKNOWN] >= 4 && counts[FD_BAD_IMAGE_DAMAGED] >= 4 && counts[FD_BAD_CAPTION_UTF8] >= 8 && counts[FD_BAD_CAPTION_UTF8] < 24);
  CHECK(counts[FD_BAD_READ] == 0);
  for (int i = 0; i < ALL; i++) CHECK(one[i].sample != 3 && one[i].sample != 11 && one[i].sample != 20 && one[i].sample != 21 && one[i].len > 1);
  /* the other caption where a sample has one */
  c.original_caption_rate = 1;
  collect(c, 1, 0, 0, one, counts);
  for (int i = 0; i < ALL; i++) CHECK(strcmp(one[i].text, one[i].sample % 2 ? "an original caption" : "a red circle") == 0);
  c.original_caption_rate = 0;
  /* too many: the run stops, and says why */
  c.max_bad_fraction = 0.05;
  c.count = GLOBAL;
  c.threads = 1;
  fd_loader *l = NULL;
  struct fd_batch b;
  CHECK(fd_loader_create(&c, &l) == FD_OK);
  fd_status st = FD_OK;
  int64_t step = 0;
  for (; step < 50 && st == FD_OK; step++) st = fd_loader_get(l, step, 0, &b, NULL);
  CHECK(st == FD_ERR_DATA && strstr(fd_status_message(), "max_bad_fraction") && strstr(fd_status_message(), "UTF-8") && step > 1);
  fd_loader_destroy(&l);
  fd_dataset_destroy(&d);
}

/* nothing but bad samples; more left out by the index than allowed; tars that are missing */
static void test_useless(fd_comm *comm, const fd_prompt *prompt) {
  if (comm->rank == 0) {
    fd_tar_writer *w = NULL;
    CHECK(fd_tar_writer_create(dt_path("junk.tar"), &w) == FD_OK);
    for (int i = 0; i < 5; i++) {
      char name[64];
      snprintf(name, sizeof name, "%d.jpg", i);
      dt_add_text(w, name, "junk");
      snprintf(name, sizeof name, "%d.txt", i);
      dt_add_text(w, name, "junk");
    }
    CHECK(fd_tar_writer_close(&w) == FD_OK);
    CHECK(fd_tar_writer_create(dt_path("half.tar"), &w) == FD_OK);
    dt_add_jpeg(w, "a.jpg", 1);
    dt_add_text(w, "a.txt", "x");
    dt_add_jpeg(w, "b.jpg", 1);
    CHECK(fd_tar_writer_close(&w) == FD_OK);
  }
  fd_comm_barrier(comm);
  const char *path = dt_path("junk.tar");
  struct fd_dataset_config config = {.paths = &path, .n_paths = 1, .image_column = "jpg", .caption_columns = {"txt", ""}, .index_path = dt_path("useless.h5")};
  struct fd_loader_config c = {.prompt = prompt, .resolution = R, .micros = 1, .global_batch = 2, .count = 2, .max_bad_fraction = 1, .threads = 1};
  fd_loader *l = NULL;
  struct fd_batch b;
  CHECK(fd_dataset_open(comm, &config, &c.dataset) == FD_OK);
  CHECK(fd_loader_create(&c, &l) == FD_OK && fd_loader_get(l, 0, 0, &b, NULL) == FD_ERR_DATA && strstr(fd_status_message(), "bad"));
  fd_loader_destroy(&l);
  fd_dataset_destroy(&c.dataset);
  path = dt_path("half.tar");
  CHECK(fd_dataset_open(comm, &config, &c.dataset) == FD_OK);
  c.max_bad_fraction = 0.4;
  CHECK(fd_loader_create(&c, &l) == FD_ERR_DATA && strstr(fd_status_message(), "no caption"));
  c.max_bad_fraction = 0.5;
  CHECK(fd_loader_create(&c, &l) == FD_OK);
  fd_loader_destroy(&l);
  fd_dataset_destroy(&c.dataset);
  path = dt_path("data{,_1,_2}.tar");
  CHECK(fd_dataset_open(comm, &config, &c.dataset) == FD_OK);
  CHECK(fd_loader_create(&c, &l) == FD_ERR_DATA && strstr(fd_status_message(), "data_1.tar"));
  fd_dataset_destroy(&c.dataset);
}

int main(void) {
  fd_comm *comm = NULL;
  fd_tokenizer *t = NULL;
  fd_prompt *prompt = NULL;
  fd_dataset *d = NULL;
  char folder[4096];
  const char *top = getenv("top_srcdir");
  if (fd_comm_create(&comm) != FD_OK) return 1;
  dt_open(comm);
  if (comm->rank == 0) {
    dt_tar("data.tar", 0, N);
    make_bad();
  }
  fd_comm_barrier(comm);
  snprintf(folder, sizeof folder, "%s/input/demo/tokenizer", top ? top : ".");
  CHECK(fd_tokenizer_open(folder, &t) == FD_OK);
  CHECK(t && fd_prompt_create(t, &(struct fd_prompt_config){.max_prompt_length = LENGTH}, &prompt) == FD_OK);
  const char *path = dt_path("data.tar");
  const struct fd_dataset_config config = {.paths = &path, .n_paths = 1, .image_column = "jpg", .caption_columns = {"txt", ""}, .index_path = dt_path("data.h5")};
  CHECK(fd_dataset_open(comm, &config, &d) == FD_OK && fd_dataset_samples(d) == N);
  if (prompt && d) {
    test_order(d, prompt);
    test_bad(comm, prompt);
    test_useless(comm, prompt);
  }
  fd_dataset_destroy(&d);
  fd_prompt_destroy(&prompt);
  fd_tokenizer_destroy(&t);
  dt_close(comm);
  const int result = dt_result(comm);
  fd_comm_destroy(&comm);
  return failed || result;
}
