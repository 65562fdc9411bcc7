// SPDX-License-Identifier: Apache-2.0
// `fdhpc demo DIR`: captioned tars of coloured shapes, and prompts to test with. Sample i is the same on any number of ranks.
#include <errno.h>
#include <jansson.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/files.h"
#include "base/log.h"
#include "cmd/cmd.h"
#include "eval/shapes.h"
#include "io/image.h"
#include "io/tar_write.h"

enum { PER_TAR = 1000, JPEG_QUALITY = 95, SENTENCE_BYTES = 128 };

/* Prompts are drawn apart from the pictures, and those for trained and for held-out pairs apart from each other. */
enum { PROMPT_STREAM = 1 << 30, HELD_OUT_STREAM = 1 << 29 };

static fd_status write_tar(const char *dir, int64_t tar, int64_t first, int64_t last, uint64_t seed, int side, bool shuffle_captions) {
  fd_status st = FD_OK;
  fd_tar_writer *w = NULL;
  unsigned char *rgb = malloc((size_t)side * (size_t)side * 3);
  void *jpeg = NULL;
  char path[4096];
  if (!rgb) FD_TRY(FD_FAIL(FD_ERR_NOMEM, "no memory for a picture"));
  snprintf(path, sizeof path, "%s/shapes-%06lld.tar", dir, (long long)tar);
  FD_TRY(fd_tar_writer_create(path, &w));
  for (int64_t i = first; i < last; i++) {
    struct fd_shape_words words, said;
    struct fd_shape_pose pose;
    char sentence[SENTENCE_BYTES], name[64];
    size_t bytes;
    fd_shapes_draw_words(seed, (uint64_t)i, false, &words);
    fd_shapes_draw_pose(seed, (uint64_t)i, &words, &pose);
    fd_shapes_render(seed, (uint64_t)i, &words, &pose, side, rgb);
    said = words;
    /* a caption of some other picture: what a run on these data learns must fail the judge */
    if (shuffle_captions) fd_shapes_draw_words(seed + 1, (uint64_t)i, false, &said);
    fd_shapes_sentence(&said, sentence, sizeof sentence);
    FD_TRY(fd_image_encode_jpeg(rgb, side, side, JPEG_QUALITY, &jpeg, &bytes));
    snprintf(name, sizeof name, "%08lld.jpg", (long long)i);
    FD_TRY(fd_tar_writer_add(w, name, jpeg, bytes));
    free(jpeg);
    jpeg = NULL;
    snprintf(name, sizeof name, "%08lld.txt", (long long)i);
    FD_TRY(fd_tar_writer_add(w, name, sentence, strlen(sentence)));
  }
  FD_TRY(fd_tar_writer_close(&w));
done:
  fd_tar_writer_destroy(&w);
  free(jpeg);
  free(rgb);
  return st;
}

/* A list of strings: half of the prompts name trained pairs of colour and shape, half held-out ones. */
static fd_status write_prompts(const char *dir, int64_t n, uint64_t seed) {
  fd_status st = FD_OK;
  char path[4096], sentence[SENTENCE_BYTES];
  json_t *list = json_array();
  for (int64_t i = 0; i < n; i++) {
    struct fd_shape_words w;
    const bool held_out = i >= (n + 1) / 2;
    fd_shapes_draw_words(seed, (uint64_t)i + (held_out ? HELD_OUT_STREAM : PROMPT_STREAM), held_out, &w);
    fd_shapes_sentence(&w, sentence, sizeof sentence);
    if (!list || json_array_append_new(list, json_string(sentence)) != 0) FD_TRY(FD_FAIL(FD_ERR_NOMEM, "no memory for the prompts"));
  }
  snprintf(path, sizeof path, "%s/prompts.json", dir);
  if (json_dump_file(list, path, JSON_INDENT(1)) != 0) FD_TRY(FD_FAIL(FD_ERR_IO, "%s: cannot write: %s", path, strerror(errno)));
done:
  json_decref(list);
  return st;
}

static fd_status run(struct fd_run *run) {
  fd_status st = FD_OK;
  int64_t samples, prompts, seed, side;
  const char *dir = run->args[0];
  const int rank = fd_comm_rank(run->comm), size = fd_comm_size(run->comm);
  FD_TRY(fd_run_flag_int(run, "--samples", 8000, 1, 100000000, &samples));
  FD_TRY(fd_run_flag_int(run, "--prompts", 200, 1, 1000000, &prompts));
  FD_TRY(fd_run_flag_int(run, "--seed", 1, 0, INT64_MAX, &seed));
  FD_TRY(fd_run_flag_int(run, "--side", 64, 16, 512, &side));
  const bool shuffle = fd_run_switch(run, "--shuffle_captions", false);
  const int64_t tars = (samples + PER_TAR - 1) / PER_TAR;
  if (rank == 0) st = fd_folder_make(dir);
  FD_TRY(fd_agree(run->comm, st));
  for (int64_t tar = rank; tar < tars && st == FD_OK; tar += size) {
    const int64_t first = tar * PER_TAR, last = first + PER_TAR < samples ? first + PER_TAR : samples;
    st = write_tar(dir, tar, first, last, (uint64_t)seed, (int)side, shuffle);
  }
  if (rank == 0 && st == FD_OK) st = write_prompts(dir, prompts, (uint64_t)seed);
  FD_TRY(fd_agree(run->comm, st));
  fd_log_info("%s: %lld pictures of %lld x %lld in %lld tars, %lld prompts in prompts.json", dir, (long long)samples, (long long)side,
              (long long)side, (long long)tars, (long long)prompts);
done:
  return st;
}

const struct fd_command fd_cmd_demo = {
    .name = "demo",
    .args = "DIR",
    .help = "write the demo's data: captioned tars of coloured shapes, and prompts",
    .least_args = 1,
    .most_args = 1,
    .flags = (const struct fd_flag[]){{"--samples", "N", NULL, "pictures (8000)"},
                                      {"--prompts", "N", NULL, "prompts; the second half names pairs that no picture shows (200)"},
                                      {"--seed", "S", NULL, "seed of pictures and prompts (1)"},
                                      {"--side", "R", NULL, "side of a picture in pixels (64)"},
                                      {"--shuffle_captions", NULL, NULL, "give each picture the caption of another: a check of the judge"},
                                      {0}},
    .groups = "",
    .run = run,
};
