// SPDX-License-Identifier: Apache-2.0
// Sums through shared memory. Invariant: counters of the ranks only grow, each is written by its own rank; what it promises was
// written before it (release), and is read after it (acquire).
#include "comm/node_sum.h"

#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>

#include "base/clones.h"

enum { SLOTS = 4, CHUNK = 1 << 16 /* elements: two slots' rows stay in a core's cache */, BLOCK = 1024 };

/* Chunks done by a rank; a cache line each, so that ranks do not disturb each other. */
struct counters {
  _Alignas(64) _Atomic uint64_t written;
  _Alignas(64) _Atomic uint64_t summed;
  _Alignas(64) _Atomic uint64_t copied;
};

struct entry {
  float *data;
  int64_t n;
  int request;
};

/* A place in the queue: the next chunk is `number`, at element `at` of entry `entry`. */
struct cursor {
  uint64_t number;
  int64_t at;
  int entry;
};

struct fd_node_sum {
  int rank, size;
  fd_shared *memory; /* owned: counters of all ranks, then rows [SLOTS][size][CHUNK] */
  struct counters *counters;
  float *rows;
  struct entry *entry; /* queue; emptied when all is done */
  int n_entries, cap_entries;
  struct cursor write, sum, copy;
};

fd_status fd_node_sum_create(fd_comm *comm, fd_node_sum **out) {
  fd_status st = FD_OK;
  fd_node_sum *s = calloc(1, sizeof *s);
  st = s ? FD_OK : FD_FAIL(FD_ERR_NOMEM, "no memory for sums within a node");
  FD_TRY(fd_agree(comm, st));
  s->rank = comm->rank;
  s->size = comm->size;
  const size_t head = (size_t)comm->size * sizeof(struct counters);
  FD_TRY(fd_shared_create(comm, head + (size_t)SLOTS * (size_t)comm->size * CHUNK * sizeof(float), &s->memory));
  s->counters = s->memory->data;
  s->rows = (float *)((char *)s->memory->data + head);
  *out = s;
  s = NULL;
done:
  fd_node_sum_destroy(&s);
  return st;
}

void fd_node_sum_destroy(fd_node_sum **s) {
  if (!*s) return;
  if ((*s)->memory) fd_shared_destroy(&(*s)->memory);
  free((*s)->entry);
  free(*s);
  *s = NULL;
}

bool fd_node_sum_busy(const fd_node_sum *s) { return s->n_entries > 0; }

fd_status fd_node_sum_start(fd_node_sum *s, int request, float *data, int64_t n, int *chunks) {
  *chunks = (int)((n + CHUNK - 1) / CHUNK);
  if (!n) return FD_OK;
  if (s->n_entries == s->cap_entries) {
    const int cap = 2 * s->cap_entries + 32;
    struct entry *e = realloc(s->entry, (size_t)cap * sizeof *e);
    if (!e) return FD_FAIL(FD_ERR_NOMEM, "no memory for %d sums", cap);
    s->entry = e;
    s->cap_entries = cap;
  }
  s->entry[s->n_entries++] = (struct entry){data, n, request};
  return FD_OK;
}

/* ---- stages -------------------------------------------------------------------------------------------------------- */

static float *row(const fd_node_sum *s, uint64_t number, int rank) {
  return s->rows + ((int64_t)(number % SLOTS) * s->size + rank) * CHUNK;
}

/* The chunk at a cursor, or NULL at the end of the queue. */
static float *chunk(const fd_node_sum *s, const struct cursor *c, int64_t *n) {
  if (c->entry == s->n_entries) return NULL;
  const struct entry *e = &s->entry[c->entry];
  *n = e->n - c->at < CHUNK ? e->n - c->at : CHUNK;
  return e->data + c->at;
}

static void advance(const fd_node_sum *s, struct cursor *c, int64_t n) {
  c->number++;
  c->at += n;
  if (c->at < s->entry[c->entry].n) return;
  c->at = 0;
  c->entry++;
}

/* Elements [*lo, *hi) of a chunk are summed by `rank`; cut at cache lines. */
static void slice(const fd_node_sum *s, int64_t n, int rank, int64_t *lo, int64_t *hi) {
  const int64_t lines = (n + 15) / 16;
  *lo = lines * rank / s->size * 16;
  *hi = lines * (rank + 1) / s->size * 16;
  if (*lo > n) *lo = n;
  if (*hi > n) *hi = n;
}

static bool all_reached(const fd_node_sum *s, size_t member, uint64_t count) {
  for (int r = 0; r < s->size; r++) {
    const _Atomic uint64_t *c = (const _Atomic uint64_t *)((const char *)&s->counters[r] + member);
    if (atomic_load_explicit(c, memory_order_acquire) < count) return false;
  }
  return true;
}
#define ALL_REACHED(s, which, count) all_reached((s), offsetof(struct counters, which), (count))

static void reached(_Atomic uint64_t *counter, uint64_t count) { atomic_store_explicit(counter, count, memory_order_release); }

static bool write_stage(fd_node_sum *s) {
  int64_t n, lo, hi;
  const float *data = chunk(s, &s->write, &n);
  const uint64_t c = s->write.number;
  if (!data || (c >= SLOTS && !ALL_REACHED(s, copied, c - SLOTS + 1))) return false;
  float *mine = row(s, c, s->rank);
  slice(s, n, s->rank, &lo, &hi);
  memcpy(mine, data, (size_t)lo * sizeof(float));
  memcpy(mine + hi, data + hi, (size_t)(n - hi) * sizeof(float));
  advance(s, &s->write, n);
  reached(&s->counters[s->rank].written, s->write.number);
  return true;
}

FD_CLONES static void add(const float *restrict x, float *restrict y, int64_t n) {
  for (int64_t i = 0; i < n; i++) y[i] += x[i];
}

static bool sum_stage(fd_node_sum *s) {
  int64_t n, lo, hi;
  float *data = chunk(s, &s->sum, &n);
  const uint64_t c = s->sum.number;
  if (!data || c >= s->write.number || !ALL_REACHED(s, written, c + 1)) return false;
  slice(s, n, s->rank, &lo, &hi);
  float *mine = row(s, c, s->rank), block[BLOCK];
  for (int64_t at = lo; at < hi; at += BLOCK) {
    const int64_t k = hi - at < BLOCK ? hi - at : BLOCK;
    for (int r = 0; r < s->size; r++) { /* this rank's own part was not written to its row */
      const float *x = r == s->rank ? data + at : row(s, c, r) + at;
      if (r == 0) memcpy(block, x, (size_t)k * sizeof(float));
      else add(x, block, k);
    }
    memcpy(mine + at, block, (size_t)k * sizeof(float));
    memcpy(data + at, block, (size_t)k * sizeof(float));
  }
  advance(s, &s->sum, n);
  reached(&s->counters[s->rank].summed, s->sum.number);
  return true;
}

static bool copy_stage(fd_node_sum *s, int *open) {
  int64_t n, lo, hi;
  float *data = chunk(s, &s->copy, &n);
  const uint64_t c = s->copy.number;
  if (!data || c >= s->sum.number || !ALL_REACHED(s, summed, c + 1)) return false;
  for (int r = 0; r < s->size; r++) {
    if (r == s->rank) continue;
    slice(s, n, r, &lo, &hi);
    memcpy(data + lo, row(s, c, r) + lo, (size_t)(hi - lo) * sizeof(float));
  }
  open[s->entry[s->copy.entry].request]--;
  advance(s, &s->copy, n);
  reached(&s->counters[s->rank].copied, s->copy.number);
  return true;
}

bool fd_node_sum_progress(fd_node_sum *s, int *open) {
  bool any = false;
  for (bool more = true; more && s->n_entries;) {
    more = copy_stage(s, open);
    if (sum_stage(s)) more = true;
    if (write_stage(s)) more = true;
    any = any || more;
    if (s->copy.entry == s->n_entries) { /* all is done: the queue starts anew */
      s->n_entries = 0;
      s->write.entry = s->sum.entry = s->copy.entry = 0;
    }
  }
  return any;
}
