// SPDX-License-Identifier: Apache-2.0
// Writing, choosing and reading checkpoints. Invariant: between two fd_agree every rank does the same, whatever fails; a
// failure is kept in `st` and agreed on before anybody waits for anybody.
#include "io/checkpoint.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <unistd.h>

#include "base/files.h"
#include "io/checkpoint_layout.h"

#define CHUNK ((int64_t)1 << 20) /* elements per pwrite: 4 MiB, so what was summed is still in cache when it is written */

struct fd_checkpoint {
  fd_comm *comm; /* borrowed */
  char *path;
  int fd;
  struct fd_checkpoint_meta meta;
  struct fd_layout_text text;
  int n;
  struct fd_layout_entry *entry; /* sorted by name */
};

/* For tests: FDHPC_TEST_KILL_CHECKPOINT=STEP:POINT ends this process as a power failure would, at a known point. */
static void die_here(int64_t step, const char *point) {
  const char *want = getenv("FDHPC_TEST_KILL_CHECKPOINT");
  if (!want) return;
  char here[64];
  snprintf(here, sizeof here, "%lld:%s", (long long)step, point);
  if (strcmp(want, here) == 0) raise(SIGKILL);
}

/* ---- moving the bytes ------------------------------------------------------------------------------------------- */

static fd_status write_all(int fd, const void *data, int64_t bytes, int64_t at, const char *path, const char *set) {
  while (bytes > 0) {
    ssize_t k = pwrite(fd, data, (size_t)bytes, at);
    if (k < 0 && errno == EINTR) continue;
    if (k <= 0) return FD_FAIL(FD_ERR_IO, "%s: data set /%s: writing: %s", path, set, strerror(k < 0 ? errno : ENOSPC));
    data = (const char *)data + k;
    bytes -= k;
    at += k;
  }
  return FD_OK;
}

static fd_status read_all(int fd, void *data, int64_t bytes, int64_t at, const char *path, const char *set) {
  while (bytes > 0) {
    ssize_t k = pread(fd, data, (size_t)bytes, at);
    if (k < 0 && errno == EINTR) continue;
    if (k < 0) return FD_FAIL(FD_ERR_IO, "%s: data set /%s: reading: %s", path, set, strerror(errno));
    if (k == 0) return FD_FAIL(FD_ERR_FORMAT, "%s: data set /%s: cut off at byte %lld of the file", path, set, (long long)at);
    data = (char *)data + k;
    bytes -= k;
    at += k;
  }
  return FD_OK;
}

static int name_is(const void *name, const void *entry) { return strcmp(name, ((const struct fd_layout_entry *)entry)->name); }

enum way { TO_FILE, FROM_FILE, CHECK_FILE };

/* This rank's part of one family: for each row what lies in its range, in pieces. sum[i] grows by the checksum of row i's
 * elements that passed. entry[i] belongs to rows[i]. `chunk` has room for CHUNK elements. */
static fd_status move_family(enum way way, int fd, const char *path, int n_rows, const struct fd_checkpoint_row *rows,
                             const struct fd_layout_entry *const *entry, const struct fd_checkpoint_family *f, float *chunk,
                             uint64_t *sum) {
  fd_status st = FD_OK;
  for (int i = 0; i < n_rows; i++) {
    if (rows[i].buffer || !entry[i]) continue;
    int64_t lo = rows[i].offset, hi = lo + entry[i]->numel;
    if (lo < f->first) lo = f->first;
    if (hi > f->first + f->n) hi = f->first + f->n;
    for (int64_t a = lo; a < hi; a += CHUNK) {
      int64_t n = hi - a < CHUNK ? hi - a : CHUNK, in_row = a - rows[i].offset, at = entry[i]->at + 4 * in_row;
      float *data = f->data && way != CHECK_FILE ? f->data + (a - f->first) : chunk;
      if (way == TO_FILE && !f->data) FD_TRY(f->copy(f->user, a, n, data));
      if (way != TO_FILE) FD_TRY(read_all(fd, data, 4 * n, at, path, entry[i]->name));
      sum[i] += fd_layout_sum(data, in_row, n);
      if (way == TO_FILE) FD_TRY(write_all(fd, data, 4 * n, at, path, entry[i]->name));
      if (way == FROM_FILE && !f->data) FD_TRY(f->copy(f->user, a, n, data));
    }
  }
done:
  return st;
}

static int64_t numel_of(const struct fd_checkpoint_row *row) {
  int64_t n = 1;
  for (int d = 0; d < row->ndim; d++) n *= row->shape[d];
  return n;
}

static int64_t flat_end(int n_rows, const struct fd_checkpoint_row *rows) {
  int64_t end = 0;
  for (int i = 0; i < n_rows; i++)
    if (!rows[i].buffer && rows[i].offset + numel_of(&rows[i]) > end) end = rows[i].offset + numel_of(&rows[i]);
  return end;
}

struct range {
  int64_t first, n;
};

static int by_first(const void *a, const void *b) {
  const struct range *x = a, *y = b;
  if (x->first != y->first) return x->first < y->first ? -1 : 1;
  return x->n < y->n ? -1 : x->n > y->n; /* an empty range before the one that begins there */
}

/* *whole: every rank has all of [0, end); else the ranges tile it. FD_ERR_ARG if neither. Collective. */
static fd_status check_ranges(fd_comm *comm, const struct fd_checkpoint_family *f, int64_t end, bool *whole) {
  fd_status st = FD_OK;
  int size = fd_comm_size(comm);
  struct range mine = {f->first, f->n}, *all = calloc((size_t)size, sizeof *all);
  if (!all) FD_FAIL(FD_ERR_NOMEM, "no memory for %d ranks", size);
  FD_TRY(fd_agree(comm, all ? FD_OK : FD_ERR_NOMEM));
  FD_TRY(fd_comm_allgather(comm, &mine, sizeof mine, all));
  *whole = true;
  for (int r = 0; r < size; r++) *whole = *whole && all[r].first == 0 && all[r].n >= end;
  if (*whole) goto done;
  qsort(all, (size_t)size, sizeof *all, by_first);
  int64_t at = 0;
  for (int r = 0; r < size; r++) {
    if (all[r].n == 0) continue;
    if (all[r].first != at) {
      FD_TRY(FD_FAIL(FD_ERR_ARG, "family %s: a rank's range begins at %lld, the one before it ends at %lld", f->path,
                     (long long)all[r].first, (long long)at));
    }
    at += all[r].n;
  }
  if (at < end) FD_TRY(FD_FAIL(FD_ERR_ARG, "family %s: the ranks have %lld of %lld elements", f->path, (long long)at, (long long)end));
done:
  free(all);
  return st;
}

/* ---- folders ------------------------------------------------------------------------------------------------------- */

/* "step-N.h5" to N; -1 for other names, ".part" among them. */
static int64_t step_of(const char *name) {
  char *end;
  if (strncmp(name, "step-", 5) != 0 || name[5] < '0' || name[5] > '9') return -1;
  errno = 0;
  long long v = strtoll(name + 5, &end, 10);
  return errno == 0 && strcmp(end, ".h5") == 0 ? (int64_t)v : -1;
}

static int by_value(const void *a, const void *b) {
  int64_t x = *(const int64_t *)a, y = *(const int64_t *)b;
  return x < y ? -1 : x > y;
}

fd_status fd_checkpoint_list(const char *dir, int *n, int64_t **steps) {
  fd_status st = FD_OK;
  int64_t *list = NULL;
  int count = 0, cap = 0;
  DIR *d = opendir(dir);
  if (!d && errno != ENOENT) FD_TRY(FD_FAIL(FD_ERR_IO, "%s: %s", dir, strerror(errno)));
  for (struct dirent *e; d && (e = readdir(d));) {
    int64_t v = step_of(e->d_name);
    if (v < 0) continue;
    if (count == cap) {
      cap = 2 * cap + 16;
      int64_t *p = realloc(list, (size_t)cap * sizeof *p);
      if (!p) FD_TRY(FD_FAIL(FD_ERR_NOMEM, "no memory for %d steps", cap));
      list = p;
    }
    list[count++] = v;
  }
  if (count) qsort(list, (size_t)count, sizeof *list, by_value);
  *n = count;
  *steps = list;
  list = NULL;
done:
  if (d) closedir(d);
  free(list);
  return st;
}

static void remove_parts(const char *dir) {
  DIR *d = opendir(dir);
  for (struct dirent *e; d && (e = readdir(d));) {
    char path[4096], name[256];
    size_t n = strlen(e->d_name);
    if (n < 6 || n >= sizeof name || strcmp(e->d_name + n - 5, ".part") != 0) continue;
    snprintf(name, sizeof name, "%.*s", (int)(n - 5), e->d_name);
    if (step_of(name) < 0 && strcmp(name, "latest") != 0) continue; /* not ours */
    snprintf(path, sizeof path, "%s/%s", dir, e->d_name);
    unlink(path);
  }
  if (d) closedir(d);
}

static fd_status sync_folder(const char *dir) {
  int fd = open(dir, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
  /* file systems that cannot sync a folder say EINVAL */
  int rc = fd < 0 ? -1 : fsync(fd);
  int error = rc != 0 && errno != EINVAL ? errno : 0;
  if (fd >= 0) close(fd);
  return error ? FD_FAIL(FD_ERR_IO, "%s: fsync: %s", dir, strerror(error)) : FD_OK;
}

static fd_status write_latest(const char *dir, int64_t step) {
  fd_status st = FD_OK;
  char part[4096], name[4096], text[64];
  snprintf(part, sizeof part, "%s/latest.part", dir);
  snprintf(name, sizeof name, "%s/latest", dir);
  int n = snprintf(text, sizeof text, "step-%lld.h5\n", (long long)step);
  int fd = open(part, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0666);
  if (fd < 0 || write(fd, text, (size_t)n) != n || fsync(fd) != 0) FD_TRY(FD_FAIL(FD_ERR_IO, "%s: %s", part, strerror(errno)));
  if (rename(part, name) != 0) FD_TRY(FD_FAIL(FD_ERR_IO, "%s: %s", name, strerror(errno)));
  FD_TRY(sync_folder(dir));
done:
  if (fd >= 0) close(fd);
  return st;
}

/* Blocks for the whole file, so that a full disk is found now. */
static fd_status reserve(const char *path, int64_t bytes) {
  fd_status st = FD_OK;
  int fd = open(path, O_RDWR | O_CREAT | O_CLOEXEC, 0666);
  if (fd < 0) FD_TRY(FD_FAIL(FD_ERR_IO, "%s: %s", path, strerror(errno)));
  struct statvfs v;
  double free_gb = statvfs(path, &v) == 0 ? (double)v.f_bavail * (double)v.f_frsize / 1e9 : -1;
  /* posix_fallocate would write a byte to every block of file systems that cannot reserve: there, free space has to do */
  int rc;
  do rc = fallocate(fd, 0, 0, bytes) == 0 ? 0 : errno;
  while (rc == EINTR);
  if (rc == EOPNOTSUPP || rc == ENOSYS || rc == EINVAL) rc = free_gb >= 0 && (double)bytes / 1e9 > free_gb ? ENOSPC : 0;
  if (rc)
    FD_TRY(FD_FAIL(FD_ERR_IO,
                   "%s: no room for a checkpoint of %.6g GB (%.6g GB are free): %s; earlier checkpoints are untouched: "
                   "free some space and resume",
                   path, (double)bytes / 1e9, free_gb, strerror(rc)));
done:
  if (fd >= 0) close(fd);
  return st;
}

/* ---- writing ------------------------------------------------------------------------------------------------------- */

static fd_status build_entries(int n_rows, const struct fd_checkpoint_row *rows, int n_families,
                               const struct fd_checkpoint_family *families, struct fd_layout_entry *entry,
                               const struct fd_layout_entry **of_row, int *n) {
  int k = 0;
  for (int f = 0; f < n_families; f++) {
    for (int i = 0; i < n_rows; i++) {
      of_row[f * n_rows + i] = NULL;
      if (rows[i].buffer && !families[f].buffers) continue;
      struct fd_layout_entry *e = &entry[k++];
      int len = snprintf(e->name, sizeof e->name, "%s/%s", families[f].path, rows[i].name);
      if (len >= (int)sizeof e->name || rows[i].ndim < 0 || rows[i].ndim > FD_CHECKPOINT_MAX_NDIM)
        return FD_FAIL(FD_ERR_ARG, "data set /%s: name of %d characters, %d dimensions", e->name, len, rows[i].ndim);
      e->ndim = rows[i].ndim;
      memcpy(e->shape, rows[i].shape, sizeof e->shape);
      e->numel = numel_of(&rows[i]);
      of_row[f * n_rows + i] = e;
    }
  }
  *n = k;
  return FD_OK;
}

static fd_status write_buffers(int fd, const char *path, int n_rows, const struct fd_checkpoint_row *rows,
                               const struct fd_layout_entry *const *of_row, uint64_t *sum) {
  fd_status st = FD_OK;
  for (int i = 0; i < n_rows; i++) {
    if (!rows[i].buffer || !of_row[i]) continue;
    sum[i] += fd_layout_sum(rows[i].data, 0, of_row[i]->numel);
    FD_TRY(write_all(fd, rows[i].data, 4 * of_row[i]->numel, of_row[i]->at, path, of_row[i]->name));
  }
done:
  return st;
}

fd_status fd_checkpoint_write(fd_comm *comm, const char *dir, const struct fd_checkpoint_meta *meta, int n_rows,
                              const struct fd_checkpoint_row *rows, int n_families, const struct fd_checkpoint_family *families) {
  fd_status st = FD_OK;
  bool root = fd_comm_rank(comm) == 0, made = false;
  int fd = -1, n = 0;
  size_t cells = (size_t)n_rows * (size_t)n_families;
  struct fd_layout_entry *entry = calloc(cells + 1, sizeof *entry);
  const struct fd_layout_entry **of_row = calloc(cells + 1, sizeof *of_row);
  uint64_t *sum = calloc(cells + 1, sizeof *sum);
  float *chunk = malloc(CHUNK * sizeof *chunk);
  char path[4096], part[4096];
  int64_t bytes = 0, end = flat_end(n_rows, rows);
  fd_checkpoint *back = NULL;
  snprintf(path, sizeof path, "%s/step-%lld.h5", dir, (long long)meta->step);
  snprintf(part, sizeof part, "%s.part", path);

  if (!entry || !of_row || !sum || !chunk)
    st = FD_FAIL(FD_ERR_NOMEM, "no memory for a checkpoint's table of %zu data sets", cells);
  else
    st = build_entries(n_rows, rows, n_families, families, entry, of_row, &n);
  FD_TRY(fd_agree(comm, st));
  for (int f = 0; f < n_families; f++) {
    bool whole;
    FD_TRY(check_ranges(comm, &families[f], end, &whole));
    if (whole && fd_comm_size(comm) > 1 && end > 0)
      FD_TRY(FD_FAIL(FD_ERR_ARG, "family %s: every rank would write everything", families[f].path));
  }

  /* layout and room */
  if (root) {
    st = fd_folder_make(dir);
    if (st == FD_OK) {
      remove_parts(dir);
      made = true;
      /* once before HDF5 writes, for ENOSPC in its own close makes HDF5 1.10.8 crash at exit; and once as it will be */
      st = reserve(part, fd_layout_most_bytes(meta, n, entry));
      if (st == FD_OK) st = fd_layout_create(part, meta, n, entry, &bytes);
    }
    if (st == FD_OK) st = reserve(part, bytes);
  }
  FD_TRY(fd_agree(comm, st));
  FD_TRY(fd_comm_bcast(comm, entry, (size_t)n * sizeof *entry, 0));
  die_here(meta->step, "layout");

  /* data */
  fd = open(part, O_RDWR | O_CLOEXEC);
  if (fd < 0) st = FD_FAIL(FD_ERR_IO, "%s: %s (does every node see this folder?)", part, strerror(errno));
  for (int f = 0; st == FD_OK && f < n_families; f++) {
    size_t at = (size_t)f * (size_t)n_rows;
    if (root) st = write_buffers(fd, part, n_rows, rows, of_row + at, sum + at);
    if (st == FD_OK) st = move_family(TO_FILE, fd, part, n_rows, rows, of_row + at, &families[f], chunk, sum + at);
    if (f == n_families / 2) die_here(meta->step, "data");
  }
  if (st == FD_OK && fsync(fd) != 0) st = FD_FAIL(FD_ERR_IO, "%s: fsync: %s", part, strerror(errno));
  FD_TRY(fd_agree(comm, st));

  /* checksums */
  FD_TRY(fd_comm_allreduce_u64(comm, sum, (int64_t)cells, FD_COMM_SUM));
  for (size_t i = 0; i < cells; i++)
    if (of_row[i]) entry[of_row[i] - entry].sum = sum[i];
  if (root) {
    st = fd_layout_set_sums(part, n, entry);
    if (st == FD_OK && fsync(fd) != 0) st = FD_FAIL(FD_ERR_IO, "%s: fsync: %s", part, strerror(errno));
  }
  FD_TRY(fd_agree(comm, st));
  die_here(meta->step, "sums");

  /* what a reader would find, from the disk and not from memory where the system allows it */
  posix_fadvise(fd, 0, 0, POSIX_FADV_DONTNEED);
  FD_TRY(fd_checkpoint_open(comm, part, &back));
  for (int f = 0; f < n_families; f++) FD_TRY(fd_checkpoint_match(back, families[f].path, families[f].buffers, n_rows, rows));
  memset(sum, 0, cells * sizeof *sum);
  for (int f = 0; st == FD_OK && f < n_families; f++) {
    size_t at = (size_t)f * (size_t)n_rows;
    for (int i = 0; st == FD_OK && root && i < n_rows; i++) {
      if (!rows[i].buffer || !of_row[at + (size_t)i]) continue;
      for (int64_t a = 0; st == FD_OK && a < of_row[at + (size_t)i]->numel; a += CHUNK) {
        int64_t k = of_row[at + (size_t)i]->numel - a < CHUNK ? of_row[at + (size_t)i]->numel - a : CHUNK;
        st = read_all(fd, chunk, 4 * k, of_row[at + (size_t)i]->at + 4 * a, part, of_row[at + (size_t)i]->name);
        if (st == FD_OK) sum[at + (size_t)i] += fd_layout_sum(chunk, a, k);
      }
    }
    if (st == FD_OK) st = move_family(CHECK_FILE, fd, part, n_rows, rows, of_row + at, &families[f], chunk, sum + at);
  }
  FD_TRY(fd_agree(comm, st));
  FD_TRY(fd_comm_allreduce_u64(comm, sum, (int64_t)cells, FD_COMM_SUM));
  for (size_t i = 0; i < cells; i++) {
    if (!of_row[i]) continue;
    const struct fd_layout_entry *e = bsearch(of_row[i]->name, back->entry, (size_t)back->n, sizeof *back->entry, name_is);
    if (e->sum != of_row[i]->sum || sum[i] != of_row[i]->sum)
      FD_TRY(FD_FAIL(FD_ERR_IO, "%s: data set /%s: what the disk gives back is not what was written", part, e->name));
  }
  die_here(meta->step, "verified");

  if (root) {
    if (rename(part, path) != 0) st = FD_FAIL(FD_ERR_IO, "%s: rename: %s", path, strerror(errno));
    if (st == FD_OK) st = sync_folder(dir);
    if (st == FD_OK) die_here(meta->step, "renamed");
    if (st == FD_OK) st = write_latest(dir, meta->step);
  }
  FD_TRY(fd_agree(comm, st));
  die_here(meta->step, "done");
done:
  if (st != FD_OK && made) unlink(part);
  fd_checkpoint_close(&back);
  if (fd >= 0) close(fd);
  free(chunk);
  free(sum);
  free(of_row);
  free(entry);
  return st;
}

/* ---- choosing ------------------------------------------------------------------------------------------------------ */

/* "10, 20, 30" of the steps there are, the last ones if they are many. */
static void describe_steps(int n, const int64_t *steps, char *text, size_t bytes) {
  size_t at = (size_t)snprintf(text, bytes, "%s", n == 0 ? "there are none" : n > 10 ? "the last are" : "there are");
  for (int i = n > 10 ? n - 10 : 0; i < n && at < bytes; i++)
    at += (size_t)snprintf(text + at, bytes - at, " %lld", (long long)steps[i]);
}

static fd_status choose(const char *dir, const char *which, char **path) {
  fd_status st = FD_OK;
  int64_t *steps = NULL, step = -1;
  int n = 0;
  char have[512], name[4096], *end;
  struct stat s;
  if (!which[0]) goto done;
  FD_TRY(fd_checkpoint_list(dir, &n, &steps));
  describe_steps(n, steps, have, sizeof have);
  if (strcmp(which, "latest") == 0) {
    char text[256] = "";
    snprintf(name, sizeof name, "%s/latest", dir);
    int fd = open(name, O_RDONLY | O_CLOEXEC);
    if (fd < 0 && errno != ENOENT) FD_TRY(FD_FAIL(FD_ERR_IO, "%s: %s", name, strerror(errno)));
    if (fd >= 0) {
      ssize_t k = read(fd, text, sizeof text - 1);
      close(fd);
      text[k > 0 ? k : 0] = 0;
      text[strcspn(text, "\n")] = 0;
      step = step_of(text);
      if (step < 0) FD_TRY(FD_FAIL(FD_ERR_FORMAT, "%s: does not name a checkpoint but \"%s\"; checkpoints by step: %s", name, text, have));
    } else if (n > 0) {
      step = steps[n - 1];
    } else {
      goto done;
    }
  } else {
    const char *digits = strncmp(which, "step-", 5) == 0 ? which + 5 : which;
    errno = 0;
    long long v = strtoll(digits, &end, 10);
    if (digits[0] >= '0' && digits[0] <= '9' && !*end && errno == 0) {
      step = v;
    } else if (stat(which, &s) == 0) {
      *path = strdup(which);
      if (!*path) FD_TRY(FD_FAIL(FD_ERR_NOMEM, "no memory for a path"));
      goto done;
    } else {
      FD_TRY(FD_FAIL(FD_ERR_CONFIG, "checkpoint \"%s\": neither \"latest\" nor a step nor a file; steps in %s: %s", which, dir, have));
    }
  }
  snprintf(name, sizeof name, "%s/step-%lld.h5", dir, (long long)step);
  if (stat(name, &s) != 0) FD_TRY(FD_FAIL(FD_ERR_IO, "%s: %s; checkpoints by step: %s", name, strerror(errno), have));
  *path = strdup(name);
  if (!*path) FD_TRY(FD_FAIL(FD_ERR_NOMEM, "no memory for a path"));
done:
  free(steps);
  return st;
}

fd_status fd_checkpoint_choose(fd_comm *comm, const char *dir, const char *which, char **path) {
  fd_status st = FD_OK;
  char *found = NULL;
  if (fd_comm_rank(comm) == 0) st = choose(dir, which, &found);
  FD_TRY(fd_agree(comm, st));
  FD_TRY(fd_comm_bcast_text(comm, &found, 0));
  *path = found;
  found = NULL;
done:
  free(found);
  return st;
}

/* ---- reading ------------------------------------------------------------------------------------------------------- */

fd_status fd_checkpoint_open(fd_comm *comm, const char *path, fd_checkpoint **out) {
  fd_status st = FD_OK;
  bool root = fd_comm_rank(comm) == 0;
  fd_checkpoint *c = calloc(1, sizeof *c);
  if (c) {
    c->fd = -1;
    c->comm = comm;
    c->path = strdup(path);
  }
  if (!c || !c->path) st = FD_FAIL(FD_ERR_NOMEM, "no memory for a checkpoint");
  if (st == FD_OK && root) st = fd_layout_read(path, &c->meta, &c->text, &c->n, &c->entry);
  FD_TRY(fd_agree(comm, st));
  FD_TRY(fd_comm_bcast(comm, &c->n, sizeof c->n, 0));
  if (!root) c->entry = calloc((size_t)c->n + 1, sizeof *c->entry);
  if (!c->entry) FD_FAIL(FD_ERR_NOMEM, "no memory for a table of %d data sets", c->n);
  FD_TRY(fd_agree(comm, c->entry || c->n == 0 ? FD_OK : FD_ERR_NOMEM));
  FD_TRY(fd_comm_bcast(comm, c->entry, (size_t)c->n * sizeof *c->entry, 0));
  /* numbers as they are; the pointers in them are then set to this rank's own strings */
  FD_TRY(fd_comm_bcast(comm, &c->meta, sizeof c->meta, 0));
  FD_TRY(fd_comm_bcast(comm, c->text.counter, sizeof c->text.counter, 0));
  FD_TRY(fd_comm_bcast_text(comm, &c->text.config, 0));
  FD_TRY(fd_comm_bcast_text(comm, &c->text.vae_hash, 0));
  FD_TRY(fd_comm_bcast_text(comm, &c->text.text_encoder_hash, 0));
  c->meta.config = c->text.config;
  c->meta.vae_hash = c->text.vae_hash;
  c->meta.text_encoder_hash = c->text.text_encoder_hash;
  for (int i = 0; i < c->meta.n_counters; i++) c->meta.counters[i].name = c->text.counter[i];
  c->fd = open(path, O_RDONLY | O_CLOEXEC);
  if (c->fd < 0) st = FD_FAIL(FD_ERR_IO, "%s: %s (does every node see this folder?)", path, strerror(errno));
  FD_TRY(fd_agree(comm, st));
  *out = c;
  c = NULL;
done:
  fd_checkpoint_close(&c);
  return st;
}

void fd_checkpoint_close(fd_checkpoint **c) {
  if (!*c) return;
  if ((*c)->fd >= 0) close((*c)->fd);
  fd_layout_text_free(&(*c)->text);
  free((*c)->entry);
  free((*c)->path);
  free(*c);
  *c = NULL;
}

const struct fd_checkpoint_meta *fd_checkpoint_meta(const fd_checkpoint *c) { return &c->meta; }

int64_t fd_checkpoint_counter(const fd_checkpoint *c, const char *name) {
  for (int i = 0; i < c->meta.n_counters; i++)
    if (strcmp(c->meta.counters[i].name, name) == 0) return c->meta.counters[i].value;
  return 0;
}

static const struct fd_layout_entry *find(const fd_checkpoint *c, const char *family, const char *name) {
  char full[FD_LAYOUT_NAME];
  if (snprintf(full, sizeof full, "%s/%s", family, name) >= (int)sizeof full) return NULL;
  return bsearch(full, c->entry, (size_t)c->n, sizeof *c->entry, name_is);
}

bool fd_checkpoint_has(const fd_checkpoint *c, const char *family) {
  size_t n = strlen(family);
  for (int i = 0; i < c->n; i++)
    if (strncmp(c->entry[i].name, family, n) == 0 && c->entry[i].name[n] == '/') return true;
  return false;
}

static void print_shape(int ndim, const int64_t *shape, char *text, size_t bytes) {
  size_t at = (size_t)snprintf(text, bytes, "[");
  for (int d = 0; d < ndim && at < bytes; d++)
    at += (size_t)snprintf(text + at, bytes - at, "%s%lld", d ? ", " : "", (long long)shape[d]);
  if (at < bytes) snprintf(text + at, bytes - at, "]");
}

static bool same_shape(const struct fd_layout_entry *e, const struct fd_checkpoint_row *row) {
  return e->ndim == row->ndim && memcmp(e->shape, row->shape, (size_t)row->ndim * sizeof *row->shape) == 0;
}

/* Says what is wrong with one row, "" if nothing. */
static void compare(const fd_checkpoint *c, const char *family, const struct fd_checkpoint_row *row, char *text, size_t bytes) {
  char is[128], want[128];
  const struct fd_layout_entry *e = find(c, family, row->name);
  text[0] = 0;
  print_shape(row->ndim, row->shape, want, sizeof want);
  if (!e) {
    snprintf(text, bytes, "data set /%s/%s is missing (%s expected)", family, row->name, want);
  } else if (!same_shape(e, row)) {
    print_shape(e->ndim, e->shape, is, sizeof is);
    snprintf(text, bytes, "data set /%s/%s has shape %s, %s expected", family, row->name, is, want);
  }
}

fd_status fd_checkpoint_match(const fd_checkpoint *c, const char *family, bool buffers, int n_rows,
                              const struct fd_checkpoint_row *rows) {
  char list[2048] = "", one[512];
  size_t at = 0;
  int wrong = 0, found = 0, in_family = 0;
  for (int i = 0; i < n_rows; i++) {
    if (rows[i].buffer && !buffers) continue;
    compare(c, family, &rows[i], one, sizeof one);
    if (!one[0] || find(c, family, rows[i].name)) found++;
    if (!one[0]) continue;
    if (wrong++ < 8 && at < sizeof list) at += (size_t)snprintf(list + at, sizeof list - at, "%s%s", wrong > 1 ? "; " : "", one);
  }
  size_t n = strlen(family);
  for (int i = 0; i < c->n; i++)
    in_family += strncmp(c->entry[i].name, family, n) == 0 && c->entry[i].name[n] == '/';
  /* something is there that nobody asked for: only then is it worth a search */
  for (int i = 0; in_family > found && i < c->n; i++) {
    const struct fd_layout_entry *e = &c->entry[i];
    if (strncmp(e->name, family, n) != 0 || e->name[n] != '/') continue;
    int known = 0;
    for (int k = 0; k < n_rows && !known; k++) known = strcmp(rows[k].name, e->name + n + 1) == 0;
    if (!known && wrong++ < 8 && at < sizeof list)
      at += (size_t)snprintf(list + at, sizeof list - at, "%sdata set /%s is not part of this model", wrong > 1 ? "; " : "", e->name);
  }
  if (!wrong) return FD_OK;
  if (wrong > 8) snprintf(one, sizeof one, "; and %d more", wrong - 8);
  return FD_FAIL(FD_ERR_FORMAT, "%s does not fit the configured model: %s%s", c->path, list, wrong > 8 ? one : "");
}

static fd_status corrupted(const fd_checkpoint *c, const struct fd_layout_entry *e, uint64_t sum) {
  return FD_FAIL(FD_ERR_FORMAT, "%s: data set /%s is corrupted: checksum %016llx, %016llx when it was written; resume from an earlier step",
                 c->path, e->name, (unsigned long long)sum, (unsigned long long)e->sum);
}

fd_status fd_checkpoint_read(fd_checkpoint *c, int n_rows, const struct fd_checkpoint_row *rows, int n_families,
                             const struct fd_checkpoint_family *families) {
  fd_status st = FD_OK;
  fd_comm *comm = c->comm;
  const struct fd_layout_entry **of_row = calloc((size_t)n_rows + 1, sizeof *of_row);
  uint64_t *sum = calloc((size_t)n_rows + 1, sizeof *sum);
  float *chunk = malloc(CHUNK * sizeof *chunk);
  if (!of_row || !sum || !chunk) st = FD_FAIL(FD_ERR_NOMEM, "no memory for reading a checkpoint");
  FD_TRY(fd_agree(comm, st));
  for (int f = 0; f < n_families; f++) {
    const struct fd_checkpoint_family *family = &families[f];
    bool whole;
    FD_TRY(check_ranges(comm, family, flat_end(n_rows, rows), &whole));
    FD_TRY(fd_agree(comm, fd_checkpoint_match(c, family->path, family->buffers, n_rows, rows)));
    memset(sum, 0, (size_t)n_rows * sizeof *sum);
    for (int i = 0; i < n_rows; i++) of_row[i] = rows[i].buffer ? NULL : find(c, family->path, rows[i].name);
    st = move_family(FROM_FILE, c->fd, c->path, n_rows, rows, of_row, family, chunk, sum);
    FD_TRY(fd_agree(comm, st));
    if (!whole) FD_TRY(fd_comm_allreduce_u64(comm, sum, n_rows, FD_COMM_SUM));
    for (int i = 0; i < n_rows && st == FD_OK; i++)
      if (of_row[i] && sum[i] != of_row[i]->sum) st = corrupted(c, of_row[i], sum[i]);
    for (int i = 0; i < n_rows && st == FD_OK; i++) {
      const struct fd_layout_entry *e = rows[i].buffer && family->buffers ? find(c, family->path, rows[i].name) : NULL;
      uint64_t of_buffer = 0;
      for (int64_t a = 0; e && st == FD_OK && a < e->numel; a += CHUNK) {
        int64_t k = e->numel - a < CHUNK ? e->numel - a : CHUNK;
        st = read_all(c->fd, chunk, 4 * k, e->at + 4 * a, c->path, e->name);
        if (st == FD_OK) of_buffer += fd_layout_sum(chunk, a, k);
      }
      if (e && st == FD_OK && of_buffer != e->sum) st = corrupted(c, e, of_buffer);
    }
    FD_TRY(fd_agree(comm, st));
  }
done:
  free(chunk);
  free(sum);
  free(of_row);
  return st;
}

fd_status fd_checkpoint_read_row(fd_checkpoint *c, const char *family, const struct fd_checkpoint_row *row, float *out) {
  fd_status st = FD_OK;
  char wrong[512];
  compare(c, family, row, wrong, sizeof wrong);
  if (wrong[0]) FD_TRY(FD_FAIL(FD_ERR_FORMAT, "%s does not fit the configured model: %s", c->path, wrong));
  const struct fd_layout_entry *e = find(c, family, row->name);
  uint64_t sum = 0;
  for (int64_t a = 0; a < e->numel; a += CHUNK) {
    int64_t k = e->numel - a < CHUNK ? e->numel - a : CHUNK;
    FD_TRY(read_all(c->fd, out + a, 4 * k, e->at + 4 * a, c->path, e->name));
    sum += fd_layout_sum(out + a, a, k);
  }
  if (sum != e->sum) FD_TRY(corrupted(c, e, sum));
done:
  return st;
}

/* ---- hashes of what a checkpoint depends on ------------------------------------------------------------------------- */

fd_status fd_checkpoint_hash_files(fd_comm *comm, int n, const char *const *paths, char hash[17]) {
  fd_status st = FD_OK;
  uint64_t *sum = calloc((size_t)n + 1, sizeof *sum);
  float *chunk = malloc(CHUNK * sizeof *chunk);
  int64_t number = 0; /* of a chunk, over all files: dealt out to the ranks in turn */
  int fd = -1;
  if (!sum || !chunk) st = FD_FAIL(FD_ERR_NOMEM, "no memory for a hash");
  for (int i = 0; i < n && st == FD_OK; i++) {
    struct stat s;
    fd = open(paths[i], O_RDONLY | O_CLOEXEC);
    if (fd < 0 || fstat(fd, &s) != 0) {
      st = FD_FAIL(FD_ERR_IO, "%s: %s", paths[i], strerror(errno));
      break;
    }
    for (int64_t at = 0; at < s.st_size && st == FD_OK; at += 4 * CHUNK, number++) {
      if (number % fd_comm_size(comm) != fd_comm_rank(comm)) continue;
      int64_t bytes = s.st_size - at < 4 * CHUNK ? s.st_size - at : 4 * CHUNK, words = (bytes + 3) / 4;
      memset((char *)chunk + bytes, 0, (size_t)(4 * words - bytes));
      for (int64_t have = 0; have < bytes;) {
        ssize_t k = pread(fd, (char *)chunk + have, (size_t)(bytes - have), at + have);
        if (k < 0 && errno == EINTR) continue;
        if (k <= 0) {
          st = FD_FAIL(FD_ERR_IO, "%s: %s", paths[i], k < 0 ? strerror(errno) : "shorter than it was");
          break;
        }
        have += k;
      }
      if (st == FD_OK) sum[i] += fd_layout_sum(chunk, at / 4, words);
    }
    if (fd_comm_rank(comm) == 0) sum[i] += (uint64_t)s.st_size;
    close(fd);
    fd = -1;
  }
  FD_TRY(fd_agree(comm, st));
  FD_TRY(fd_comm_allreduce_u64(comm, sum, n, FD_COMM_SUM));
  /* the order of the files counts */
  snprintf(hash, 17, "%016llx", (unsigned long long)fd_layout_sum(sum, 0, 2 * (int64_t)n));
done:
  if (fd >= 0) close(fd);
  free(chunk);
  free(sum);
  return st;
}
