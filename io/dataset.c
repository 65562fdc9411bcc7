// SPDX-License-Identifier: Apache-2.0
// Opens indices and packs, and reads samples: one pread per member, from any thread.
#include "io/dataset.h"

#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <unistd.h>

#include "base/log.h"
#include "io/dataset_file.h"
#include "io/dataset_index.h"

struct source {
  struct fd_dataset_map map;
  int64_t first_sample, first_shard;
};

struct shard {
  const char *path; /* borrowed from a source's map, or the pack's own path */
  int64_t bytes, mtime_ns;
  enum fd_shard_state state;
  int fd, users;      /* -1: closed */
  uint64_t last_used;
};

struct fd_dataset {
  int n_sources;
  struct source *sources;
  int64_t n, n_shards, lost[FD_BAD_COUNT];
  uint64_t fingerprint;
  struct shard *shards;
  char **paths; /* owned, one allocation: the expanded list */
  char *columns[3]; /* owned: picture, captions */
  pthread_mutex_t lock; /* of the open files */
  int n_open, most_open;
  uint64_t clock;
};

const char *fd_bad_text(enum fd_bad kind) {
  static const char *const text[FD_BAD_COUNT] = {
      "good",          "no picture",      "no caption",       "cannot be read", "picture is neither JPEG nor PNG nor WebP",
      "picture is damaged beyond use", "picture is too large", "caption is not UTF-8"};
  return kind >= 0 && kind < FD_BAD_COUNT ? text[kind] : "?";
}

const char *fd_shard_text(enum fd_shard_state state) {
  static const char *const text[FD_SHARD_STATES] = {
      "whole",
      "ends within a member; those before it count",
      "has a damaged header; members before it count",
      "is missing",
      "has zero bytes",
      "is no tar",
      "is compressed and cannot be read at offsets",
      "has sparse members",
  };
  return state >= 0 && state < FD_SHARD_STATES ? text[state] : "?";
}

static bool is_pack(const char *path) {
  const size_t n = strlen(path);
  return (n > 3 && strcmp(path + n - 3, ".h5") == 0) || (n > 5 && strcmp(path + n - 5, ".hdf5") == 0);
}

/* ---- opening ----------------------------------------------------------------------------------------------------- */

static fd_status index_place(const struct fd_dataset_config *config, const char *first_tar, uint64_t source, char **path) {
  const char *slash = strrchr(first_tar, '/');
  int n;
  if (config->index_path && *config->index_path)
    n = asprintf(path, "%s", config->index_path);
  else if (config->index_dir && *config->index_dir)
    n = asprintf(path, "%s/data-index.h5", config->index_dir);
  else
    n = asprintf(path, "%.*s/fdhpc-index-%016llx.h5", slash ? (int)(slash - first_tar) : 1, slash ? first_tar : ".", (unsigned long long)source);
  if (n >= 0) return FD_OK;
  *path = NULL;
  return FD_FAIL(FD_ERR_NOMEM, "data.index: no memory");
}

/* The index of the tars `paths`, built if it is not there or does not fit; its path in *out. */
static fd_status ready_index(fd_comm *comm, const struct fd_dataset_config *config, char *const *paths, int64_t n, char **out) {
  fd_status st = FD_OK;
  const int rank = fd_comm_rank(comm);
  char *path = NULL, *part = NULL;
  struct fd_rows rows = {0};
  struct fd_dataset_about about = {.image_column = config->image_column, .n_shards = n};
  struct fd_shard_info *shards = calloc((size_t)n, sizeof *shards);
  for (int c = 0; c < 2; c++) about.caption_columns[c] = config->caption_columns[c] ? config->caption_columns[c] : "";
  FD_TRY(fd_agree(comm, shards ? FD_OK : FD_FAIL(FD_ERR_NOMEM, "no memory for %lld tars", (long long)n)));
  about.shards = shards;
  for (int64_t i = 0; i < n; i++) {
    shards[i].path = paths[i];
    about.source = fd_hash_bytes(about.source, paths[i], strlen(paths[i]) + 1);
  }
  FD_TRY(index_place(config, paths[0], about.source, &path));
  if (asprintf(&part, "%s.part", path) < 0) part = NULL;
  FD_TRY(fd_agree(comm, part ? FD_OK : FD_FAIL(FD_ERR_NOMEM, "data.index: no memory")));

  FD_TRY(fd_shards_stat(comm, shards, n));
  int64_t fits = 0;
  if (rank == 0) {
    const char *why;
    fits = fd_dataset_file_fits(path, &about, &why);
    if (!fits && config->verbose) fd_log_info("data: indexing %lld tars into %s (%s)", (long long)n, path, why);
    if (fits && config->verbose) fd_log_info("data: the index %s fits", path);
  }
  FD_TRY(fd_comm_bcast(comm, &fits, sizeof fits, 0));
  if (!fits) {
    FD_TRY(fd_dataset_index_build(comm, &about, shards, config->strict, config->verbose, &rows));
    int64_t found = rows.n;
    FD_TRY(fd_comm_allreduce_i64(comm, &found, 1, FD_COMM_SUM));
    if (found == 0) {
      int64_t missing = 0, read = 0;
      for (int64_t i = 0; i < n; i++) missing += shards[i].state == FD_SHARD_MISSING, read += shards[i].state <= FD_SHARD_DAMAGED;
      if (missing == n)
        FD_TRY(FD_FAIL(FD_ERR_DATA, "data.data_path: none of %lld tars is there; the first is %s", (long long)n, paths[0]));
      FD_TRY(FD_FAIL(FD_ERR_DATA,
                     "data.data_path: no samples in %lld tars (%lld could be read): %lld have no picture .%s, %lld no caption .%s; check "
                     "data.image_column and data.caption_column",
                     (long long)n, (long long)read, (long long)about.lost[FD_BAD_NO_IMAGE], about.image_column,
                     (long long)about.lost[FD_BAD_NO_CAPTION], about.caption_columns[*about.caption_columns[0] ? 0 : 1]));
    }
    st = fd_dataset_file_write(comm, part, false, &about, &rows);
    if (st != FD_OK) FD_TRY(fd_fail_in(st, "data.index (set it to a file that can be written)"));
    if (rank == 0 && rename(part, path) != 0) st = FD_FAIL(FD_ERR_IO, "%s: cannot rename to %s: %s", part, path, strerror(errno));
    FD_TRY(fd_agree(comm, st));
  }
  *out = path;
  path = NULL;
done:
  fd_rows_free(&rows);
  free(shards);
  free(part);
  free(path);
  return st;
}

static fd_status add_source(fd_dataset *d, const struct fd_dataset_config *config, const char *path) {
  fd_status st = FD_OK;
  struct source *s = &d->sources[d->n_sources];
  FD_TRY(fd_dataset_map_open(path, config->image_column, config->caption_columns, &s->map));
  s->first_sample = d->n;
  s->first_shard = d->n_shards;
  d->n_sources++;
  d->n += s->map.n;
  d->n_shards += s->map.n_shards;
  d->fingerprint = d->fingerprint * 31 + s->map.fingerprint;
  for (int k = 0; k < FD_BAD_COUNT && !s->map.pack; k++) d->lost[k] += s->map.lost[k]; /* what a pack left out was said when it was made */
done:
  return st;
}

static fd_status refuse_changed(fd_comm *comm, const struct fd_dataset_map *map) {
  fd_status st = FD_OK;
  struct fd_shard_info *now = malloc((size_t)map->n_shards * sizeof *now);
  FD_TRY(fd_agree(comm, now ? FD_OK : FD_FAIL(FD_ERR_NOMEM, "no memory for %lld tars", (long long)map->n_shards)));
  memcpy(now, map->shards, (size_t)map->n_shards * sizeof *now);
  FD_TRY(fd_shards_stat(comm, now, map->n_shards));
  for (int64_t i = 0; i < map->n_shards; i++)
    if (now[i].bytes != map->shards[i].bytes || now[i].mtime_ns != map->shards[i].mtime_ns)
      FD_TRY(FD_FAIL(FD_ERR_FORMAT, "%s: changed (size or time) after the index was made; give the tars themselves in data.data_path to index them anew",
                     now[i].path));
done:
  free(now);
  return st;
}

/* As many open files as the system allows, some kept for others. */
static int file_allowance(void) {
  struct rlimit limit;
  if (getrlimit(RLIMIT_NOFILE, &limit) != 0) return 64;
  if (limit.rlim_cur < limit.rlim_max) {
    limit.rlim_cur = limit.rlim_max < 65536 ? limit.rlim_max : 65536;
    setrlimit(RLIMIT_NOFILE, &limit);
    getrlimit(RLIMIT_NOFILE, &limit);
  }
  const int64_t most = (int64_t)limit.rlim_cur * 3 / 4;
  return most < 16 ? 16 : most > 32768 ? 32768 : (int)most;
}

static void report(const fd_dataset *d) {
  int lines = 0;
  for (int64_t i = 0; i < d->n_shards; i++)
    if (d->shards[i].state != FD_SHARD_WHOLE && lines++ < 10) fd_log_info("data: %s %s", d->shards[i].path, fd_shard_text(d->shards[i].state));
  if (lines > 10) fd_log_info("data: and %d tars more that are not whole", lines - 10);
  fd_log_info("data: %lld samples in %lld files; left out: %lld without picture, %lld without caption", (long long)d->n, (long long)d->n_shards,
              (long long)d->lost[FD_BAD_NO_IMAGE], (long long)d->lost[FD_BAD_NO_CAPTION]);
}

fd_status fd_dataset_open(fd_comm *comm, const struct fd_dataset_config *config, fd_dataset **out) {
  fd_status st = FD_OK;
  char **list = NULL, **tars = NULL, *index = NULL;
  int64_t n = 0, n_tars = 0;
  fd_dataset *d = NULL;
  if (config->n_paths < 1) FD_TRY(FD_FAIL(FD_ERR_CONFIG, "data.data_path is empty: give tars (a_{000..999}.tar) or a pack (x.h5)"));
  const bool synthetic = config->caption_columns[0] && *config->caption_columns[0], original = config->caption_columns[1] && *config->caption_columns[1];
  if (!synthetic && !original) FD_TRY(FD_FAIL(FD_ERR_CONFIG, "data.caption_column: neither synthetic nor original is named"));
  if (!config->image_column || !*config->image_column) FD_TRY(FD_FAIL(FD_ERR_CONFIG, "data.image_column is empty"));
  FD_TRY(fd_paths_expand(config->paths, config->n_paths, &list, &n));
  d = calloc(1, sizeof *d);
  tars = malloc((size_t)n * sizeof *tars);
  if (d) {
    pthread_mutex_init(&d->lock, NULL);
    d->paths = list;
    list = NULL;
    d->sources = calloc((size_t)n + 1, sizeof *d->sources);
    d->columns[0] = strdup(config->image_column);
    for (int c = 0; c < 2; c++) d->columns[1 + c] = strdup(config->caption_columns[c] ? config->caption_columns[c] : "");
  }
  FD_TRY(fd_agree(comm, d && tars && d->sources && d->columns[0] && d->columns[1] && d->columns[2] ? FD_OK : FD_FAIL(FD_ERR_NOMEM, "no memory for %lld paths", (long long)n)));
  for (int64_t i = 0; i < n; i++)
    if (!is_pack(d->paths[i])) tars[n_tars++] = d->paths[i];
  if (n_tars) {
    FD_TRY(ready_index(comm, config, tars, n_tars, &index));
    st = add_source(d, config, index);
  }
  for (int64_t i = 0; i < n && st == FD_OK; i++)
    if (is_pack(d->paths[i])) st = add_source(d, config, d->paths[i]);
  FD_TRY(fd_agree(comm, st));

  d->shards = calloc((size_t)d->n_shards, sizeof *d->shards);
  FD_TRY(fd_agree(comm, d->shards ? FD_OK : FD_FAIL(FD_ERR_NOMEM, "no memory for %lld files", (long long)d->n_shards)));
  int64_t next_pack = 0;
  for (int s = 0; s < d->n_sources; s++) {
    const struct source *source = &d->sources[s];
    const char *self = index;
    if (!(s == 0 && n_tars)) {
      while (!is_pack(d->paths[next_pack])) next_pack++;
      self = d->paths[next_pack++];
    }
    for (int64_t i = 0; i < source->map.n_shards; i++) {
      const struct fd_shard_info *info = &source->map.shards[i];
      /* bytes < 0: unchecked, since a pack is not of a fixed size while it is being made */
      d->shards[source->first_shard + i] = source->map.pack ? (struct shard){.path = self, .bytes = -1, .fd = -1}
                                                            : (struct shard){.path = info->path, .bytes = info->bytes, .mtime_ns = info->mtime_ns,
                                                                             .state = (enum fd_shard_state)info->state, .fd = -1};
    }
  }
  for (int s = n_tars ? 1 : 0; s < d->n_sources; s++) /* an index of tars given as the path itself: nothing was checked yet */
    if (!d->sources[s].map.pack) FD_TRY(refuse_changed(comm, &d->sources[s].map));
  for (int64_t i = 0; i < d->n_shards && config->strict; i++) {
    const enum fd_shard_state state = d->shards[i].state;
    if (state == FD_SHARD_COMPRESSED || state == FD_SHARD_SPARSE)
      FD_TRY(FD_FAIL(FD_ERR_UNSUPPORTED, "%s: %s; write it again uncompressed and without --sparse", d->shards[i].path, fd_shard_text(state)));
  }
  d->most_open = file_allowance();
  if (config->verbose) report(d);
  *out = d;
  d = NULL;
done:
  fd_dataset_destroy(&d);
  free(list);
  free(tars);
  free(index);
  return st;
}

void fd_dataset_destroy(fd_dataset **dataset) {
  fd_dataset *d = *dataset;
  if (!d) return;
  for (int64_t i = 0; d->shards && i < d->n_shards; i++)
    if (d->shards[i].fd >= 0) close(d->shards[i].fd);
  for (int s = 0; s < d->n_sources; s++) fd_dataset_map_close(&d->sources[s].map);
  pthread_mutex_destroy(&d->lock);
  for (int c = 0; c < 3; c++) free(d->columns[c]);
  free(d->sources);
  free(d->shards);
  free(d->paths);
  free(d);
  *dataset = NULL;
}

/* ---- questions --------------------------------------------------------------------------------------------------- */

int64_t fd_dataset_samples(const fd_dataset *d) { return d->n; }
uint64_t fd_dataset_fingerprint(const fd_dataset *d) { return d->fingerprint; }
int64_t fd_dataset_lost(const fd_dataset *d, enum fd_bad kind) { return d->lost[kind]; }
int64_t fd_dataset_n_shards(const fd_dataset *d) { return d->n_shards; }

int64_t fd_dataset_shards(const fd_dataset *d, enum fd_shard_state state) {
  int64_t n = 0;
  for (int64_t i = 0; i < d->n_shards; i++) n += d->shards[i].state == state;
  return n;
}

const char *fd_dataset_shard_path(const fd_dataset *d, int64_t shard, enum fd_shard_state *state) {
  if (shard < 0 || shard >= d->n_shards) return "?";
  if (state) *state = d->shards[shard].state;
  return d->shards[shard].path;
}

bool fd_dataset_has_caption(const fd_dataset *d, int column) {
  for (int s = 0; s < d->n_sources; s++)
    if (!d->sources[s].map.caption[column].bytes) return false;
  return d->n_sources > 0;
}

const char *fd_dataset_column(const fd_dataset *d, int column) { return d->columns[column + 1]; }

static const struct source *source_of(const fd_dataset *d, int64_t i) {
  int s = d->n_sources - 1;
  while (s > 0 && i < d->sources[s].first_sample) s--;
  return &d->sources[s];
}

static struct fd_member member_of(const struct source *s, const struct fd_place_columns *columns, int64_t row) {
  if (!columns->bytes || columns->bytes[row] < 0) return (struct fd_member){-1, 0, -1};
  const int64_t shard = columns->shard[row];
  const bool valid = shard >= 0 && shard < s->map.n_shards;
  return (struct fd_member){valid ? s->first_shard + shard : -1, columns->offset[row], columns->bytes[row]};
}

void fd_dataset_info(const fd_dataset *d, int64_t i, struct fd_sample_info *info) {
  const struct source *s = source_of(d, i);
  const int64_t row = i - s->first_sample;
  const int64_t from = s->map.key_offset[row], to = s->map.key_offset[row + 1];
  const bool valid = from >= 0 && to >= from && to <= s->map.key_text_bytes && to - from < 1 << 20;
  info->key = valid ? s->map.key_text + from : "";
  info->key_bytes = valid ? (int)(to - from) : 0;
  info->image = member_of(s, &s->map.image, row);
  for (int c = 0; c < 2; c++) info->caption[c] = member_of(s, &s->map.caption[c], row);
}

/* ---- reading ----------------------------------------------------------------------------------------------------- */

/* The file's descriptor, opened if need be; release_shard gives it back. -1 and a message on failure. */
static int hold_shard(fd_dataset *d, int64_t shard) {
  struct shard *s = &d->shards[shard];
  pthread_mutex_lock(&d->lock);
  if (s->fd < 0) {
    if (d->n_open >= d->most_open) { /* close the one that was not used for longest */
      struct shard *oldest = NULL;
      for (int64_t i = 0; i < d->n_shards; i++) {
        struct shard *o = &d->shards[i];
        if (o->fd >= 0 && o->users == 0 && (!oldest || o->last_used < oldest->last_used)) oldest = o;
      }
      if (oldest) {
        close(oldest->fd);
        oldest->fd = -1;
        d->n_open--;
      }
    }
    struct stat about;
    const int fd = open(s->path, O_RDONLY | O_CLOEXEC);
    if (fd < 0) {
      FD_FAIL(FD_ERR_IO, "%s: cannot open: %s", s->path, strerror(errno));
    } else if (s->bytes >= 0 && (fstat(fd, &about) != 0 || about.st_size != s->bytes ||
                                 about.st_mtim.tv_sec * INT64_C(1000000000) + about.st_mtim.tv_nsec != s->mtime_ns)) {
      FD_FAIL(FD_ERR_DATA, "%s: was changed after it was indexed; start again to index it anew", s->path);
      close(fd);
    } else {
      s->fd = fd;
      d->n_open++;
    }
  }
  const int fd = s->fd;
  if (fd >= 0) {
    s->users++;
    s->last_used = ++d->clock;
  }
  pthread_mutex_unlock(&d->lock);
  return fd;
}

static void release_shard(fd_dataset *d, int64_t shard) {
  pthread_mutex_lock(&d->lock);
  d->shards[shard].users--;
  pthread_mutex_unlock(&d->lock);
}

static bool read_member(fd_dataset *d, const struct fd_member *m, void **bytes, size_t *capacity) {
  if (m->shard < 0 || m->offset < 0 || m->bytes > (int64_t)1 << 31) {
    FD_FAIL(FD_ERR_FORMAT, "the index names file %lld, %lld bytes at %lld: it is damaged", (long long)m->shard, (long long)m->bytes, (long long)m->offset);
    return false;
  }
  if ((size_t)m->bytes + 1 > *capacity) {
    const size_t room = (size_t)m->bytes + (size_t)m->bytes / 4 + 4096;
    void *more = malloc(room);
    if (!more) {
      FD_FAIL(FD_ERR_NOMEM, "no memory for %lld bytes", (long long)m->bytes);
      return false;
    }
    free(*bytes);
    *bytes = more;
    *capacity = room;
  }
  const int fd = hold_shard(d, m->shard);
  if (fd < 0) return false;
  char *p = *bytes;
  int64_t done = 0;
  while (done < m->bytes) {
    const int64_t left = m->bytes - done;
    const ssize_t n = pread(fd, p + done, (size_t)(left < 1 << 30 ? left : 1 << 30), m->offset + done);
    if (n < 0 && errno == EINTR) continue;
    if (n <= 0) {
      FD_FAIL(FD_ERR_IO, "%s: cannot read %lld bytes at %lld: %s", d->shards[m->shard].path, (long long)m->bytes, (long long)m->offset,
              n < 0 ? strerror(errno) : "the file ends before");
      break;
    }
    done += n;
  }
  release_shard(d, m->shard);
  p[m->bytes] = 0; /* so that text can be printed */
  return done == m->bytes;
}

enum fd_bad fd_dataset_read(fd_dataset *d, int64_t i, unsigned columns, struct fd_sample *sample) {
  struct fd_sample_info info;
  if (i < 0 || i >= d->n) {
    FD_FAIL(FD_ERR_ARG, "sample %lld of %lld", (long long)i, (long long)d->n);
    return FD_BAD_READ;
  }
  fd_dataset_info(d, i, &info);
  if (info.image.bytes < 0) return FD_BAD_NO_IMAGE;
  void *bytes = sample->image;
  const bool read = read_member(d, &info.image, &bytes, &sample->image_capacity);
  sample->image = bytes;
  sample->image_bytes = (size_t)info.image.bytes;
  if (!read) return FD_BAD_READ;
  for (int c = 0; c < 2; c++) {
    sample->caption_bytes[c] = -1;
    if (!(columns & 1u << c) || info.caption[c].bytes < 0) continue;
    void *text = sample->caption[c];
    const bool good = read_member(d, &info.caption[c], &text, &sample->caption_capacity[c]);
    sample->caption[c] = text;
    if (!good) return FD_BAD_READ;
    sample->caption_bytes[c] = info.caption[c].bytes;
  }
  return FD_BAD_NONE;
}

void fd_sample_free(struct fd_sample *s) {
  free(s->image);
  for (int c = 0; c < 2; c++) free(s->caption[c]);
  *s = (struct fd_sample){0};
}
