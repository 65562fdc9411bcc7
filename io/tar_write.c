// SPDX-License-Identifier: Apache-2.0
// Writes tars through libarchive.
#include "io/tar_write.h"

#include <archive.h>
#include <archive_entry.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

struct fd_tar_writer {
  struct archive *a; /* owned */
  char *path, *part; /* owned */
};

static fd_status tar_fail(fd_tar_writer *w, const char *what) {
  const char *why = w->a ? archive_error_string(w->a) : NULL;
  return FD_FAIL(FD_ERR_IO, "%s: cannot %s: %s", w->part, what, why ? why : strerror(errno));
}

fd_status fd_tar_writer_create(const char *path, fd_tar_writer **out) {
  fd_status st = FD_OK;
  fd_tar_writer *w = calloc(1, sizeof *w);
  if (!w) return FD_FAIL(FD_ERR_NOMEM, "%s: no memory", path);
  if (asprintf(&w->path, "%s", path) < 0) w->path = NULL;
  if (asprintf(&w->part, "%s.part", path) < 0) w->part = NULL;
  w->a = archive_write_new();
  if (!w->path || !w->part || !w->a) FD_TRY(FD_FAIL(FD_ERR_NOMEM, "%s: no memory", path));
  /* names are bytes: without this, libarchive in the C locale cannot store those that are not ASCII */
  /* without hdrcharset: it would put a PAX header before every member */
  if (archive_write_set_format_pax_restricted(w->a) != ARCHIVE_OK ||
      archive_write_open_filename(w->a, w->part) != ARCHIVE_OK)
    FD_TRY(tar_fail(w, "create"));
  *out = w;
  w = NULL;
done:
  fd_tar_writer_destroy(&w);
  return st;
}

fd_status fd_tar_writer_add(fd_tar_writer *w, const char *name, const void *data, size_t bytes) {
  fd_status st = FD_OK;
  struct archive_entry *e = archive_entry_new();
  if (!e) FD_TRY(FD_FAIL(FD_ERR_NOMEM, "%s: no memory", w->path));
  archive_entry_set_pathname(e, name);
  archive_entry_set_size(e, (la_int64_t)bytes);
  archive_entry_set_filetype(e, AE_IFREG);
  archive_entry_set_perm(e, 0644);
  archive_entry_set_mtime(e, 0, 0);
  if (archive_write_header(w->a, e) < ARCHIVE_WARN) FD_TRY(tar_fail(w, "write a header"));
  if (bytes && archive_write_data(w->a, data, bytes) != (la_ssize_t)bytes) FD_TRY(tar_fail(w, "write"));
done:
  archive_entry_free(e);
  return st;
}

fd_status fd_tar_writer_close(fd_tar_writer **w) {
  fd_status st = FD_OK;
  if (archive_write_close((*w)->a) != ARCHIVE_OK) FD_TRY(tar_fail(*w, "finish"));
  if (rename((*w)->part, (*w)->path) != 0)
    FD_TRY(FD_FAIL(FD_ERR_IO, "%s: cannot rename to %s: %s", (*w)->part, (*w)->path, strerror(errno)));
done:
  fd_tar_writer_destroy(w);
  return st;
}

void fd_tar_writer_destroy(fd_tar_writer **w) {
  if (!*w) return;
  if ((*w)->a) archive_write_free((*w)->a);
  free((*w)->path);
  free((*w)->part);
  free(*w);
  *w = NULL;
}
