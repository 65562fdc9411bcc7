// SPDX-License-Identifier: Apache-2.0
// What the data tests share: a folder that is removed, small tars, checks. All ranks see the same folder.
#ifndef FD_TESTS_DATATEST_H
#define FD_TESTS_DATATEST_H

#include <ftw.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "comm/comm.h"
#include "io/image.h"
#include "io/tar_write.h"

#define DT_UNUSED __attribute__((unused))

static int failed;
#define CHECK(c)                                                                                            \
  do {                                                                                                      \
    if (!(c)) failed = 1, fprintf(stderr, "%s:%d: %s (%s)\n", __FILE__, __LINE__, #c, fd_status_message()); \
  } while (0)

static char dt_folder[64];

/** Rank 0 makes it; its name goes to all. */
DT_UNUSED static void dt_open(fd_comm *comm) {
  if (comm->rank == 0) {
    strcpy(dt_folder, "/tmp/fdhpc-data-XXXXXX");
    CHECK(mkdtemp(dt_folder) != NULL);
  }
  CHECK(fd_comm_bcast(comm, dt_folder, sizeof dt_folder, 0) == FD_OK);
}

static int dt_remove(const char *path, const struct stat *about, int type, struct FTW *at) {
  (void)about, (void)type, (void)at;
  return remove(path);
}
DT_UNUSED static void dt_close(fd_comm *comm) {
  fd_comm_barrier(comm);
  if (comm->rank == 0) nftw(dt_folder, dt_remove, 16, FTW_DEPTH | FTW_PHYS);
}

/** "folder/name"; 64 results live at a time. */
DT_UNUSED static const char *dt_path(const char *name) {
  static char path[64][256];
  static unsigned next;
  char *p = path[next++ & 63];
  snprintf(p, sizeof path[0], "%s/%s", dt_folder, name);
  return p;
}

/** A picture of one colour, of about 24 x 20 pixels. */
DT_UNUSED static void dt_jpeg(int colour, void **bytes, size_t *n) {
  uint8_t rgb[24 * 20 * 3];
  for (size_t i = 0; i < sizeof rgb; i++) rgb[i] = (uint8_t)(colour * (1 + (int)(i % 3)));
  CHECK(fd_image_encode_jpeg(rgb, 24, 20, 90, bytes, n) == FD_OK);
}

DT_UNUSED static void dt_add_text(fd_tar_writer *w, const char *name, const char *text) { CHECK(fd_tar_writer_add(w, name, text, strlen(text)) == FD_OK); }
DT_UNUSED static void dt_add_jpeg(fd_tar_writer *w, const char *name, int colour) {
  void *bytes;
  size_t n;
  dt_jpeg(colour, &bytes, &n);
  CHECK(fd_tar_writer_add(w, name, bytes, n) == FD_OK);
  free(bytes);
}

/** Samples first .. last - 1 with keys 00000.. and captions "red 0", .. into a tar. */
DT_UNUSED static void dt_tar(const char *file, int first, int last) {
  fd_tar_writer *w = NULL;
  char name[64], text[64];
  CHECK(fd_tar_writer_create(dt_path(file), &w) == FD_OK);
  for (int i = first; i < last; i++) {
    snprintf(name, sizeof name, "%05d.jpg", i);
    dt_add_jpeg(w, name, i % 80);
    snprintf(name, sizeof name, "%05d.txt", i);
    snprintf(text, sizeof text, "a large red circle %d", i);
    dt_add_text(w, name, text);
  }
  CHECK(fd_tar_writer_close(&w) == FD_OK);
}

/** Every rank fails if one did. */
DT_UNUSED static int dt_result(fd_comm *comm) {
  int64_t any = failed;
  CHECK(fd_comm_allreduce_i64(comm, &any, 1, FD_COMM_MAX) == FD_OK);
  return any != 0;
}

#endif
