// SPDX-License-Identifier: Apache-2.0
// Packs: a data set as one HDF5 file with the bytes inside. Each rank copies a run of samples into its own part of /data, whose room
// was reserved for all of them; a sample that does not decode leaves a hole there, and no row.
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "base/log.h"
#include "io/dataset_file.h"
#include "io/image.h"
#include "io/tokenizer.h"

enum { BUFFER_BYTES = 8 << 20, BAD_LINES = 20 };

/* Bytes on their way into the file, in order. */
struct writer {
  int fd;
  const char *path;
  char *buffer; /* owned */
  size_t n;
  int64_t at; /* of the buffer's first byte in the file */
};

static fd_status flush(struct writer *w) {
  size_t done = 0;
  while (done < w->n) {
    const ssize_t n = pwrite(w->fd, w->buffer + done, w->n - done, w->at + (int64_t)done);
    if (n < 0 && errno == EINTR) continue;
    if (n <= 0) return FD_FAIL(FD_ERR_IO, "%s: cannot write: %s", w->path, n ? strerror(errno) : "disk full");
    done += (size_t)n;
  }
  w->at += (int64_t)w->n;
  w->n = 0;
  return FD_OK;
}

static fd_status append(struct writer *w, const void *data, size_t bytes, struct fd_place *place) {
  const char *p = data;
  *place = (struct fd_place){w->at + (int64_t)w->n, (int64_t)bytes, 0};
  while (bytes) {
    const size_t room = BUFFER_BYTES - w->n, piece = bytes < room ? bytes : room;
    memcpy(w->buffer + w->n, p, piece);
    w->n += piece;
    p += piece;
    bytes -= piece;
    if (w->n == BUFFER_BYTES) {
      const fd_status st = flush(w);
      if (st != FD_OK) return st;
    }
  }
  return FD_OK;
}

static enum fd_bad judge(fd_dataset *d, int64_t i, struct fd_sample *s, fd_image *img) {
  const enum fd_bad bad = fd_dataset_read(d, i, 3, s);
  if (bad) return bad;
  switch (fd_image_decode(s->image, s->image_bytes, 0, img)) {
    case FD_IMAGE_KEPT: break;
    case FD_IMAGE_UNKNOWN: return FD_BAD_IMAGE_UNKNOWN;
    case FD_IMAGE_TOO_LARGE: return FD_BAD_IMAGE_LARGE;
    default: return FD_BAD_IMAGE_DAMAGED;
  }
  for (int c = 0; c < 2; c++)
    if (s->caption_bytes[c] >= 0 && !fd_utf8_valid(s->caption[c], (size_t)s->caption_bytes[c])) return FD_BAD_CAPTION_UTF8;
  return FD_BAD_NONE;
}

static int64_t bytes_of(const fd_dataset *d, int64_t i) {
  struct fd_sample_info info;
  fd_dataset_info(d, i, &info);
  int64_t bytes = info.image.bytes > 0 ? info.image.bytes : 0;
  for (int c = 0; c < 2; c++) bytes += info.caption[c].bytes > 0 ? info.caption[c].bytes : 0;
  return bytes;
}

/* Samples first .. last - 1 into this rank's part of the file. */
static fd_status copy_samples(fd_comm *comm, fd_dataset *d, int64_t first, int64_t last, struct writer *w, bool progress, struct fd_rows *rows,
                              int64_t counts[FD_BAD_COUNT]) {
  fd_status st = FD_OK;
  struct fd_sample sample = {0};
  fd_image img = {0};
  int lines = 0;
  for (int64_t i = first; i < last; i++) {
    struct fd_sample_info info;
    const enum fd_bad bad = judge(d, i, &sample, &img);
    fd_dataset_info(d, i, &info);
    counts[bad]++;
    if (bad) {
      if (lines++ < BAD_LINES)
        fd_log_warn("%s: sample \"%.*s\" is left out: %s%s%s%s", fd_dataset_shard_path(d, info.image.shard, NULL), info.key_bytes, info.key, fd_bad_text(bad),
                    bad == FD_BAD_READ ? ": " : "", bad == FD_BAD_READ ? fd_status_message() : "",
                    lines == BAD_LINES ? " (further ones are only counted)" : "");
      continue;
    }
    const struct fd_place none = {0, -1, 0};
    struct fd_row row = {.image = none, .caption = {none, none}, .key_bytes = info.key_bytes};
    FD_TRY(append(w, sample.image, sample.image_bytes, &row.image));
    for (int c = 0; c < 2; c++)
      if (sample.caption_bytes[c] >= 0) FD_TRY(append(w, sample.caption[c], (size_t)sample.caption_bytes[c], &row.caption[c]));
    FD_TRY(fd_rows_add(rows, &row, info.key));
    if (progress && fd_comm_rank(comm) == 0 && i % 256 == 0)
      fd_log_progress("packing: %3.0f %% (%lld samples of this rank, %lld left out)", 100.0 * (double)(i - first) / (double)(last - first), (long long)(i - first),
                      (long long)(i - first - rows->n + 1));
  }
  FD_TRY(flush(w));
done:
  if (progress) fd_log_progress("%s", "");
  fd_sample_free(&sample);
  fd_image_free(&img);
  return st;
}

fd_status fd_dataset_pack(fd_comm *comm, fd_dataset *d, const char *path, bool progress, int64_t counts[FD_BAD_COUNT]) {
  fd_status st = FD_OK;
  const int rank = fd_comm_rank(comm), size = fd_comm_size(comm);
  const int64_t n = fd_dataset_samples(d), first = n * rank / size, last = n * (rank + 1) / size;
  struct fd_rows rows = {0};
  struct writer w = {.fd = -1};
  char *part = NULL;
  int64_t *all = malloc((size_t)size * sizeof *all), mine = 0, before = 0, total = 0, data_at = 0;
  struct fd_shard_info self = {.path = (char[]){"."}};
  struct fd_dataset_about about = {.pack = true, .image_column = fd_dataset_column(d, -1), .caption_columns = {fd_dataset_column(d, 0), fd_dataset_column(d, 1)},
                                   .n_shards = 1, .shards = &self};
  memset(counts, 0, FD_BAD_COUNT * sizeof *counts);
  if (asprintf(&part, "%s.part", path) < 0) part = NULL;
  w.buffer = malloc(BUFFER_BYTES);
  FD_TRY(fd_agree(comm, all && part && w.buffer ? FD_OK : FD_FAIL(FD_ERR_NOMEM, "%s: no memory", path)));
  for (int64_t i = first; i < last; i++) mine += bytes_of(d, i);
  FD_TRY(fd_comm_allgather(comm, &mine, sizeof mine, all));
  for (int r = 0; r < size; r++) {
    if (r < rank) before += all[r];
    total += all[r];
  }
  if (rank == 0) st = fd_dataset_file_create_data(part, total > 0 ? total : 1, &data_at);
  FD_TRY(fd_agree(comm, st));
  FD_TRY(fd_comm_bcast(comm, &data_at, sizeof data_at, 0));

  w.path = part;
  w.at = data_at + before;
  w.fd = open(part, O_WRONLY | O_CLOEXEC);
  if (w.fd < 0) st = FD_FAIL(FD_ERR_IO, "%s: cannot open: %s (must all ranks see this folder?)", part, strerror(errno));
  if (st == FD_OK) st = copy_samples(comm, d, first, last, &w, progress, &rows, counts);
  if (st == FD_OK && fsync(w.fd) != 0) st = FD_FAIL(FD_ERR_IO, "%s: cannot sync: %s", part, strerror(errno));
  FD_TRY(fd_agree(comm, st));
  FD_TRY(fd_comm_allreduce_i64(comm, counts, FD_BAD_COUNT, FD_COMM_SUM));
  for (int k = FD_BAD_NO_IMAGE; k < FD_BAD_COUNT; k++) {
    counts[k] += fd_dataset_lost(d, (enum fd_bad)k);
    about.lost[k] = counts[k];
  }
  if (counts[FD_BAD_NONE] == 0) FD_TRY(FD_FAIL(FD_ERR_DATA, "%s: none of %lld samples can be used: nothing to pack", path, (long long)n));
  FD_TRY(fd_dataset_file_write(comm, part, true, &about, &rows));
  if (rank == 0 && rename(part, path) != 0) st = FD_FAIL(FD_ERR_IO, "%s: cannot rename to %s: %s", part, path, strerror(errno));
  FD_TRY(fd_agree(comm, st));
done:
  if (w.fd >= 0) close(w.fd);
  if (st != FD_OK && part && rank == 0) unlink(part);
  fd_rows_free(&rows);
  free(w.buffer);
  free(part);
  free(all);
  return st;
}
