// SPDX-License-Identifier: Apache-2.0
// For tests of training: a folder with a few captioned pictures, a small configuration on the demo's frozen models, and
// the numbers of metrics.csv.
#ifndef FD_TESTS_TRAINTEST_H
#define FD_TESTS_TRAINTEST_H

#include <errno.h>
#include <ftw.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include "base/config.h"
#include "base/log.h"
#include "comm/comm.h"
#include "eval/shapes.h"
#include "io/h5.h"
#include "io/image.h"
#include "io/tar_write.h"
#include "train/job.h"

#define TT_UNUSED __attribute__((unused))

static int tt_failed;
#define CHECK(c)                                                                         \
  do {                                                                                   \
    if (!(c)) tt_failed = 1, printf("%s:%d: %s\n", __FILE__, __LINE__, #c), fflush(stdout); \
  } while (0)

static char tt_dir[256]; /* scratch folder, the same on all ranks */

TT_UNUSED static int tt_remove_one(const char *path, const struct stat *s, int flag, struct FTW *ftw) {
  (void)s, (void)flag, (void)ftw;
  return remove(path);
}

TT_UNUSED static void tt_remove(const char *path) { nftw(path, tt_remove_one, 16, FTW_DEPTH | FTW_PHYS); }

/* Folder DIR/data.tar with n pictures of 64 x 64. */
TT_UNUSED static fd_status tt_write_data(int n) {
  fd_status st = FD_OK;
  fd_tar_writer *w = NULL;
  void *jpeg = NULL;
  size_t bytes;
  static unsigned char rgb[64 * 64 * 3];
  char path[512], name[64], sentence[128];
  snprintf(path, sizeof path, "%s/data.tar", tt_dir);
  FD_TRY(fd_tar_writer_create(path, &w));
  for (int i = 0; i < n; i++) {
    struct fd_shape_words words;
    struct fd_shape_pose pose;
    fd_shapes_draw_words(1, (uint64_t)i, false, &words);
    fd_shapes_draw_pose(1, (uint64_t)i, &words, &pose);
    fd_shapes_render(1, (uint64_t)i, &words, &pose, 64, rgb);
    fd_shapes_sentence(&words, sentence, sizeof sentence);
    FD_TRY(fd_image_encode_jpeg(rgb, 64, 64, 95, &jpeg, &bytes));
    snprintf(name, sizeof name, "%05d.jpg", i);
    FD_TRY(fd_tar_writer_add(w, name, jpeg, bytes));
    free(jpeg);
    jpeg = NULL;
    snprintf(name, sizeof name, "%05d.txt", i);
    FD_TRY(fd_tar_writer_add(w, name, sentence, strlen(sentence)));
  }
  FD_TRY(fd_tar_writer_close(&w));
done:
  free(jpeg);
  fd_tar_writer_destroy(&w);
  return st;
}

/* Make the scratch folder and the data. Collective. */
TT_UNUSED static fd_status tt_begin(fd_comm *comm, int n) {
  fd_status st = FD_OK;
  if (fd_comm_rank(comm) == 0) {
    const char *tmp = getenv("TMPDIR");
    snprintf(tt_dir, sizeof tt_dir, "%s/fdhpc-train-XXXXXX", tmp ? tmp : "/tmp");
    if (!mkdtemp(tt_dir)) st = FD_FAIL(FD_ERR_IO, "%s: %s", tt_dir, strerror(errno));
    if (st == FD_OK) st = tt_write_data(n);
  }
  st = fd_agree(comm, st);
  if (st == FD_OK) st = fd_comm_bcast(comm, tt_dir, sizeof tt_dir, 0);
  return st;
}

TT_UNUSED static void tt_end(fd_comm *comm) {
  fd_comm_barrier(comm);
  if (fd_comm_rank(comm) == 0) tt_remove(tt_dir);
}

/* Train in DIR/run; `more`: further "key=value" pairs, ends with NULL. Collective over comm. */
TT_UNUSED static fd_status tt_train(fd_comm *comm, const char *run, const char *const *more) {
  fd_status st = FD_OK;
  fd_config *config = NULL;
  const char *top = getenv("top_srcdir");
  char models[512], text[1024];
  snprintf(models, sizeof models, "%s/input/demo", top ? top : ".");
  static const char *const base[] = {
      "trainer.mixed_precision=no", "trainer.backend=cpu",     "trainer.logging_steps=1",   "trainer.checkpointing_steps=0",
      "trainer.sampling_steps=0",   "model.dit_num_hidden_layers=2",                        "model.text_hidden_size=0",
      "model.sample_size=8",        "model.pos_embed_max_size=8",                           "model.base_config_override.hidden_size=96",
      "model.base_config_override.intermediate_size=192",      "model.base_config_override.num_attention_heads=3",
      "model.base_config_override.num_key_value_heads=1",      "model.base_config_override.head_dim=32",
      "model.base_config_override.initializer_range=0.1",      "optimizer.lr=1e-3",         "lr_scheduler.name=constant_with_warmup",
      "lr_scheduler.num_warmup_steps=4",                       "ema.decay=0.99",            "ema.warmup=true",
      "data.resolution=64",         "data.max_prompt_length=32", "data.dataloader_num_workers=1", NULL};
  FD_TRY(fd_config_create(&config));
  for (int i = 0; base[i]; i++) FD_TRY(fd_config_set(config, "test", base[i]));
#define TT_SET(...)                                       \
  do {                                                    \
    snprintf(text, sizeof text, __VA_ARGS__);             \
    FD_TRY(fd_config_set(config, "test", text));          \
  } while (0)
  TT_SET("model.base=%s/text_encoder", models);
  TT_SET("vae.pretrained_model_name_or_path=%s/vae", models);
  TT_SET("data.tokenizer=%s/tokenizer", models);
  TT_SET("data.data_path=%s/data.tar", tt_dir);
  TT_SET("trainer.checkpoint_dir=%s/%s", tt_dir, run);
  for (int i = 0; more[i]; i++) FD_TRY(fd_config_set(config, "test", more[i]));
  FD_TRY(fd_config_finish(config));
  FD_TRY(fd_train_run(config, comm));
done:
  fd_config_destroy(&config);
  return st;
}

/* A run on the first `ranks` ranks that ends with status `want`, the others wait. Collective over world. */
TT_UNUSED static void tt_train_on(fd_comm *world, int ranks, const char *run, fd_status want, const char *const *more) {
  fd_comm *comm = NULL;
  if (fd_comm_split(world, fd_comm_rank(world) < ranks ? 0 : -1, &comm) != FD_OK) {
    CHECK(!"split");
    return;
  }
  if (comm) {
    const fd_status st = tt_train(comm, run, more);
    CHECK(st == want);
    if (st != want) printf("%s: %s: %s (%s)\n", run, fd_status_name(st), fd_status_message(), fd_status_where());
    fd_comm_destroy(&comm);
  }
  fd_comm_barrier(world);
}

#define TT_SETTINGS(...) ((const char *const[]){__VA_ARGS__, NULL})

enum { TT_MOST_STEPS = 64 };

struct tt_row {
  long step;
  double loss, norm, lr;
  char text[128]; /* step, loss, mean, norm, lr as printed */
};

/* Rows of DIR/run/metrics.csv; their number. Local. */
TT_UNUSED static int tt_metrics(const char *run, struct tt_row *rows, int most) {
  char path[512], line[1024];
  snprintf(path, sizeof path, "%s/%s/metrics.csv", tt_dir, run);
  FILE *f = fopen(path, "r");
  int n = 0;
  if (!f || !fgets(line, sizeof line, f)) {
    if (f) fclose(f);
    return 0;
  }
  while (n < most && fgets(line, sizeof line, f)) {
    double mean;
    if (sscanf(line, "%ld,%lf,%lf,%lf,%lf", &rows[n].step, &rows[n].loss, &mean, &rows[n].norm, &rows[n].lr) != 5) break;
    char *end = line;
    for (int commas = 0; *end && commas < 5; end++) commas += *end == ',';
    snprintf(rows[n].text, sizeof rows[n].text, "%.*s", (int)(end - line), line);
    n++;
  }
  fclose(f);
  return n;
}

TT_UNUSED static double tt_relative(double a, double b) { return fabs(a - b) / fmax(fabs(b), 1e-30); }

/* Largest difference between two checkpoints over all data sets, relative to the largest element of each; 0 only if all bits
 * agree, infinite if their data sets differ. Local. */
TT_UNUSED static double tt_compare(const char *run_a, const char *run_b, long step) {
  double worst = INFINITY;
  hid_t file[2] = {-1, -1};
  struct fd_h5_array x = {0}, y = {0};
  char path[512], **names = NULL;
  int n = 0;
  for (int i = 0; i < 2; i++) {
    snprintf(path, sizeof path, "%s/%s/checkpoints/step-%ld.h5", tt_dir, i ? run_b : run_a, step);
    if (fd_h5_open_read(path, &file[i]) != FD_OK) goto out;
  }
  if (fd_h5_list(file[0], "/", true, &n, &names) != FD_OK || n < 4) goto out;
  worst = 0;
  for (int i = 0; i < n; i++) {
    if (fd_h5_read(file[0], names[i], FD_F32, &x) != FD_OK || fd_h5_read(file[1], names[i], FD_F32, &y) != FD_OK ||
        x.numel != y.numel) {
      worst = INFINITY;
      break;
    }
    double most = 1e-30, d = 0;
    const float *a = x.data, *b = y.data;
    for (int64_t e = 0; e < x.numel; e++) most = fmax(most, fabs(a[e])), d = fmax(d, fabs((double)a[e] - b[e]));
    if (memcmp(a, b, (size_t)x.numel * sizeof(float))) worst = fmax(worst, fmax(d / most, 1e-300));
    fd_h5_array_free(&x);
    fd_h5_array_free(&y);
  }
out:
  fd_h5_array_free(&x);
  fd_h5_array_free(&y);
  free(names);
  for (int i = 0; i < 2; i++) fd_h5_close(&file[i]);
  return worst;
}

/* Rows of two runs, as many as `steps` (below TT_MOST_STEPS) each; false, and a failed check, if they are not. */
TT_UNUSED static bool tt_two(const char *run_a, const char *run_b, int steps, struct tt_row *a, struct tt_row *b) {
  CHECK(steps < TT_MOST_STEPS);
  if (steps >= TT_MOST_STEPS) return false;
  const int n = tt_metrics(run_a, a, steps + 1), m = tt_metrics(run_b, b, steps + 1);
  CHECK(n == steps && m == steps);
  return n == steps && m == steps;
}

TT_UNUSED static void tt_show(const char *run_a, const char *run_b, const struct tt_row *a, const struct tt_row *b, int steps) {
  for (int i = 0; i < steps; i++)
    if (strcmp(a[i].text, b[i].text))
      printf("%s, %s: step %ld: loss %.9g and %.9g (%.2g), norm %.9g and %.9g (%.2g), rate %g and %g\n", run_a, run_b, a[i].step, a[i].loss, b[i].loss,
             tt_relative(a[i].loss, b[i].loss), a[i].norm, b[i].norm, tt_relative(a[i].norm, b[i].norm), a[i].lr, b[i].lr);
}

/* The same learning rates; losses within `first` at step 1 and `loss` at all, gradient norms within `norm`, relative. Local. */
TT_UNUSED static void tt_check_close(const char *run_a, const char *run_b, int steps, double first, double loss, double norm) {
  struct tt_row a[TT_MOST_STEPS], b[TT_MOST_STEPS];
  if (!tt_two(run_a, run_b, steps, a, b)) return;
  bool ok = tt_relative(a[0].loss, b[0].loss) <= first;
  for (int i = 0; i < steps; i++)
    ok = ok && tt_relative(a[i].loss, b[i].loss) <= loss && tt_relative(a[i].norm, b[i].norm) <= norm && a[i].lr == b[i].lr;
  CHECK(ok);
  if (!ok) tt_show(run_a, run_b, a, b, steps);
}

/* The same bits in every row and in the checkpoints after the last step. Local. */
TT_UNUSED static void tt_check_same(const char *run_a, const char *run_b, int steps) {
  struct tt_row a[TT_MOST_STEPS], b[TT_MOST_STEPS];
  if (!tt_two(run_a, run_b, steps, a, b)) return;
  bool ok = true;
  for (int i = 0; i < steps; i++) ok = ok && !strcmp(a[i].text, b[i].text);
  CHECK(ok);
  if (!ok) tt_show(run_a, run_b, a, b, steps);
  const double d = tt_compare(run_a, run_b, steps);
  CHECK(d == 0);
  if (d != 0) printf("%s, %s: checkpoints differ by %g\n", run_a, run_b, d);
}

/* Start again with kernels of AVX2 at most: before MPI, since both oneDNN and our clones are chosen once. */
TT_UNUSED static void tt_avx2(char **argv) {
  if (getenv("DNNL_MAX_CPU_ISA")) return;
  setenv("DNNL_MAX_CPU_ISA", "AVX2", 1);
  execv("/proc/self/exe", argv);
  _exit(127);
}

#endif
