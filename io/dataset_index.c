// SPDX-License-Identifier: Apache-2.0
// Builds the index of a list of tars: every rank walks over a run of tars, groups members into samples, and writes its rows.
//
// Grouping runs over the list in order without a break at the end of a tar. What a rank cannot decide alone is its first key, which may
// continue the last sample of the rank before: those members are kept as they came ("head"), its last sample stays open ("tail"),
// and both go to all ranks, which join them in order, each in the same way.
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "base/log.h"
#include "io/dataset_index.h"
#include "io/tar_index.h"

enum { MOST_EXTENSIONS = 64, LOST_LINES = 10 };

/* A sample that may still get members. */
struct open_sample {
  bool any;
  struct fd_row row;
  int32_t shard; /* of its first member */
  char *key; /* owned, row.key_bytes */
  size_t key_capacity;
  int n_extensions;
  char *extension[MOST_EXTENSIONS]; /* owned, terminated */
};

struct head_member {
  char *key, *extension; /* owned, terminated */
  struct fd_place place;
};

struct builder {
  const struct fd_dataset_about *about;
  int required; /* the caption column without which a sample is lost */
  struct fd_rows *rows; /* where finished samples go; NULL: nowhere */
  int64_t *lost;
  int lost_lines;
  bool verbose;
  struct open_sample open;
  struct head_member *head;
  int64_t n_head, head_capacity;
  bool in_head;
  int32_t shard;
};

static fd_status no_memory(void) { return FD_FAIL(FD_ERR_NOMEM, "no memory to index the tars"); }

static void open_clear(struct open_sample *s) {
  for (int i = 0; i < s->n_extensions; i++) free(s->extension[i]);
  s->n_extensions = 0;
  s->any = false;
}

static fd_status finish_sample(struct builder *b) {
  fd_status st = FD_OK;
  struct open_sample *s = &b->open;
  if (!s->any) return FD_OK;
  const enum fd_bad kind = s->row.image.bytes < 0                    ? FD_BAD_NO_IMAGE
                           : s->row.caption[b->required].bytes < 0 ? FD_BAD_NO_CAPTION
                                                                     : FD_BAD_NONE;
  if (b->rows && kind == FD_BAD_NONE) FD_TRY(fd_rows_add(b->rows, &s->row, s->key));
  if (b->rows && kind != FD_BAD_NONE) {
    b->lost[kind]++;
    if (b->verbose && b->lost_lines++ < LOST_LINES)
      fd_log_warn("%s: sample \"%.*s\" has no member .%s, it is left out%s", b->about->shards[s->shard].path, s->row.key_bytes, s->key,
                  kind == FD_BAD_NO_IMAGE ? b->about->image_column : b->about->caption_columns[b->required],
                  b->lost_lines == LOST_LINES ? " (further ones are only counted)" : "");
  }
done:
  open_clear(s);
  return st;
}

static fd_status add_member(struct builder *b, const char *key, size_t key_bytes, const char *extension, const struct fd_place *place) {
  fd_status st = FD_OK;
  struct open_sample *s = &b->open;
  bool fresh = !s->any || (size_t)s->row.key_bytes != key_bytes || memcmp(s->key, key, key_bytes) != 0;
  for (int i = 0; i < s->n_extensions && !fresh; i++) fresh = strcmp(s->extension[i], extension) == 0;
  if (fresh) {
    FD_TRY(finish_sample(b));
    if (key_bytes + 1 > s->key_capacity) {
      char *more = realloc(s->key, key_bytes + 64);
      if (!more) FD_TRY(no_memory());
      s->key = more;
      s->key_capacity = key_bytes + 64;
    }
    memcpy(s->key, key, key_bytes);
    const struct fd_place none = {0, -1, 0};
    s->row = (struct fd_row){none, {none, none}, 0, (int32_t)key_bytes};
    s->shard = place->shard;
    s->any = true;
  }
  if (s->n_extensions == MOST_EXTENSIONS) return FD_OK; /* a sample of more kinds: those beyond are not watched for repetition */
  s->extension[s->n_extensions] = strdup(extension);
  if (!s->extension[s->n_extensions]) FD_TRY(no_memory());
  s->n_extensions++;
  if (strcmp(extension, b->about->image_column) == 0) s->row.image = *place;
  for (int c = 0; c < 2; c++)
    if (*b->about->caption_columns[c] && strcmp(extension, b->about->caption_columns[c]) == 0) s->row.caption[c] = *place;
done:
  return st;
}

static fd_status on_member(void *context, const struct fd_tar_member *m) {
  fd_status st = FD_OK;
  struct builder *b = context;
  const struct fd_place place = {m->offset, m->bytes, b->shard};
  if (b->in_head && b->n_head > 0 && (strlen(b->head[0].key) != m->key_bytes || memcmp(b->head[0].key, m->key, m->key_bytes) != 0)) b->in_head = false;
  if (!b->in_head) return add_member(b, m->key, m->key_bytes, m->extension, &place);
  if (b->n_head == b->head_capacity) {
    const int64_t capacity = b->head_capacity * 2 + 16;
    struct head_member *more = realloc(b->head, (size_t)capacity * sizeof *more);
    if (!more) FD_TRY(no_memory());
    b->head = more;
    b->head_capacity = capacity;
  }
  struct head_member *h = &b->head[b->n_head];
  *h = (struct head_member){strndup(m->key, m->key_bytes), strdup(m->extension), place};
  if (!h->key || !h->extension) {
    free(h->key);
    free(h->extension);
    FD_TRY(no_memory());
  }
  b->n_head++;
done:
  return st;
}

/* ---- what ranks tell each other: a flat text of numbers and strings ------------------------------------------------- */

struct packet {
  char *at; /* owned when writing */
  size_t n, capacity;
};

static fd_status put(struct packet *p, const void *data, size_t bytes) {
  if (p->n + bytes > p->capacity) {
    const size_t capacity = (p->n + bytes) * 2 + 256;
    char *more = realloc(p->at, capacity);
    if (!more) return no_memory();
    p->at = more;
    p->capacity = capacity;
  }
  memcpy(p->at + p->n, data, bytes);
  p->n += bytes;
  return FD_OK;
}
static fd_status put_text(struct packet *p, const char *text, size_t bytes) {
  const uint64_t n = bytes;
  fd_status st = put(p, &n, sizeof n);
  return st == FD_OK ? put(p, text, bytes) : st;
}
static void take(struct packet *p, void *data, size_t bytes) {
  memcpy(data, p->at + p->n, bytes);
  p->n += bytes;
}
static const char *take_text(struct packet *p, size_t *bytes) {
  uint64_t n;
  take(p, &n, sizeof n);
  *bytes = n;
  p->n += n;
  return p->at + p->n - n;
}

static fd_status put_ends(struct packet *p, const struct builder *b) {
  fd_status st = FD_OK;
  const int64_t all_head = b->in_head;
  FD_TRY(put(p, &all_head, sizeof all_head));
  FD_TRY(put(p, &b->n_head, sizeof b->n_head));
  for (int64_t i = 0; i < b->n_head; i++) {
    FD_TRY(put_text(p, b->head[i].key, strlen(b->head[i].key)));
    FD_TRY(put_text(p, b->head[i].extension, strlen(b->head[i].extension) + 1));
    FD_TRY(put(p, &b->head[i].place, sizeof b->head[i].place));
  }
  if (all_head) return FD_OK;
  const int64_t n = b->open.n_extensions;
  FD_TRY(put(p, &b->open.row, sizeof b->open.row));
  FD_TRY(put(p, &b->open.shard, sizeof b->open.shard));
  FD_TRY(put_text(p, b->open.key, (size_t)b->open.row.key_bytes));
  FD_TRY(put(p, &n, sizeof n));
  for (int64_t i = 0; i < n; i++) FD_TRY(put_text(p, b->open.extension[i], strlen(b->open.extension[i]) + 1));
done:
  return st;
}

/* Replay all ranks' ends; what is finished at rank `rank` goes into b->rows (the front), or for the last rank's tail into `back`. */
static fd_status join_ends(struct packet *all, int size, int rank, struct builder *b, struct fd_rows *front, struct fd_rows *back) {
  fd_status st = FD_OK;
  for (int r = 0; r < size; r++) {
    int64_t all_head, n;
    b->rows = r == rank ? front : NULL;
    take(all, &all_head, sizeof all_head);
    take(all, &n, sizeof n);
    for (int64_t i = 0; i < n; i++) {
      size_t key_bytes, extension_bytes;
      struct fd_place place;
      const char *key = take_text(all, &key_bytes), *extension = take_text(all, &extension_bytes);
      take(all, &place, sizeof place);
      FD_TRY(add_member(b, key, key_bytes, extension, &place));
    }
    if (all_head) continue;
    FD_TRY(finish_sample(b));
    struct open_sample *s = &b->open;
    size_t bytes;
    take(all, &s->row, sizeof s->row);
    take(all, &s->shard, sizeof s->shard);
    const char *key = take_text(all, &bytes);
    if (bytes + 1 > s->key_capacity) {
      char *more = realloc(s->key, bytes + 64);
      if (!more) FD_TRY(no_memory());
      s->key = more;
      s->key_capacity = bytes + 64;
    }
    memcpy(s->key, key, bytes);
    s->any = true;
    take(all, &n, sizeof n);
    for (int64_t i = 0; i < n; i++) {
      s->extension[i] = strdup(take_text(all, &bytes));
      if (!s->extension[i]) FD_TRY(no_memory());
      s->n_extensions++;
    }
  }
  b->rows = rank == size - 1 ? back : NULL;
  FD_TRY(finish_sample(b));
done:
  return st;
}

/* ---- the build ----------------------------------------------------------------------------------------------------- */

fd_status fd_shards_stat(fd_comm *comm, struct fd_shard_info *shards, int64_t n) {
  fd_status st = FD_OK;
  const int rank = fd_comm_rank(comm), size = fd_comm_size(comm);
  const int64_t first = n * rank / size, last = n * (rank + 1) / size;
  int64_t *mine = malloc((size_t)(last - first + 1) * 2 * sizeof *mine);
  void *all = NULL;
  size_t *at = NULL;
  FD_TRY(fd_agree(comm, mine ? FD_OK : no_memory()));
  for (int64_t i = first; i < last; i++) {
    struct stat about;
    const bool there = stat(shards[i].path, &about) == 0 && S_ISREG(about.st_mode);
    mine[2 * (i - first)] = there ? about.st_size : -1;
    mine[2 * (i - first) + 1] = there ? about.st_mtim.tv_sec * INT64_C(1000000000) + about.st_mtim.tv_nsec : 0;
  }
  FD_TRY(fd_comm_allgatherv(comm, mine, (size_t)(last - first) * 2 * sizeof *mine, &all, &at));
  for (int64_t i = 0; i < n; i++) {
    shards[i].bytes = ((int64_t *)all)[2 * i];
    shards[i].mtime_ns = ((int64_t *)all)[2 * i + 1];
  }
done:
  free(mine);
  free(all);
  free(at);
  return st;
}

fd_status fd_dataset_index_build(fd_comm *comm, struct fd_dataset_about *about, struct fd_shard_info *shards, bool strict, bool verbose,
                                 struct fd_rows *rows) {
  fd_status st = FD_OK;
  const int rank = fd_comm_rank(comm), size = fd_comm_size(comm);
  struct fd_rows front = {0}, middle = {0}, back = {0};
  struct packet mine = {0};
  void *all = NULL;
  size_t *at = NULL;
  int64_t *states = NULL;
  struct builder b = {.about = about, .required = *about->caption_columns[0] ? 0 : 1, .rows = &middle, .lost = about->lost, .verbose = verbose, .in_head = true};

  /* a contiguous run of tars per rank, about equal in bytes */
  int64_t total = 0, before = 0, first = about->n_shards, last = 0;
  for (int64_t i = 0; i < about->n_shards; i++) total += (shards[i].bytes > 0 ? shards[i].bytes : 0) + 4096;
  for (int64_t i = 0; i < about->n_shards; i++) {
    const int64_t weight = (shards[i].bytes > 0 ? shards[i].bytes : 0) + 4096;
    int64_t owner = (int64_t)(((double)before + 0.5 * (double)weight) / (double)total * size);
    if (owner >= size) owner = size - 1;
    if (owner == rank) {
      if (i < first) first = i;
      last = i + 1;
    }
    before += weight;
  }
  states = calloc((size_t)about->n_shards + 1, sizeof *states);
  FD_TRY(fd_agree(comm, states ? FD_OK : no_memory()));
  for (int64_t i = first; i < last && st == FD_OK; i++) {
    enum fd_shard_state state;
    b.shard = (int32_t)i;
    st = fd_tar_scan(shards[i].path, on_member, &b, &state);
    states[i] = state;
    if (verbose && rank == 0) fd_log_progress("indexing tars: %lld of about %lld", (long long)(i + 1 - first), (long long)(last - first));
    if (st == FD_OK && strict && state == FD_SHARD_COMPRESSED)
      st = FD_FAIL(FD_ERR_UNSUPPORTED, "%s: is compressed; samples are read at offsets: uncompress it first (gunzip, unxz, unzstd)", shards[i].path);
    if (st == FD_OK && strict && state == FD_SHARD_SPARSE)
      st = FD_FAIL(FD_ERR_UNSUPPORTED, "%s: has sparse members; write it again without (tar without --sparse)", shards[i].path);
  }
  if (verbose && rank == 0) fd_log_progress("%s", "");
  if (st == FD_OK) st = put_ends(&mine, &b);
  FD_TRY(fd_agree(comm, st));

  FD_TRY(fd_comm_allreduce_i64(comm, states, about->n_shards, FD_COMM_SUM));
  for (int64_t i = 0; i < about->n_shards; i++) shards[i].state = states[i];
  FD_TRY(fd_comm_allgatherv(comm, mine.at, mine.n, &all, &at));
  open_clear(&b.open);
  struct packet read = {.at = all};
  st = join_ends(&read, size, rank, &b, &front, &back);
  /* front, middle, back in one list */
  const struct fd_rows *const lists[] = {&middle, &back};
  for (int k = 0; k < 2 && st == FD_OK; k++)
    for (int64_t i = 0; i < lists[k]->n && st == FD_OK; i++) st = fd_rows_add(&front, &lists[k]->at[i], lists[k]->text + lists[k]->at[i].key);
  FD_TRY(fd_agree(comm, st));
  FD_TRY(fd_comm_allreduce_i64(comm, about->lost, FD_BAD_COUNT, FD_COMM_SUM));
  *rows = front;
  front = (struct fd_rows){0};
done:
  fd_rows_free(&front);
  fd_rows_free(&middle);
  fd_rows_free(&back);
  for (int64_t i = 0; i < b.n_head; i++) free(b.head[i].key), free(b.head[i].extension);
  free(b.head);
  open_clear(&b.open);
  free(b.open.key);
  free(mine.at);
  free(all);
  free(at);
  free(states);
  return st;
}
